"""SD 3 medium, and in Forge SD 3.5 medium, FLUX.1 dev and schnell and Chroma, in a real WebUI: see ``flow``."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.webui.flow import PICTURE, POINTERS, TRANSFORMERS, flow_webui, taken, weights, whole
from tests.webui.server import FORGE, OVER

FAMILIES = ["sd3", "sd35", "flux", "schnell", "chroma"] if FORGE else ["sd3"]


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    (folder / "models").mkdir()
    for family in FAMILIES:
        save_file(whole(family, weights(family)), str(folder / "models" / f"{family}-small.safetensors"))
    with flow_webui(folder / "webui", folder / "models") as server:
        yield server


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_is_trained_on_what_is_loaded_and_the_webui_reads_it(webui, settings, family):
    (title,) = (one for one in webui.checkpoints() if one.startswith(f"{family}-"))
    webui.select(title)
    plain, before = webui.generate("a circle", **PICTURE), webui.sha()
    assert plain.std() > 0, "NaN is drawn as black"
    settings |= {
        "train_text_encoder": False, "resolution": "64", "max_train_steps": 150,
        "preview_prompts": ["zwx, a red ellipse --w 64 --h 64 --s 2"], "preview_steps": 150,
    }  # fmt: skip
    job = webui.submit(**settings, base_model=title, output_name=family)
    found = webui.until(job, lambda job: job["step"] >= 2 or job["status"] in OVER)
    assert found["status"] == "running", found
    assert webui.probe(POINTERS) == {"bound": len(TRANSFORMERS[family]), "copied": []}
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain), "drawn with the weights as they were lent"
    assert webui.job(job)["status"] == "running"
    done = webui.wait(job)
    assert done["status"] == "finished" and done["verified"] and done["thumbnail"], done
    previews = [np.asarray(Image.open(one)) for one in sorted(webui.lora(job).parent.rglob("*.png"))]
    assert previews and all(one.std() > 0 for one in previews)
    assert webui.sha() == before
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain)
    with_lora = webui.generate(f"a circle <lora:{family}:1>", **PICTURE)
    assert with_lora.std() > 0 and not np.array_equal(with_lora, plain)
    layers = sum(".lora_up." in key for key in load_file(webui.lora(job)))
    assert layers and taken(webui, family) == (layers, 0)
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain), "taken out again"
    assert webui.sha() == before
