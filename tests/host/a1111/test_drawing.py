"""Previews drawn by A1111, and LoRAs published to it, in the fake: what they leave and what they say."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from lora_trainer.errors import UserError
from lora_trainer.host.base import Card, PreviewRequest
from tests.host.conftest import make_lora, sha

REQUEST = PreviewRequest("a cat", width=64, height=64, steps=2)


def test_drawing_leaves_no_trace(a1111, webui, lora):
    webui.generate("my own prompt")
    webui.shared.state.interrupted = True
    state, options = dict(vars(webui.shared.state)), dict(webui.shared.opts.data)
    before, prompts = sha(webui), list(webui.processing.StableDiffusionProcessing.cached_c)
    schedule = webui.model.alphas_cumprod
    a1111.draw(dataclasses.replace(REQUEST, lora=lora))
    assert sha(webui) == before
    assert webui.shared.state.current_latent is None
    assert vars(webui.shared.state) == state | {"current_latent": None}
    assert webui.shared.opts.data == options
    assert webui.processing.StableDiffusionProcessing.cached_c == prompts
    assert webui.model.alphas_cumprod is schedule
    assert (webui.folder / "params.txt").read_text() == "my own prompt"
    assert webui.shared.cmd_opts.no_prompt_history is False
    networks = webui.networks
    assert not (networks.available_networks or networks.available_network_aliases or networks.networks_in_memory)
    assert not networks.loaded_networks


def test_a_preview_leaves_no_copy_of_the_weights(a1111, webui, lora):
    def copies():
        return sum(vars(layer).get("network_weights_backup") is not None for layer in webui.model.modules())

    a1111.draw(dataclasses.replace(REQUEST, lora=lora))
    assert not copies()
    a1111.publish(lora, "cat", Card())
    picture = webui.generate("a <lora:cat:1>")
    kept = copies()
    a1111.draw(dataclasses.replace(REQUEST, lora=lora))
    assert copies() == kept > 0, "what the WebUI copied for the user's prompts is the WebUI's"
    assert webui.generate("a <lora:cat:1>").tobytes() == picture.tobytes()


def test_a_picture_somebody_interrupted_is_none(a1111, webui, monkeypatch):
    draw = webui.processing.process_images_inner

    def interrupted(p):
        webui.shared.state.interrupted = True
        return draw(p)

    monkeypatch.setattr(webui.processing, "process_images_inner", interrupted)
    with pytest.raises(UserError, match="interrupted"):
        a1111.draw(REQUEST)


def test_a_checkpoint_selected_while_a_preview_is_drawn_stays_selected(a1111, webui, monkeypatch):
    draw = webui.processing.process_images_inner
    second = next(info.title for info in webui.sd_models.checkpoints_list.values() if info.name_for_extra == "second")

    def selecting(p):  # as the settings page: at once, and loading it waits for the turn
        webui.shared.opts.data["sd_model_checkpoint"] = second
        return draw(p)

    expected = a1111.draw(REQUEST)
    monkeypatch.setattr(webui.processing, "process_images_inner", selecting)
    assert a1111.draw(REQUEST).tobytes() == expected.tobytes()
    assert webui.shared.opts.data["sd_model_checkpoint"] == second
    assert webui.loads == ["first"]


def test_a_lora_that_the_settings_add_to_every_prompt_is_not_in_previews(a1111, webui, lora):
    a1111.publish(lora, "cat", Card())
    plain = a1111.draw(REQUEST)
    webui.shared.opts.data["sd_lora"] = "cat"
    assert a1111.draw(REQUEST).tobytes() == plain.tobytes()
    assert webui.shared.opts.data["sd_lora"] == "cat"


def test_a_lora_published_again_is_drawn_with_its_new_weights(a1111, webui, models, lora, tmp_path):
    a1111.publish(lora, "cat", Card())
    plain, old = webui.generate("a"), webui.generate("a <lora:cat:1>")
    newer = make_lora(models / "first.safetensors", tmp_path / "newer.safetensors", 0.3, seed=9)
    a1111.publish(newer, "cat", Card(), overwrite=True)
    assert webui.processing.StableDiffusionProcessing.cached_c == [None, None]
    new = webui.generate("a <lora:cat:1>")
    assert new.tobytes() not in (old.tobytes(), plain.tobytes())
    assert webui.generate("a").tobytes() == plain.tobytes()


def test_layers_without_a_place_are_named(a1111, webui, models, tmp_path):
    foreign = make_lora(models / "third.safetensors", tmp_path / "foreign.safetensors", 0.1, base_name="gone.ckpt")
    assert any(name.startswith("lora_unet_input_blocks") for name in load_file(foreign))
    verdict = a1111.verify(a1111.publish(foreign, "foreign", Card()), "zwx")
    assert "no place" in verdict and "lora_unet_" in verdict


def test_a_lora_is_verified_on_the_model_it_was_trained_on(a1111, webui, models, tmp_path):
    before, options = sha(webui), dict(webui.shared.opts.data)
    foreign = make_lora(models / "third.safetensors", tmp_path / "foreign.safetensors", 0.1)
    assert a1111.verify(a1111.publish(foreign, "foreign", Card()), "zwx") is None
    assert webui.loads == ["first", "third", "first"]
    assert (sha(webui), webui.shared.opts.data) == (before, options)


def test_a_verification_that_was_interrupted_says_so(a1111, webui, lora, monkeypatch):
    def interrupted(p):
        webui.shared.state.interrupted = True
        return SimpleNamespace(images=[])

    path = a1111.publish(lora, "cat", Card())
    monkeypatch.setattr(webui.processing, "process_images_inner", interrupted)
    assert "not checked" in a1111.verify(path, "zwx")
