"""A step may not launch more kernels, or keep more memory, than it did when these budgets were written."""

from __future__ import annotations

import pytest

from lora_trainer.devices import torch_version
from tests.benchmarks.count_step import KINDS, Case, count
from tests.tiny import SD1, SDXL, sd1_shapes, sdxl_shapes

pytestmark = pytest.mark.skipif(torch_version() < (2, 4), reason="fake tensors of this torch take no generators")

# One resnet a level, two of two transformer blocks: every kind of layer, few of them.
SMALL = {
    "sd1": Case("sd1", sd1_shapes(**{**SD1, "mult": (1, 2), "depths": (1, 0), "layers": 1}), 256),
    "sdxl": Case("sdxl", sdxl_shapes(**{**SDXL, "mult": (1, 2), "depths": (0, 2), "layers": 1}), 256),
}
BUDGETS = {
    ("sd1", "lora"): (750, 9100),
    ("sd1", "lora dropout"): (830, 10640),
    ("sd1", "locon"): (960, 10820),
    ("sd1", "dora"): (1210, 9100),
    ("sd1", "lokr"): (1360, 8040),
    ("sdxl", "lora"): (1106, 8970),
    ("sdxl", "lora half checkpointing"): (1370, 2330),
}
"""Kernels, and KiB that autograd keeps."""


@pytest.mark.parametrize("family, kind", BUDGETS)
def test_budget(family, kind):
    """The passes forwards and backwards: what clips and updates differs from one release of torch to another."""
    counter = count(SMALL[family], KINDS[kind])
    phases = counter.launches_by("phase")
    launches, kept = BUDGETS[family, kind]
    assert phases["forward"] + phases["backward"] <= launches
    assert counter.kept <= kept * 1024
