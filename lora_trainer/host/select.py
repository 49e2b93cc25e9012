"""Which host this process is."""

from __future__ import annotations

import inspect
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
    sd_models = sys.modules.get("modules.sd_models")
    if sd_models is None:
        raise UserError("This is no Stable Diffusion WebUI.", remedy="Start it with: python -m lora_trainer ui")
    memory = sys.modules.get("backend.memory_management")
    if memory is not None and hasattr(sd_models, "forge_model_reload"):
        if "hard_memory_preservation" not in inspect.signature(memory.load_models_gpu).parameters:
            raise _unknown("This descendant of Forge manages memory in another way than Forge")
        from lora_trainer.host.forge.host import ForgeHost

        return ForgeHost()
    if memory is not None or "ldm_patched.modules.model_management" in sys.modules:
        raise _unknown("This WebUI (reForge, or an early or classic Forge) keeps its models in another way than Forge")
    from lora_trainer.host.a1111.host import A1111Host

    return A1111Host()


def _unknown(what: str) -> UserError:
    return UserError(
        f"{what}, and the LoRA trainer was not made for it.",
        remedy="Use Forge or AUTOMATIC1111's WebUI, or train with: python -m lora_trainer ui",
    )
