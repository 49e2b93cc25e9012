"""Forge's builtin Lora extension and its patchers, which merge LoRAs by putting other parameters in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_trainer.host.lending import loaded_model
from lora_trainer.host.loras import HostLoras, forget_prompts

_UNKNOWN = "forgotten"
"""Equal to no list of LoRAs, so that Forge puts together anew what the next prompt names, be it none."""


class ForgeLoras(HostLoras):
    """What is merged is decided twice: ``current_lora_hash`` of the model says which patchers the next prompt needs,
    ``loaded_hash`` of each part's loader what its parameters hold. Both go by file name, whatever the weights are.
    """

    def __init__(self, webui: Any):
        self._webui = webui

    def unmerge(self, sd_model: Any) -> bool:
        objects = sd_model.forge_objects_original
        patchers = [patcher for patcher in (objects.unet, objects.clip.patcher) if holds_loras(patcher)]
        if patchers:
            # Loading what has no patches restores the parameters from the backup.
            with torch.inference_mode():
                self._webui.memory_management.load_models_gpu(patchers)
        return bool(patchers)

    def forget(self, sd_model: Any, name: str, processing: Any) -> None:
        self._forget_files()
        self.unmerge(sd_model)
        forget_prompts(processing)

    def _forget_files(self) -> None:
        if self.networks is not None:
            self.networks.load_lora_state_dict.cache_clear()
        sd_model = loaded_model(self._webui)
        if sd_model is not None:
            sd_model.current_lora_hash = _UNKNOWN

    @contextmanager
    def registered(self, name: str, path: Path) -> Iterator[None]:
        self._forget_files()
        try:
            with super().registered(name, path):
                yield
        finally:
            self._forget_files()

    def unmatched(self, sd_model: Any, path: Path) -> list[str]:
        # Not by Forge's own reader, which renames a file that it cannot read.
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        objects = sd_model.forge_objects_original
        _, tensors = self.networks.load_lora(tensors, self.networks.model_lora_keys_unet(objects.unet.model, {}))
        _, tensors = self.networks.load_lora(
            tensors, self.networks.model_lora_keys_clip(objects.clip.cond_stage_model, {})
        )
        return sorted({key.partition(".")[0] for key in tensors})


def holds_loras(patcher: Any) -> bool:
    """Whether LoRAs are merged into this part's parameters, or hang on its layers."""
    loader = patcher.lora_loader
    return bool(loader.backup or loader.online_backup)
