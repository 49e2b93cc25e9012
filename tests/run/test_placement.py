"""Whole runs on a pretended GPU: nothing is left on the CPU, and the LoRA is the one that a CPU makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import from_mapping
from lora_trainer.host.base import PreviewRequest
from lora_trainer.host.standalone import StandaloneHost
from lora_trainer.jobs.execution import lender_options
from lora_trainer.run import file_lender, train
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.preview import sample
from tests.devices import assert_alike, pretended_gpu
from tests.flux import tiny_flux
from tests.pictures import draw_dataset

ADAPTERS = {
    "lora": {"conv_rank": 2, "dropout": 0.1, "rank_dropout": 0.1, "ema_decay": 0.9, "channels_last": "auto"},
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


def run(settings, folder, callbacks=None, commands=None, **changes):
    config = from_mapping({**settings, "output_dir": str(folder), **changes})
    result = train(config, file_lender(config), callbacks=callbacks or TrainCallbacks(), commands=commands)
    return load_file(str(result.lora)) if result.lora else None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("lora", "text") else pytest.mark.slow) for name in ADAPTERS]
)
def test_a_run_on_a_gpu_makes_what_a_run_on_the_cpu_makes(settings, tmp_path, name):
    with pretended_gpu() as gpu:
        there = run(settings, tmp_path / "gpu", mixed_precision="no", **ADAPTERS[name])
        assert gpu.peak > 0
    here = run(settings, tmp_path / "cpu", device="cpu", **ADAPTERS[name])
    assert_alike(there, here)


CHANGES = {
    "words": {"task": "words", "original_prompt": "a circle", "target_prompt": "a square", "both_ways": True,
              "protected_prompts": ["a ring"], "denoised_steps": 3, "train_data_dir": ""},
    "pair": {"task": "pair", "pair_mask": True},
    "copier": {"task": "pair", "pair_method": "copier", "copy_steps": 1, "dropout": 0.1},
    "slider": {"task": "slider"},
}  # fmt: skip


def change(name, settings, folder):
    """The settings of a kind of change, with the pictures that it needs."""
    changes, pictures = dict(CHANGES[name]), sorted(Path(settings["train_data_dir"]).glob("*.png"))
    if changes.get("task") not in ("pair", "slider"):
        return changes
    folder.mkdir()
    for number, picture in enumerate(pictures):
        pair = f"{number // 2}{'_after' if number % 2 else ''}.png"
        (folder / (pair if changes["task"] == "pair" else picture.name)).write_bytes(picture.read_bytes())
    if changes["task"] == "slider":
        changes |= {"opposite_dir": settings["train_data_dir"], "default_caption": "a disc"}
    return {**changes, "train_data_dir": str(folder)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "pair" else pytest.mark.slow) for name in CHANGES]
)
def test_a_change_is_learned_on_a_gpu_as_on_the_cpu(settings, tmp_path, name):
    changes = change(name, settings, tmp_path / "pictures")
    with pretended_gpu() as gpu:
        there = run(settings, tmp_path / "gpu", mixed_precision="no", **changes)
        assert gpu.peak > 0
    assert_alike(there, run(settings, tmp_path / "cpu", device="cpu", **changes))


KEPT = {"preserve": 0.5, "trigger_word": "zwx", "validation_share": 0.3, "validation_steps": 1, "shuffle_tags": True}
DRAWN = {"preserve": 0.5, "trigger_word": "zwx", "preserve_pictures": 2}


@pytest.mark.parametrize(
    ("device", "kept"), [("mps", KEPT), ("mps", DRAWN), pytest.param("cuda:0", KEPT, marks=pytest.mark.slow)]
)
def test_what_is_preserved_and_measured_on_a_gpu(settings, tmp_path, device, kept):
    with pretended_gpu(device):
        there = run(settings, tmp_path / "gpu", mixed_precision="no", device=device, **kept)
    assert_alike(there, run(settings, tmp_path / "cpu", device="cpu", **kept))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["words", "copier"])
def test_a_change_is_learned_in_fp16(settings, tmp_path, name):
    """fp16: the adapters' working copies take part, and GradScaler."""
    with pretended_gpu():
        made = run(settings, tmp_path / "gpu", mixed_precision="fp16", **change(name, settings, tmp_path / "pictures"))
    assert all(tensor.isfinite().all() for tensor in made.values())
    assert any(tensor.abs().max() > 0 for key, tensor in made.items() if "lora_up" in key)


def test_a_model_that_cannot_be_recorded_as_a_cuda_graph_is_not_tried(settings, tmp_path, caplog):
    """The pretended GPU refuses to record, as CUDA does; a refusal would not leave CUDA as it was."""
    base = tiny_flux(tmp_path / "base", double=1, single=1)
    with pretended_gpu(memory=64 << 30), caplog.at_level("INFO", "lora_trainer.training.graphs"):
        run({**settings, **base}, tmp_path / "gpu", mixed_precision="no", cuda_graphs="auto", max_train_steps=5)
    assert [record.getMessage() for record in caplog.records if "graphs" in record.name] == [
        "CUDA graphs are not used: this kind of model cannot be recorded."
    ]


class Stop(TrainCallbacks):
    def __init__(self, commands):
        self._commands = commands

    def on_step(self, report):
        self._commands.stop_and_save()


@pytest.mark.slow
def test_a_run_on_a_gpu_is_gone_on_with(settings, tmp_path):
    """fp16: adapters, AdamW's state, GradScaler and the average are put where they were."""
    changes = {"mixed_precision": "fp16", "ema_decay": 0.9}
    with pretended_gpu():
        whole = run(settings, tmp_path / "whole", **changes)
        commands = TrainCommands()
        run(settings, tmp_path / "parts", Stop(commands), commands, **changes)
        assert_alike(run(settings, tmp_path / "parts", **changes), whole)
    cached = [load_file(str(path)) for path in (tmp_path / "whole" / "cache").rglob("*.cache")]
    captions = [tensors["context"] for tensors in cached if "context" in tensors]
    assert captions and {context.dtype for context in captions} == {torch.float16}, "as the UNet reads them"


def test_a_picture_is_drawn_on_a_gpu(settings):
    config = from_mapping({**settings, "output_dir": "unused", "mixed_precision": "fp16"})
    with pretended_gpu():
        lender = file_lender(config)
        with lender.borrow() as model, lender.turn():
            drawn = sample(model, "a disc", width=64, height=64, steps=2)
    assert drawn.size == (64, 64)


@pytest.mark.parametrize("form", ["stored", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_cell_of_a_grid_is_drawn_on_a_gpu_as_on_the_cpu(tmp_path, form):
    """With a LoRA that is merged where the weights are: they are not copied to main memory for it."""
    base = tiny_flux(tmp_path / "base", double=1, single=1)
    config = from_mapping({**base, "train_data_dir": "x", "base_precision": form, "mixed_precision": "no"})
    lora = make_lora(config, tmp_path / "lora.safetensors")
    request = PreviewRequest("a disc", base["base_model"], width=64, height=64, steps=2, lora=lora)

    def draw(device):
        host = StandaloneHost(tmp_path, device=device)
        (picture,) = host.draw_all([request], lender_options(host, replace(config, device=device)))
        return np.asarray(picture).astype(int)

    with pretended_gpu() as gpu:
        drawn = draw("cuda")
        assert not [wait for wait in gpu.waits if "at _changed" in wait or "at unpack" in wait]
    expected = draw("cpu")
    assert abs(drawn - expected).max() <= 1 and expected.std() > 1


def make_lora(config, path):
    with file_lender(config).borrow() as model:
        adapters = AdapterSet.build(model.lora_targets(), config)
        for _, adapter in adapters.items():
            adapter.lora_up.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        save_file(adapters.export(), str(path))
    return path


class Waits(TrainCallbacks):
    """How often the CPU has waited for the GPU at the end of each step."""

    def __init__(self, gpu):
        self._gpu, self.at = gpu, []

    def on_step(self, report):
        self.at.append(len(self._gpu.waits))


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 35),
    reason="this transformers' causal mask makes the CPU wait by itself",
)
def test_the_cpu_does_not_wait_for_each_micro_batch(settings, tmp_path):
    """Noise, timesteps and token ids are copied from pinned memory."""
    waits = {}
    for micro_batches in (1, 2):
        with pretended_gpu() as gpu:
            seen = Waits(gpu)
            run(
                settings, tmp_path / str(micro_batches), seen, mixed_precision="no", train_text_encoder=True,
                batch_size=1, gradient_accumulation_steps=micro_batches,
            )  # fmt: skip
            waits[micro_batches] = gpu.waits[seen.at[0] : seen.at[1]]
    assert len(waits[2]) == len(waits[1]) <= 2, waits
