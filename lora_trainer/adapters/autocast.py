"""Autocast, as every release of torch has it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast computes on this kind of device; None where autocast is off."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    # torch before 2.4 has one pair of functions for the CPU and one for everything else.
    if device.type == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, operations compute in the formats of what they are given."""
    # Not every kind of device knows autocast; one that has it switched on does.
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
