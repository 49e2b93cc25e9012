"""Memory of the device: what is in use, and what a run could take."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_trainer.host.base import Host


def memory_in_use(device: torch.device) -> int | None:
    """Bytes in use on a GPU by everybody, or by this process on the CPU; None where it cannot be told."""
    torch = sys.modules.get("torch")
    if torch is not None and device.type == "cuda" and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * mmap.PAGESIZE


def kept_for_later(device: torch.device) -> int:
    """Bytes that torch has freed and keeps: in use to everybody else, and the first that a run takes."""
    torch = sys.modules.get("torch")
    if device.type != "cuda" or torch is None:
        return 0
    return int(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def free_memory(host: Host) -> int | None:
    """Bytes that a run could take on the host's device beside what lies there now; None where that is not known."""
    torch = sys.modules.get("torch")
    device = host.device()
    if torch is not None and device.type == "cuda" and torch.cuda.is_initialized():
        return int(torch.cuda.mem_get_info(device)[0]) + kept_for_later(device)
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(available) * 1024 if available else None
