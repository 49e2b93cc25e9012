"""Whole runs on a pretended GPU: nothing is left on the CPU, and the LoRA is the one that a CPU makes."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from lora_trainer.config import from_mapping
from lora_trainer.run import file_lender, train
from lora_trainer.training.callbacks import TrainCallbacks
from tests.devices import assert_alike, pretended_gpu
from tests.pictures import draw_dataset

ADAPTERS = {
    "lora": {"conv_rank": 2, "dropout": 0.1, "rank_dropout": 0.1, "ema_decay": 0.9},
    "dora": {"dora": True, "conv_rank": 2, "min_snr_gamma": 5.0, "loss": "huber"},
    "loha": {"adapter": "loha", "noise_offset": 0.1, "multires_noise_iterations": 2, "input_perturbation": 0.1},
    "lokr": {"adapter": "lokr", "dropout": 0.1, "use_masks": True},
    "text": {"train_text_encoder": True, "gradient_checkpointing": True, "caption_dropout": 0.3},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("placement")
    return {
        "train_data_dir": str(draw_dataset(folder / "pictures", 4, lambda index: (64, 64))),
        "base_model": str(tiny_base),
        "output_name": "disc",
        "resolution": 64,
        "lora_rank": 2,
        "batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "save_precision": "fp32",
        "tensorboard": False,
        "export_diffusers": False,
    }


def run(settings, folder, **changes):
    config = from_mapping({**settings, "output_dir": str(folder), **changes})
    return load_file(str(train(config, file_lender(config), callbacks=TrainCallbacks()).lora))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_on_a_gpu_makes_what_a_run_on_the_cpu_makes(settings, tmp_path, name):
    with pretended_gpu() as gpu:
        there = run(settings, tmp_path / "gpu", mixed_precision="no", **ADAPTERS[name])
        assert gpu.peak > 0
    here = run(settings, tmp_path / "cpu", device="cpu", **ADAPTERS[name])
    assert_alike(there, here)
