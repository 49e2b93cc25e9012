"""Whole runs with ``gradient_checkpointing`` in all its forms make the same LoRA, and say what was chosen."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.config import TrainConfig, from_mapping
from lora_trainer.models import checkpoint
from lora_trainer.models.base import Room
from lora_trainer.models.families import meta_model
from lora_trainer.run import file_lender, train
from lora_trainer.run.workloads.image_model import OfImageModel
from lora_trainer.training.callbacks import TrainCallbacks
from lora_trainer.training.forecast import base_bytes, learning_bytes, step_bytes
from lora_trainer.training.precision import resolve
from tests.devices import pretended_gpu
from tests.pictures import draw_dataset


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("checkpointing")
    return {
        "train_data_dir": str(draw_dataset(folder / "pictures", 2, lambda index: (64, 64))),
        "base_model": str(tiny_base),
        "cache_dir": str(folder / "cache"),
        "output_name": "disc",
        "resolution": 64,
        "lora_rank": 2,
        "dropout": 0.1,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "save_precision": "fp32",
        "mixed_precision": "no",
        "tensorboard": False,
        "export_diffusers": False,
    }


def run(settings, folder, **changes):
    """The LoRA and what was told."""
    config, callbacks, told = from_mapping({**settings, "output_dir": str(folder), **changes}), TrainCallbacks(), []
    callbacks.on_warning = told.append
    return load_file(str(train(config, file_lender(config), callbacks=callbacks).lora)), told


def test_the_lora_is_the_same_however_much_is_computed_anew(settings, tmp_path):
    expected, _ = run(settings, tmp_path / "none", device="cpu")
    assert any(tensor.abs().max() > 1e-3 for name, tensor in expected.items() if "lora_up" in name)
    for value in (0.5, True, "auto"):
        found, told = run(settings, tmp_path / str(value), device="cpu", gradient_checkpointing=value)
        assert not told, "nothing is decided on the CPU"
        assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_on_a_gpu_says_how_many_parts_it_computes_anew(settings, tmp_path, monkeypatch):
    with pretended_gpu():
        _, told = run(settings, tmp_path / "roomy", gradient_checkpointing="auto")
        assert not [text for text in told if "checkpointing" in text], "all fits"
        monkeypatch.setattr(checkpoint, "free_memory", lambda device: 1_000)
        _, told = run(settings, tmp_path / "tight", gradient_checkpointing="auto")
    (said,) = [text for text in told if "checkpointing" in text]
    parts, total = map(int, re.match(r"Gradient checkpointing of (\d+) of (\d+) parts of the model", said).groups())
    assert parts == total > 10


def test_what_lies_on_the_device_already_needs_no_room(settings):
    """As in a WebUI, whose lender says what its model takes."""
    config = from_mapping({**settings, "gradient_checkpointing": "auto"})
    with pretended_gpu():
        lender = file_lender(config)
        info, precision = lender.describe(), resolve("auto", "no")
        model = meta_model(info.architecture)
        beside = learning_bytes(model.targets, config) + step_bytes(model, (64, 64), config, precision)
        weights = int(sum(base_bytes(model, TrainConfig(), precision).values()))
        shares = []
        for room in (Room(int(1.3 * beside), weights, True), Room(int(1.3 * beside), 0, True), None):
            lender.room = lambda room=room: room
            placed = OfImageModel(config, lender, info, (64, 64)).placed(config, TrainCallbacks())
            shares.append(placed.gradient_checkpointing)
    assert shares == [0, 1, False]
