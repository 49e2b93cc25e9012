"""Whole runs on the card: repeatable, resumable, and within its memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.run import file_lender, train
from lora_trainer.training.callbacks import TrainCommands
from tests.gpu.conftest import GIB, card_of
from tests.pictures import draw_dataset
from tests.run.runs import Listener, assert_same_weights, run


@pytest.fixture
def deterministic(monkeypatch):
    """Kernels that add in the same order each time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def losses(output: Path) -> list[float | None]:
    lines = (output / "logs" / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if entry.get("loss", 0) != 0]


def half_way(settings, **changes):
    """The run, stopped after its third step and started again."""
    commands = TrainCommands()
    stop = Listener(lambda report: commands.stop_and_save() if report.step == 3 else None)
    assert run(settings, stop, commands, **changes).step == 3
    return run(settings, **changes)


@pytest.mark.parametrize("changes", [
    {}, {"mixed_precision": "fp16"}, {"dropout": 0.1, "shuffle_tags": True}, {"train_text_encoder": True},
], ids=["bf16", "fp16", "dropout", "text encoder"])  # fmt: skip
def test_resumed_and_repeated_runs_are_bit_identical(settings, tmp_path, changes, deterministic):
    first = run(settings, output_dir=str(tmp_path / "first"), **changes)
    second = run(settings, output_dir=str(tmp_path / "second"), **changes)
    assert_same_weights(first.lora, second.lora)
    assert_same_weights(first.lora, half_way(settings, **changes).lora)


def test_the_scaler_of_fp16_settles_and_goes_on_after_a_resume(settings, tmp_path):
    changes = {"mixed_precision": "fp16", "max_train_steps": 20, "learning_rate": 1e-4}
    listener = Listener()
    run(settings, listener, **changes)
    skipped = [report.step for report in listener.steps if report.loss is None]
    assert len(skipped) <= 4, skipped
    assert all(report.loss is not None for report in listener.steps[10:])


@pytest.mark.parametrize("optimizer, package", [
    ("adamw", "torch"), ("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("lion", "lion_pytorch"),
    ("adafactor", "transformers"),
])  # fmt: skip
def test_every_optimizer_steps_saves_and_resumes(optimizer, package, settings, tmp_path, deterministic):
    pytest.importorskip(package)
    changes = {"optimizer": optimizer, "learning_rate": 1.0 if optimizer == "prodigy" else 1e-3}
    first = run(settings, output_dir=str(tmp_path / "first"), **changes)
    assert first.step == 6 and first.loss is not None
    assert_same_weights(first.lora, half_way(settings, **changes).lora)


def full_size(tmp_path: Path, base: Path, side: int, **changes) -> dict:
    """A run of a full-size model on two pictures."""
    return {
        "train_data_dir": str(draw_dataset(tmp_path / "pictures", 2, lambda i: (side, side))),
        "base_model": str(base),
        "output_dir": str(tmp_path / "out"),
        "output_name": "full",
        "resolution": side,
        "lora_rank": 16,
        "max_train_steps": 10,
        "device": "cuda",
        "tensorboard": False,
        **changes,
    }


def test_sd1_trains_in_4_gb(sd1_file, tmp_path):
    settings = full_size(tmp_path, sd1_file, 512, gradient_checkpointing=True)
    with card_of(4):
        result = run(settings)
        print(f"SD 1.5, 512², 4 GB: peak {torch.cuda.max_memory_reserved() / GIB:.2f} GiB")
    assert result.step == 10 and result.loss is not None


def test_sdxl_trains_in_8_gb_and_draws_previews(sdxl_file, tmp_path):
    settings = full_size(
        tmp_path, sdxl_file, 1024, gradient_checkpointing=True, preview_prompts=["a disc"], preview_steps=10
    )
    listener = Listener()
    with card_of(8):
        result = run(settings, listener)
        print(f"SDXL, 1024², 8 GB: peak {torch.cuda.max_memory_reserved() / GIB:.2f} GiB, {listener.warnings}")
    assert result.step == 10 and result.loss is not None


def test_a_full_card_ends_in_a_sentence_with_the_state_saved_and_the_memory_back(sdxl_file, tmp_path):
    """More than any measure saves: the weights alone leave nothing."""
    before = torch.cuda.memory_allocated()
    with card_of(5.5), pytest.raises(UserError) as caught:
        run(full_size(tmp_path, sdxl_file, 1024))
    assert caught.value.remedy
    del caught
    gc.collect()  # a step and its graphs refer to each other
    assert torch.cuda.memory_allocated() - before < 64 * 2**20


def test_sdxl_pictures_are_encoded_in_fp32_and_finite(sdxl_file):
    config = from_mapping({"base_model": str(sdxl_file), "device": "cuda"})
    pixels = torch.rand(1, 3, 1024, 1024) * 2 - 1
    with file_lender(config).borrow() as model:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        moments = model.encode_images(pixels.cuda())
        print(f"encoding 1024²: {(torch.cuda.max_memory_allocated() - before) / GIB:.2f} GiB")
    assert moments.dtype == torch.float32 and moments.isfinite().all()


_LOSSES = """
import json, sys
from pathlib import Path
from lora_trainer.cli import main
sys.exit(main(["train", "--config", sys.argv[1]]))
"""


def test_waiting_for_every_kernel_changes_no_loss(settings, tmp_path):
    """Nothing reads what a kernel has not yet written."""
    found = []
    for blocking in "01":
        output = tmp_path / f"blocking{blocking}"
        config = tmp_path / f"{blocking}.yaml"
        config.write_text(json.dumps({**settings, "max_train_steps": 50, "output_dir": str(output)}))
        environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": blocking, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        subprocess.run([sys.executable, "-c", _LOSSES, str(config)], check=True, env=environment)
        found.append(losses(output))
    assert len(found[0]) == 50 and found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_listening_caller_gets_the_seconds_of_each_step(settings):
    listener = Listener()
    config = from_mapping(settings)
    train(config, file_lender(config), callbacks=listener)
    assert all(report.seconds > 0 for report in listener.steps)
