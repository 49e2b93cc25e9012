"""Which host this process is."""

from __future__ import annotations

import sys
import threading

from lora_trainer.errors import UserError
from lora_trainer.host.base import Host

_host: Host | None = None
_lock = threading.Lock()


def current_host() -> Host:
    """The WebUI that this process is; always the same object, also after "Reload UI".

    Told apart by what they have, not by their names: Forge and its forks bring a backend of their own.

    Raises:
        UserError: it is none that the trainer knows.
    """
    global _host
    with _lock:
        if _host is None:
            _host = _make()
        return _host


def _make() -> Host:
    if "modules.sd_models" not in sys.modules:
        raise UserError("This is no Stable Diffusion WebUI.", remedy="Start it with: python -m lora_trainer ui")
    if "backend.memory_management" in sys.modules or "ldm_patched.modules.model_management" in sys.modules:
        raise UserError(
            "The LoRA trainer does not support this WebUI's memory management yet.",
            remedy="Use AUTOMATIC1111's WebUI, or train with: python -m lora_trainer train",
        )
    from lora_trainer.host.a1111 import A1111Host

    return A1111Host()
