"""Memory of the device: what is in use, and what a run could take."""

from __future__ import annotations

import logging
import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_trainer.host.base import Host

log = logging.getLogger(__name__)


def memory_in_use(device: torch.device) -> int | None:
    """Bytes in use on a GPU by everybody, or by this process on the CPU; None where it is not known."""
    if device.type == "cpu":
        return _process_memory()
    found = _cuda_memory(device)
    return None if found is None else found[1] - found[0]


def kept_for_later(device: torch.device) -> int:
    """Bytes that torch has freed and keeps: in use to everybody else, and the first that a run takes."""
    if _cuda_memory(device) is None:
        return 0
    cuda = sys.modules["torch"].cuda
    return int(cuda.memory_reserved(device) - cuda.memory_allocated(device))


def free_memory(host: Host) -> int | None:
    """Bytes that a run could take on the host's device beside what lies there now; None where that is not known."""
    device = host.device()
    if device.type == "cpu":
        return _available_memory()
    found = _cuda_memory(device)
    return None if found is None else found[0] + kept_for_later(device)


def _cuda_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a CUDA device, free and all; None for other devices, and before CUDA is in use. Raises nothing: no run
    and no page may fail because a driver does not answer."""
    torch = sys.modules.get("torch")
    if device.type != "cuda" or torch is None or not torch.cuda.is_initialized():
        return None
    try:
        # torch 2.1 to 2.3 want an index, and a WebUI's device may have none.
        free, total = torch.cuda.mem_get_info(torch.cuda.current_device() if device.index is None else device.index)
    except RuntimeError as error:
        log.warning("The memory of %s is not known: %s", device, error)
        return None
    return int(free), int(total)


def _process_memory() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * mmap.PAGESIZE


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(available) * 1024 if available else None
