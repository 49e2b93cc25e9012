"""Whole runs with ``offload_blocks`` on a pretended GPU make what runs without it make, to the last bit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.config import from_mapping
from lora_trainer.models import checkpoint
from lora_trainer.run import file_lender, train
from lora_trainer.run.workloads.image_model import OfImageModel
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from tests import flux as tiny
from tests.devices import pretended_gpu
from tests.pictures import draw_dataset
from tests.streams import pretended_streams


class StopsAfter(TrainCallbacks):
    def __init__(self, commands: TrainCommands, step: int | None):
        self._commands, self._step = commands, step

    def on_step(self, report):
        if report.step == self._step:
            self._commands.stop_and_save()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    return {
        **tiny.tiny_flux(folder / "base", double=1, single=3),
        "train_data_dir": str(draw_dataset(folder / "pictures", 2, lambda index: (64, 64))),
        "cache_dir": str(folder / "cache"),
        "output_name": "disc",
        "resolution": "64",
        "lora_rank": 2,
        "target_modules": ["feed_forward", "linear2"],
        "gradient_checkpointing": True,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "save_precision": "fp32",
        "mixed_precision": "no",
        "tensorboard": False,
        "export_diffusers": False,
        "preview_prompts": ["a red circle --s 2"],
    }


def run(settings, folder, stop=None, told=None, **changes):
    """The LoRA and the last preview, None where there are none yet. told: gets the warnings."""
    config, commands = from_mapping({**settings, "output_dir": str(folder), **changes}), TrainCommands()
    callbacks = StopsAfter(commands, stop)
    callbacks.on_warning = ([] if told is None else told).append
    result = train(config, file_lender(config), callbacks=callbacks, commands=commands)
    pictures = sorted(folder.rglob("*.png"))
    return result, pictures[-1].read_bytes() if pictures else None


@pytest.mark.parametrize("form", ["nf4", pytest.param("stored", marks=pytest.mark.slow)])
def test_a_run_with_blocks_in_main_memory_its_previews_and_how_it_is_gone_on_with(
    settings, tmp_path, form, monkeypatch
):
    with pretended_gpu() as gpu, pretended_streams():
        told: list[str] = []
        whole, drawn = run(settings, tmp_path / "whole", base_precision=form, told=told)
        assert not [text for text in told if "blocks" in text], "all of it fits"
        changes = {"base_precision": form, "offload_blocks": 4}
        begun, _ = run(settings, tmp_path / "parts", stop=1, **changes)
        assert (begun.status, begun.step) == ("stopped", 1)
        monkeypatch.setattr(checkpoint, "free_memory", lambda device: 1_000)  # all blocks have to wait
        ended, drawn_in_parts = run(settings, tmp_path / "parts", **{**changes, "offload_blocks": "auto"}, told=told)
        assert (ended.status, ended.step) == ("finished", 2) and gpu.peak > 0
        assert [text for text in told if text.startswith("4 of 4 blocks of the base model wait in main memory")]
    expected, found = load_file(str(whole.lora)), load_file(str(ended.lora))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert drawn is not None and drawn == drawn_in_parts
    assert any(tensor.abs().max() > 1e-3 for name, tensor in expected.items() if "lora_up" in name)


def test_without_gradient_checkpointing_it_is_said_what_could_wait(settings):
    config, told = from_mapping({**settings, "gradient_checkpointing": False}), []
    with pretended_gpu(memory=1_000):
        lender = file_lender(config)
        run = OfImageModel(config, lender, lender.describe(), (64, 64))
        callbacks = TrainCallbacks()
        callbacks.on_warning = told.append
        assert run.placed(config, callbacks).offload_blocks == lender.offload_blocks == 0
    assert len(told) == 1 and "gradient_checkpointing: true" in told[0]


@pytest.mark.parametrize("changes, device", [({"offload_blocks": 2}, "cuda"), ({}, "cpu")])
def test_it_is_not_decided_where_it_is_given_or_nothing_can_wait(settings, changes, device):
    config = from_mapping({**settings, **changes, "device": device})
    with pretended_gpu(memory=1_000):
        lender = file_lender(config)
        assert OfImageModel(config, lender, lender.describe(), (64, 64)).placed(config, TrainCallbacks()) is config
        assert lender.offload_blocks == changes.get("offload_blocks", 0)
