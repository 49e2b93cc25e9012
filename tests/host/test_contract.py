"""What every host promises. Runs against all of them."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_trainer.errors import UserError
from lora_trainer.host.base import AccessPolicy, Card, PreviewRequest
from lora_trainer.models.checkpoint import FileLender
from tests.host.conftest import OPTIONS, make_lora

REQUEST = PreviewRequest("a cat", checkpoint="first", width=64, height=64, steps=2, seed=3)
CARD = Card("zwx, **red**", 0.7, "A cat.", "20 steps", "dog", "SD1", Image.new("RGB", (64, 48), "red"))


def answer(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return model.predict(latents, torch.tensor([500]), model.encode_prompts(["a red cat"]), None)


def test_the_list_names_every_checkpoint_once(host, models):
    listed = host.checkpoints()
    assert {checkpoint.path.stem for checkpoint in listed} == {"first", "second", "third"}
    assert len({checkpoint.title for checkpoint in listed}) == 3
    assert sum(checkpoint.loaded for checkpoint in listed) <= 1
    assert [checkpoint for checkpoint in listed if checkpoint.selected] == [one for one in [host.selected()] if one]


def test_a_checkpoint_is_found_by_title_path_and_stem(host, models):
    second = next(checkpoint for checkpoint in host.checkpoints() if checkpoint.path.stem == "second")
    for name in (second.title, str(second.path), "second", "second.safetensors"):
        assert host.lender(name, OPTIONS).describe().name == "second"


def test_an_unknown_checkpoint_is_refused_with_a_remedy(host):
    with pytest.raises(UserError) as error:
        host.lender("no such model", OPTIONS)
    assert error.value.field == "base_model" and error.value.remedy


@pytest.mark.parametrize("name, value, remedy", [
    ("base_precision", "nf4", "Use stored"), ("offload_blocks", 2, "Use auto"),
])  # fmt: skip
def test_what_only_flow_models_from_files_can_is_refused(host, name, value, remedy):
    with pytest.raises(UserError) as caught:
        host.lender("first", dataclasses.replace(OPTIONS, **{name: value})).describe()
    assert caught.value.field == name and remedy in caught.value.remedy


@pytest.mark.parametrize("name, family", [("first", "sd1"), ("third", "sdxl")])
def test_describing_says_what_is_lent(host, models, name, family):
    lender = host.lender(name, OPTIONS)
    described = lender.describe()
    assert (described.family, described.prediction_type, described.name) == (family, "epsilon", name)
    assert described.path == models / f"{name}.safetensors"
    with lender.borrow() as model:
        assert model.info == described
    assert lender.model_hash() == FileLender(models / f"{name}.safetensors").model_hash()


def test_several_pictures_are_those_that_are_drawn_one_by_one(host, models, tmp_path):
    lora = make_lora(models / "second.safetensors", tmp_path / "cat.safetensors", 0.1)
    requests = [dataclasses.replace(REQUEST, checkpoint="second", lora=one) for one in (None, lora)]
    host.draw(REQUEST)  # a WebUI has the first one loaded now, or loads it again
    before = host.selected(), [one.loaded for one in host.checkpoints()]
    together = [np.asarray(picture) for picture in host.draw_all(requests)]
    alone = [np.asarray(host.draw(request)) for request in requests]
    assert [one.tobytes() for one in together] == [one.tobytes() for one in alone]
    assert together[0].tobytes() != together[1].tobytes()
    pictures = host.draw_all(requests)
    next(pictures)
    pictures.close()  # stopped after the first: what was loaded is loaded again, and nobody waits for us
    assert (host.selected(), [one.loaded for one in host.checkpoints()]) == before
    with host.spare_turn() as ours:
        assert ours


def test_a_spare_turn_is_had_only_while_nobody_computes(host):
    with host.spare_turn() as ours:
        assert ours
    with host.device_turn(), host.spare_turn() as ours:
        assert not ours
    with host.spare_turn() as ours:
        assert ours


def test_a_webuis_model_takes_memory_once_it_was_lent(host, models):
    with host.lender("first", OPTIONS).borrow():
        weights = sum(tensor.nbytes for tensor in load_file(models / "first.safetensors").values())
        expected = 0 if host.name == "standalone" else weights
        assert host.model_bytes() == pytest.approx(expected, rel=0.1)


def test_options_decide_over_what_the_file_says(host):
    options = dataclasses.replace(OPTIONS, v_prediction=True, zero_terminal_snr=True)
    with host.lender("first", options).borrow() as model:
        assert model.info.prediction_type == model.schedule.prediction_type == "v_prediction"
        assert model.schedule.alphas_cumprod[-1] == 0


def test_what_is_lent_computes_as_the_file_does(host, models):
    with FileLender(models / "first.safetensors").borrow() as model:
        expected = answer(model)
    lender = host.lender("first", OPTIONS)
    with lender.borrow() as model, lender.turn():
        assert torch.allclose(answer(model), expected, atol=1e-5)
        assert model.vae_key and model.text_key
        assert not any(parameter.requires_grad for parameter in model.bound().values())


def test_an_error_inside_comes_out_and_the_host_lends_again(host):
    lender = host.lender("first", OPTIONS)
    with pytest.raises(ZeroDivisionError), lender.borrow(), lender.turn():
        raise ZeroDivisionError
    with lender.borrow() as model, lender.turn():
        assert torch.isfinite(answer(model)).all()


def test_drawing_changes_no_random_numbers(host, lora):
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    host.draw(dataclasses.replace(REQUEST, lora=lora))
    assert (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()) == states


def test_a_picture_depends_on_the_request_and_the_lora_alone(host, models, lora, tmp_path):
    plain = host.draw(REQUEST)
    assert (plain.size, plain.mode) == ((64, 64), "RGB")
    with_lora = host.draw(dataclasses.replace(REQUEST, lora=lora))
    assert with_lora.tobytes() != plain.tobytes()
    assert host.draw(REQUEST).tobytes() == plain.tobytes()
    assert host.draw(dataclasses.replace(REQUEST, lora=lora)).tobytes() == with_lora.tobytes()
    # Other weights under the same path are other weights.
    make_lora(models / "first.safetensors", lora, 0.2, seed=5)
    assert host.draw(dataclasses.replace(REQUEST, lora=lora)).tobytes() != with_lora.tobytes()


def test_previews_come_from_the_checkpoint_that_was_asked_for(host):
    one, two = (host.draw(dataclasses.replace(REQUEST, checkpoint=name)) for name in ("first", "second"))
    assert one.tobytes() != two.tobytes()


def test_publishing_puts_file_card_and_picture_in_place(host, lora):
    path = host.publish(lora, "Katze 猫", CARD)
    assert path == host.folders().lora / "Katze 猫.safetensors" and path.read_bytes() == lora.read_bytes()
    card = json.loads(path.with_suffix(".json").read_text("utf-8"))
    assert card == {
        "description": "A cat.", "sd version": "SD1", "activation text": "zwx, **red**", "preferred weight": 0.7,
        "negative text": "dog", "notes": "20 steps",
    }  # fmt: skip
    assert Image.open(path.with_name("Katze 猫.preview.png")).size == (64, 48)
    endings = {item.name.removeprefix("Katze 猫") for item in path.parent.iterdir()}
    assert endings == {".safetensors", ".json", ".preview.png"}, "nothing temporary is left"


def test_nothing_is_overwritten_unasked(host, lora, tmp_path):
    path = host.publish(lora, "cat", CARD)
    before = path.read_bytes()
    lora.write_bytes(before + b"\0")
    for name in ("cat", "CAT"):
        with pytest.raises(UserError) as error:
            host.publish(lora, name, CARD)
        assert error.value.field == "output_name"
    assert path.read_bytes() == before
    note = json.loads(path.with_suffix(".json").read_text("utf-8")) | {"my own": "field"}
    path.with_suffix(".json").write_text(json.dumps(note), "utf-8")
    host.publish(lora, "cat", dataclasses.replace(CARD, description="Another cat."), overwrite=True)
    assert path.read_bytes() == lora.read_bytes()
    card = json.loads(path.with_suffix(".json").read_text("utf-8"))
    assert (card["description"], card["my own"]) == ("Another cat.", "field")


def test_a_lora_in_a_subfolder_has_its_name_taken_too(host, lora):
    folder = host.folders().lora / "mine"
    folder.mkdir(parents=True)
    (folder / "cat.safetensors").write_bytes(b"somebody's")
    with pytest.raises(UserError):
        host.publish(lora, "cat", CARD)
    assert host.publish(lora, "cat", CARD, overwrite=True) == folder / "cat.safetensors"
    assert not (host.folders().lora / "cat.safetensors").exists()


@pytest.mark.parametrize("name", ["", "../cat", "a/b", "con", "a:b", "none", ".hidden", "x" * 300])
def test_what_cannot_be_a_name_is_refused(host, lora, name):
    with pytest.raises(UserError) as error:
        host.publish(lora, name, CARD)
    assert error.value.field == "output_name"
    folder = host.folders().lora
    assert not folder.exists() or not list(folder.iterdir())


def test_a_published_lora_is_verified(host, models, lora, tmp_path):
    assert host.verify(host.publish(lora, "good", CARD), "zwx") is None
    neutral = make_lora(models / "first.safetensors", tmp_path / "neutral.safetensors", 0.0)
    assert isinstance(host.verify(host.publish(neutral, "neutral", CARD), "zwx"), str)


def test_the_trainers_folder_is_not_in_the_lora_folder(host):
    folders = host.folders()
    assert folders.lora.resolve() not in (folders.data.resolve(), *folders.data.resolve().parents)


def test_facts_have_their_types(host):
    assert isinstance(host.access(), AccessPolicy)
    assert isinstance(host.device(), torch.device)
    assert host.option("lora_trainer_no_such_option", "default") == "default"
    assert host.name in ("a1111", "forge", "standalone")
    host.forget("a name never used")
