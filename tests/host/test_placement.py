"""Runs on what a WebUI lends from a pretended GPU: whole, one part at a time (--medvram), or partly (Forge)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.config import from_mapping
from lora_trainer.jobs.execution import lender_options
from lora_trainer.run import file_lender, train
from lora_trainer.training.callbacks import TrainCallbacks
from tests.devices import assert_alike, pretended_gpu
from tests.pictures import draw_dataset

CUDA = torch.device("cuda")  # A1111's has no index
ADAPTERS = {
    "lora": {"conv_rank": 2, "dropout": 0.1},
    "loha": {"adapter": "loha"},
    "text": {"train_text_encoder": True, "gradient_checkpointing": True, "dora": True},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("placement")
    return {
        "train_data_dir": str(draw_dataset(folder / "pictures", 2, lambda index: (64, 64))),
        "base_model": "",
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


@pytest.fixture(scope="module")
def on_the_cpu(settings, models, tmp_path_factory):
    """The LoRA that a run on the CPU makes, by the name of the adapter."""
    made = {}

    def lora(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            config = from_mapping({
                **settings, **ADAPTERS[name], "base_model": str(models / "first.safetensors"),
                "output_dir": str(folder), "device": "cpu",
            })  # fmt: skip
            made[name] = load_file(str(train(config, file_lender(config), callbacks=TrainCallbacks()).lora))
        return made[name]

    return lora


def run(host, settings, folder, **changes):
    config = from_mapping({**settings, "output_dir": str(folder), "mixed_precision": "no", **changes})
    lender = host.lender("", lender_options(host, config))
    return load_file(str(train(config, lender, callbacks=TrainCallbacks()).lora))


def places(model):
    return {parameter.device.type for parameter in model.parameters()}


@pytest.mark.parametrize("name", ["lora", "text"])
def test_a_run_on_what_a1111_has_on_the_device(a1111, webui, settings, on_the_cpu, tmp_path, name):
    expected = on_the_cpu(name)
    with pretended_gpu():
        webui.devices.device = CUDA
        webui.model.to(CUDA)
        assert_alike(run(a1111, settings, tmp_path, **ADAPTERS[name]), expected)
        assert places(webui.model) == {"cuda"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_with_medvram(a1111, webui, settings, on_the_cpu, tmp_path, name):
    """Adapters live where the model computes, whatever part of it is in main memory when they are made; and what is
    computed anew for the gradients finds its weights there."""
    expected = on_the_cpu(name)
    with pretended_gpu():
        webui.devices.device, webui.model.lowvram = CUDA, True
        assert_alike(run(a1111, settings, tmp_path, **ADAPTERS[name]), expected)
        assert places(webui.model) == {"cpu"}
        assert webui.lowvram.module_in_gpu is None


@pytest.mark.parametrize("name", ["lora", "text"])
def test_a_run_on_what_forge_has_partly_on_the_device(forge, fake_forge, settings, on_the_cpu, tmp_path, name):
    """Forge leaves in main memory what does not fit beside the pictures."""
    expected = on_the_cpu(name)
    with pretended_gpu() as gpu:
        fake_forge.device = gpu.device
        assert_alike(run(forge, settings, tmp_path, **ADAPTERS[name]), expected)
        assert all(places(part) == {"cuda", "cpu"} for part in fake_forge.parts())
