"""The settings of a short run on a tiny base."""

from __future__ import annotations

import pytest

from tests.pictures import draw_dataset


@pytest.fixture
def settings(tmp_path, tiny_base):
    return {
        "train_data_dir": str(draw_dataset(tmp_path / "圆 盘 pictures", 5, lambda i: (64, 64) if i % 2 else (96, 64))),
        "base_model": str(tiny_base),
        "output_dir": str(tmp_path / "out"),
        "output_name": "disc",
        "resolution": 64,
        "bucket_step": 32,
        "lora_rank": 4,
        "batch_size": 2,
        "epochs": 2,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "save_precision": "fp32",
        "tensorboard": False,
    }
