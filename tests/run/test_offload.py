"""Whole runs with ``offload_blocks`` on a pretended GPU make what runs without it make, to the last bit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.config import from_mapping
from lora_trainer.run import file_lender, train
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


def run(settings, folder, stop=None, **changes):
    """The LoRA and the last preview, None where there are none yet."""
    config, commands = from_mapping({**settings, "output_dir": str(folder), **changes}), TrainCommands()
    result = train(config, file_lender(config), callbacks=StopsAfter(commands, stop), commands=commands)
    pictures = sorted(folder.rglob("*.png"))
    return result, pictures[-1].read_bytes() if pictures else None


@pytest.mark.parametrize("form", ["nf4", pytest.param("stored", marks=pytest.mark.slow)])
def test_a_run_with_blocks_in_main_memory_its_previews_and_how_it_is_gone_on_with(settings, tmp_path, form):
    with pretended_gpu() as gpu, pretended_streams():
        whole, drawn = run(settings, tmp_path / "whole", base_precision=form)
        changes = {"base_precision": form, "offload_blocks": 4}
        begun, _ = run(settings, tmp_path / "parts", stop=1, **changes)
        assert (begun.status, begun.step) == ("stopped", 1)
        ended, drawn_in_parts = run(settings, tmp_path / "parts", **{**changes, "offload_blocks": 2})
        assert (ended.status, ended.step) == ("finished", 2) and gpu.peak > 0
    expected, found = load_file(str(whole.lora)), load_file(str(ended.lora))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert drawn is not None and drawn == drawn_in_parts
    assert any(tensor.abs().max() > 1e-3 for name, tensor in expected.items() if "lora_up" in name)
