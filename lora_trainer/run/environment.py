"""What a run was computed with: releases and device, kept beside its curves."""

from __future__ import annotations

import json
import platform
import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

import lora_trainer
from lora_trainer.files import atomic_write
from lora_trainer.run.outputs import Outputs

_PACKAGES = ("diffusers", "transformers", "safetensors", "bitsandbytes")


def environment(device: torch.device, precision: str) -> dict[str, str]:
    """By name, for people. Nothing of it names a place or a person."""
    found = {"lora_trainer": lora_trainer.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["device"] = _device_name(device)
    found["mixed_precision"] = precision
    return found


def write_environment(outputs: Outputs, device: torch.device, precision: str) -> None:
    found = environment(device, precision)
    atomic_write(outputs.environment, json.dumps(found, ensure_ascii=False, indent=2) + "\n")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        named = None
    return f"cpu ({named[1] if named else platform.processor() or platform.machine()})"
