"""The LoRA in training, prompted in the real WebUI's txt2img before it is finished."""

from __future__ import annotations

import numpy as np

from tests.webui.test_borrowing import same


def shown(webui, job, step):
    """Until the LoRA folder has what was saved at ``step``."""
    return webui.until(job, lambda one: one["published_step"] == step or one["status"] == "failed")


def picker(webui):
    return [lora["name"] for lora in webui.get("/sdapi/v1/loras")]


def test_the_newest_weights_can_be_prompted_while_it_trains(webui, settings):
    settings |= {"max_train_steps": 12, "learning_rate": 3e-3}
    twin = webui.submit(**settings, output_name="twin")
    assert webui.wait(twin)["status"] == "finished"
    prompt, before = "a red ellipse <lora:early:1>", webui.sha()
    without = webui.generate("a red ellipse")
    job = webui.submit(
        **settings, output_name="early", save_steps=4, preview_steps=3, preview_prompts=["zwx, a red ellipse"]
    )
    webui.until(job, lambda one: one["step"] >= 5)
    webui.command(job, "pause")
    shown(webui, job, 4)
    assert "early" in picker(webui)
    first = webui.generate(prompt)
    assert not np.array_equal(first, without)
    step = webui.job(job)["step"]
    webui.command(job, "save-now")
    assert shown(webui, job, step)["status"] == "paused"
    second = webui.generate(prompt)
    assert not np.array_equal(second, first), "the WebUI does not go on with the earlier weights"
    webui.command(job, "resume")
    done = webui.wait(job)
    assert (done["status"], done["verified"], done["published_step"], done["warnings"]) == ("finished", True, None, [])
    last = webui.generate(prompt)
    assert not np.array_equal(last, second)
    assert same(webui.lora(twin), webui.lora(job)), "neither previews nor prompts nor saves change what is learned"
    assert np.array_equal(webui.generate("a red ellipse"), without) and webui.sha() == before


def test_a_cancelled_training_leaves_what_was_saved_last(webui, settings):
    job = webui.submit(**settings | {"max_train_steps": 200}, output_name="cancelled", save_steps=4)
    shown(webui, job, 4)
    webui.command(job, "stop")
    done = webui.wait(job)
    kept = done["published_step"]
    assert done["status"] == "stopped" and kept % 4 == 0 and done["published"] == "cancelled"
    without, drawn = webui.generate("a circle"), webui.generate("a circle <lora:cancelled:1>")
    assert not np.array_equal(drawn, without)
