"""The step that is tried before anything is encoded for long: what it finds, and that nothing of it stays."""

from __future__ import annotations

import hashlib
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer import plugins
from lora_trainer.errors import UserError
from lora_trainer.models.families.unet.model import DiffusionModel
from lora_trainer.run import engine
from lora_trainer.training.callbacks import TrainCommands
from lora_trainer.training.objectives.diffusion import DiffusionObjective
from tests.language_models import tiny_language_model, write_rows
from tests.pictures import draw_dataset
from tests.run.runs import Listener, run


@pytest.fixture
def settings(tmp_path, tiny_base):
    return {
        "train_data_dir": str(draw_dataset(tmp_path / "data", 5, lambda index: (64, 64))),
        "base_model": str(tiny_base),
        "output_dir": str(tmp_path / "out"),
        "output_name": "disc",
        "resolution": 64,
        "lora_rank": 2,
        "target_modules": ["attn2"],
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "tensorboard": False,
        "export_diffusers": False,
    }


def weights_digest(path):
    """SHA-256 of what lies behind the header: the metadata in it holds the time of day."""
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def encoded(listener):
    return [(name, total) for name, done, total in listener.phases if name == "latents"]


@pytest.mark.parametrize("changes", [
    {"caption_dropout": 0.3, "dropout": 0.2, "module_dropout": 0.2, "shuffle_tags": True, "random_crop": True},
    {"train_text_encoder": True, "ema_decay": 0.9, "dora": True, "batch_size": 2, "gradient_accumulation_steps": 2},
])  # fmt: skip
def test_the_lora_is_the_same_with_and_without_it(settings, tmp_path, monkeypatch, changes):
    listener = Listener()
    torch.manual_seed(7)
    before, drawn = torch.get_rng_state(), random.getstate()
    tried = run(settings, listener, **changes)
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == drawn
    assert ("trying", 0, 0) in listener.phases and not listener.warnings
    monkeypatch.setattr(engine, "try_one_step", lambda trainer, adapters: True)
    untried = run(settings, output_dir=str(tmp_path / "untried"), **changes)
    assert weights_digest(tried.lora) == weights_digest(untried.lora)


def test_it_encodes_one_batch_alone_the_largest_and_is_left_out_of_a_resumed_run(settings, monkeypatch):
    sizes = []
    predict = DiffusionModel.predict

    def look(model, noisy_latents, *arguments):
        sizes.append((torch.is_grad_enabled(), tuple(noisy_latents.shape)))
        return predict(model, noisy_latents, *arguments)

    monkeypatch.setattr(DiffusionModel, "predict", look)
    images = []
    encode = DiffusionModel.encode_images
    monkeypatch.setattr(
        DiffusionModel, "encode_images", lambda model, pixels: images.append(len(sizes)) or encode(model, pixels)
    )
    commands = TrainCommands()
    whole = {"batch_size": 2, "max_train_steps": 3}  # all pictures
    run(settings, Listener(lambda report: commands.stop_and_save()), commands, **whole)
    assert sizes[0] == (True, (2, 4, 8, 8)), "of the batches with two pictures and with one"
    assert images == [0, 0, 1, 1, 1], "two pictures before the step that is tried, the others after it"
    again = Listener()
    run(settings, again, **whole)
    assert not any(name == "trying" for name, _, _ in again.phases) and len(again.steps) == 2


def test_nothing_is_tried_where_everything_is_encoded(settings):
    run(settings)
    listener = Listener()
    run(settings, listener, lora_rank=3, output_name="again")
    assert not any(name == "trying" for name, _, _ in listener.phases) and len(listener.steps) == 2
    drawn = Listener()
    run(settings, drawn, preview_prompts=["a disc"], lora_rank=1, output_name="drawn")
    names = [name for name, _, _ in drawn.phases]
    assert names.index("trying") < names.index("previews"), "the base's previews may take minutes"
    cropped = Listener()
    run(settings, cropped, random_crop=True, output_name="cropped")
    assert any(name == "trying" for name, _, _ in cropped.phases), "an epoch's crops are encoded before its steps"


def test_a_model_that_gives_no_number_ends_the_run_before_the_pictures_are_encoded(settings, monkeypatch):
    tried = []

    def broken(model, noisy_latents, *arguments):
        tried.append(len(noisy_latents))
        return noisy_latents.requires_grad_() * float("nan")

    monkeypatch.setattr(DiffusionModel, "predict", broken)
    listener = Listener()
    with pytest.raises(UserError, match="2 batches were tried, and none of them gave a finite loss") as caught:
        run(settings, listener)
    assert caught.value.field == "base_model" and len(tried) == 2 and not encoded(listener) and not listener.steps


def test_one_batch_without_a_number_is_no_reason_to_end(settings, monkeypatch):
    loss, calls = DiffusionObjective.loss, []

    def sometimes(objective, inputs):
        calls.append(1)
        return loss(objective, inputs) * (float("nan") if len(calls) == 1 else 1)

    monkeypatch.setattr(DiffusionObjective, "loss", sometimes)
    listener = Listener()
    assert run(settings, listener).status == "finished" and not listener.warnings


def test_memory_that_does_not_suffice_ends_the_run_before_the_pictures_are_encoded(settings, monkeypatch):
    def full(objective, inputs):
        raise MemoryError("CUDA out of memory")

    monkeypatch.setattr(DiffusionObjective, "loss", full)
    listener = Listener()
    with pytest.raises(UserError, match="memory does not suffice for step 1, with one picture") as caught:
        run(settings, listener)
    assert caught.value.field == "resolution" and not encoded(listener)


def built_with(monkeypatch, change):
    """From now on ``change(adapters)`` is done to the adapters that a run has built."""
    build = engine.AdapterSet.build

    def changed(*arguments):
        adapters = build(*arguments)
        change(adapters)
        return adapters

    monkeypatch.setattr(engine.AdapterSet, "build", changed)


def bypass(adapter):
    adapter.forward = lambda x: adapter.base(x)


@pytest.mark.parametrize("encoded_before", [False, True])
def test_a_layer_outside_of_the_computation_is_named(settings, monkeypatch, encoded_before):
    if encoded_before:
        run(settings, output_name="before")
    built_with(monkeypatch, lambda adapters: bypass(next(iter(adapters.items()))[1]))
    listener = Listener()
    assert run(settings, listener).status == "finished"
    (warning,) = listener.warnings
    assert warning.startswith("1 of ") and "get no gradient" in warning and "unet.down_blocks.0" in warning


def test_gradients_are_judged_by_the_first_step_that_has_a_loss(settings, monkeypatch):
    """A preserved picture has none at first: the target is what the model gives."""
    run(settings, output_name="before", max_train_steps=3)
    built_with(monkeypatch, lambda adapters: bypass(next(iter(adapters.items()))[1]))
    loss, calls = DiffusionObjective.loss, []

    def none_at_first(objective, inputs):
        calls.append(1)
        return loss(objective, inputs) * (len(calls) > 1)

    monkeypatch.setattr(DiffusionObjective, "loss", none_at_first)
    listener = Listener()
    run(settings, listener, max_train_steps=3)
    assert listener.steps[0].loss == 0 and any("get no gradient" in warning for warning in listener.warnings)


def test_a_loss_that_depends_on_no_layer_ends_the_run(settings, monkeypatch):
    built_with(monkeypatch, lambda adapters: [bypass(adapter) for _, adapter in adapters.items()])
    listener = Listener()
    with pytest.raises(UserError, match="depends on no layer") as caught:
        run(settings, listener, target_modules=["to_out"])  # which no joint product computes
    assert caught.value.field == "target_modules" and not encoded(listener)


@pytest.mark.parametrize("encoded_before", [False, True])
def test_layers_whose_gradient_is_zero_end_the_run(settings, monkeypatch, encoded_before):
    if encoded_before:
        run(settings, output_name="before")
    loss = DiffusionObjective.loss
    monkeypatch.setattr(
        DiffusionObjective, "loss", lambda *arguments: 0 * loss(*arguments) + loss(*arguments).detach()
    )
    with pytest.raises(UserError, match="no layer got a gradient"):
        run(settings)


@pytest.mark.parametrize("encoded_before", [False, True])
def test_a_loss_of_a_plugin_that_fails_is_named(settings, tmp_path, monkeypatch, encoded_before):
    monkeypatch.setattr(plugins, "_registered", {})
    if encoded_before:
        run(settings, output_name="before")
    file = tmp_path / "mine.py"
    file.write_text(
        "from lora_trainer import plugins\n\n"
        "@plugins.register('loss', 'halved')\n"
        "def halved(difference, c):\n    return difference.no_such_thing()\n"
    )
    plugins.load([file])
    listener = Listener()
    with pytest.raises(UserError, match="it failed with halved: AttributeError") as caught:
        run(settings, listener, loss="halved", plugins=[str(file)])
    assert caught.value.field == "loss" and not encoded(listener) and not listener.steps


def test_rows_of_text_are_tried_too_and_learned_as_without_it(tmp_path, monkeypatch):
    settings = {
        "base_model": str(tiny_language_model(tmp_path / "base")),
        "train_data_dir": str(write_rows(tmp_path / "rows.jsonl")),
        "output_dir": str(tmp_path / "tried"),
        "output_name": "ward",
        "lora_rank": 2,
        "batch_size": 2,
        "max_train_steps": 2,
        "dropout": 0.2,
        "chat_template": "plain",
        "tensorboard": False,
    }
    listener = Listener()
    tried = run(settings, listener)
    assert ("trying", 0, 0) in listener.phases and not [text for text in listener.warnings if "gradient" in text]
    monkeypatch.setattr(engine, "try_one_step", lambda trainer, adapters: True)
    untried = run(settings, output_dir=str(tmp_path / "untried"))
    assert weights_digest(tried.lora) == weights_digest(untried.lora)


def test_a_language_model_without_a_number_is_not_told_of_a_vae(tmp_path):
    base = tiny_language_model(tmp_path / "base")
    weights = load_file(str(base / "model.safetensors"))
    weights["model.embed_tokens.weight"].fill_(math.nan)
    save_file(weights, str(base / "model.safetensors"), {"format": "pt"})
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = {"base_model": str(base), "train_data_dir": str(rows), "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"The model is damaged: choose another base_model\."):
        run({**settings, "chat_template": "plain"})
