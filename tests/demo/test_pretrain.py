"""The script that made the embedded base: it goes on where it stopped, and writes what is shipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lora_trainer.demo import base, networks, pretrain, shapes
from lora_trainer.models.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def small_batch(monkeypatch):
    monkeypatch.setattr(pretrain, "BATCH", 2)


@pytest.fixture(scope="module")
def masks():
    return pretrain.draw_masks(2, seed=0)


def new_run(folder: Path) -> pretrain.Pretraining:
    return pretrain.Pretraining(folder, load_tokenizer(), seed=0)


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(tmp_path, masks):
    undisturbed = new_run(tmp_path)
    undisturbed.train_step(masks, 0.0)
    undisturbed.save()
    resumed = new_run(tmp_path)
    resumed.load()
    losses = [run.train_step(masks, 0.1)[0] for run in (undisturbed, resumed)]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.parameters, resumed.parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.ema, resumed.ema, strict=True))


def test_it_exports_what_is_shipped(tmp_path):
    run = new_run(tmp_path)
    run.export(tmp_path / "base.safetensors")
    made, shipped = load_file(tmp_path / "base.safetensors"), load_file(base.SHIPPED)
    assert {name: (t.shape, t.dtype) for name, t in made.items()} == {n: (t.shape, t.dtype) for n, t in shipped.items()}
    assert made[base.EMBEDDING_IDS].tolist() == shipped[base.EMBEDDING_IDS].tolist()


def test_the_word_star_is_never_trained_and_never_used(tmp_path, masks):
    run = new_run(tmp_path)
    star = int(run.captions([shapes.NEW_SHAPE])[0, 1])
    assert star not in run.known
    assert star not in run.unknown
    seen = [pretrain.make_batch(masks, run.captions, run.unknown, np.random.default_rng(i))["ids"] for i in range(200)]
    assert star not in torch.cat(seen)


def test_batches_hold_what_their_masks_show(tmp_path, masks):
    batch = pretrain.make_batch(masks, new_run(tmp_path).captions, [0], np.random.default_rng(0))
    assert batch["latents"].shape == (2, 4, 16, 16)
    assert batch["ids"].shape == (2, networks.CONTEXT_LENGTH)
    assert ((batch["timesteps"] >= 0) & (batch["timesteps"] < 1000)).all()


def test_padding_starts_out_carrying_the_words():
    """What makes the text heard early: at the start, padding already tells two captions apart."""
    text = networks.new_text_encoder()
    captions = pretrain.Captions(load_tokenizer())
    with torch.no_grad():
        states = text(captions(["a red circle", "a blue square"])).last_hidden_state[:, -1]
    distance = (states[0] - states[1]).norm() / states.norm(dim=-1).mean()
    assert distance > 0.2
