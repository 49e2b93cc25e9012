"""Devices and autocast, as every release of torch has them."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor


def torch_version() -> tuple[int, int]:
    """Major and minor."""
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def is_compiling() -> bool:
    """Whether torch.compile is tracing what is called."""
    return hasattr(torch.compiler, "is_compiling") and torch.compiler.is_compiling()


def gpu_count() -> int:
    """How many GPUs torch sees that several processes can share the work of a run on. Asking initializes nothing."""
    return torch.cuda.device_count()


def indexed(device: torch.device | str) -> torch.device:
    """The device with its index: "cuda" becomes the current one, "cuda:0" say.

    To be called where a device enters the program. torch 2.1 to 2.3 ask for the index in ``torch.cuda.mem_get_info``
    and others, and ``torch.device("cuda")`` does not equal the device of a tensor that lies there.
    """
    device = torch.device(device)
    if device.index is not None or device.type == "cpu":
        return device
    return torch.empty(0, device=device).device


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that can be taken: those that nobody has, and those that torch keeps for later. device:
    with its index."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@overload
def to_device(tensor: None, device: torch.device) -> None: ...


@overload
def to_device(tensor: Tensor, device: torch.device) -> Tensor: ...


def to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Copy without making the CPU wait for the GPU, which takes pinned memory; elsewhere than on CUDA it waits."""
    if tensor is None or device.type == "cpu":
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # MPS may read memory of the CPU after it was let go of


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
