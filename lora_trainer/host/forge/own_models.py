"""Forge's own models, off the device and back, by its memory manager."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_trainer.host.clearing import OwnModels, real_tensors
from lora_trainer.host.forge.memory import EVERYTHING
from lora_trainer.host.forge.model import patchers
from lora_trainer.host.lending import loaded_model


class ForgeOwnModels(OwnModels):
    """See ``OwnModels``."""

    def __init__(self, webui: Any):
        self._webui, self._memory = webui, webui.memory_management
        self._sent_away: list[Any] = []  # patchers

    def send_away(self) -> None:
        device = self._memory.get_torch_device()
        before = [entry.model for entry in self._memory.current_loaded_models]
        with torch.inference_mode():
            self._memory.free_memory(EVERYTHING, device, [])
        self._memory.soft_empty_cache(True)
        left = {id(entry.model) for entry in self._memory.current_loaded_models}
        self._sent_away = [patcher for patcher in before if id(patcher) not in left]

    def bring_back(self) -> None:
        """Forge would load them for its next picture only."""
        sent_away, self._sent_away = self._sent_away, []
        if sent_away:
            with torch.inference_mode():
                self._memory.load_models_gpu(sent_away[::-1])  # the one that was used last stands first in its list

    def tensors(self) -> dict[str, Tensor]:
        sd_model = loaded_model(self._webui)
        if sd_model is None:
            return {}
        parts = {part: real_tensors(one.model.state_dict()) for part, one in patchers(sd_model).items()}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load_again(self) -> None:
        data = self._webui.sd_models.model_data
        if not data.forge_loading_parameters:
            self._webui.main_entry.refresh_model_loading_parameters()
        data.forge_hash = ""  # or Forge would believe that the model is still there
        self._webui.sd_models.forge_model_reload()
