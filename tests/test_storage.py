"""Frozen weights reach the computation through one door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from lora_trainer import storage
from lora_trainer.adapters.lora import LoraAdapter
from lora_trainer.models.casting import cast_layers

PACKAGE = Path(storage.__file__).parent


def test_a_weight_that_fits_is_not_copied():
    stored = torch.nn.Parameter(torch.randn(4, 6))
    dense = storage.dense_weight(stored, torch.float32)
    assert dense.data_ptr() == stored.data_ptr() and not dense.requires_grad


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_other_formats_and_shapes(stored):
    weight = torch.randn(4, 6, 1, 1).to(stored)
    dense = storage.dense_weight(weight, torch.float32, (4, 6))
    assert dense.dtype == torch.float32 and torch.equal(dense, weight.float().view(4, 6))


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(6, 4), lambda: torch.nn.Conv2d(6, 4, 3, padding=1)])
def test_layers_and_adapters_compute_with_what_it_gives(make, stored, monkeypatch):
    """A new number format is one change: all of them see it."""
    layer = make().requires_grad_(False)
    layer.weight.data = layer.weight.data.to(stored)
    cast_layers(layer, torch.float32)
    x = torch.randn(2, 6) if isinstance(layer, torch.nn.Linear) else torch.randn(2, 6, 5, 5)
    for module in ("lora_trainer.models.casting", "lora_trainer.adapters.fused", "lora_trainer.adapters.base"):
        monkeypatch.setattr(f"{module}.dense_weight", lambda *given: 2 * storage.dense_weight(*given))
    doubled = make().requires_grad_(False)
    doubled.weight.data, doubled.bias.data = 2 * layer.weight.data.float(), layer.bias.data
    adapter = LoraAdapter(layer, 2, 2.0)
    assert torch.allclose(layer(x), doubled(x), atol=1e-5)
    assert torch.allclose(adapter(x.requires_grad_()), doubled(x), atol=1e-5)
    assert torch.allclose(adapter.base_weight(), doubled.weight.view(adapter.shape))


def test_no_other_code_casts_a_frozen_weight():
    """``….weight.to(…)`` and the bare name ``weight.to(…)`` in the layers' and the adapters' code."""
    found = []
    for path in (*(PACKAGE / "adapters").glob("*.py"), PACKAGE / "models" / "casting.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to"):
                continue
            owner = node.func.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            arguments = ast.unparse(node)
            if name == "weight" and "dtype" in arguments:
                found.append(f"{path.name}: {arguments}")
    assert not found
