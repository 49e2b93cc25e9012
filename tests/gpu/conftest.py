"""Tests that need an NVIDIA or AMD card: ``python -m pytest tests/gpu``, under three minutes; skipped without one.

The files of full-size models are made of random weights, drawn on the card.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.benchmarks.sides import Work, write_base
from tests.pictures import draw_dataset

GIB = 2**30


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU here"))


@pytest.fixture(autouse=True)
def _clean_card() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the models that ``tests.benchmarks.sides.write_base`` writes."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="session")
def sd1_file(bases: Path) -> Path:
    """SD 1.5's sizes, fp16 (2.1 GB)."""
    return write_base(bases, Work("sd1", mixed_precision="fp16", device="cuda"))


@pytest.fixture(scope="session")
def sdxl_file(bases: Path) -> Path:
    """SDXL's sizes, fp16 (6.9 GB)."""
    return write_base(bases, Work("sdxl", mixed_precision="fp16", device="cuda"))


@pytest.fixture(scope="session")
def tiny_file(bases: Path) -> Path:
    """SD 1's layers at a tenth of its width, fp32."""
    return write_base(bases, Work("sd1", size="tiny", mixed_precision="no", device="cuda"))


@pytest.fixture
def settings(tmp_path: Path, tiny_file: Path) -> dict:
    """A run of the tiny model on the card, five pictures of 64 px."""
    return {
        "train_data_dir": str(draw_dataset(tmp_path / "pictures", 5, lambda i: (64, 64) if i % 2 else (96, 64))),
        "base_model": str(tiny_file),
        "output_dir": str(tmp_path / "out"),
        "output_name": "disc",
        "resolution": 64,
        "bucket_step": 32,
        "lora_rank": 4,
        "batch_size": 2,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "save_precision": "fp32",
        "tensorboard": False,
        "device": "cuda",
    }


@contextmanager
def card_of(size: float) -> Iterator[None]:
    """Inside, torch gets no more than ``size`` GiB of the card's memory, and what lay unused is given back."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(size * GIB / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
