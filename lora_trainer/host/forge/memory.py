"""Where the parts of Forge's model lie: its memory manager moves them, we ask it for what a turn needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lora_trainer.host.forge.loras import holds_loras, load_without_loras

EVERYTHING = 1e30
"""Bytes to free, as Forge itself writes it."""


class Residence:
    """Has Forge load the parts of the model that are needed, without LoRAs, and keep room beside them.

    reserve: bytes of the device that a turn takes beside the weights. At first what Forge itself reckons for a batch
    of two at the model's own resolution, later what turns were seen to take.
    """

    def __init__(self, memory_management: Any, latents: tuple[int, int, int, int]):
        """latents: shape of those of two pictures of the model's own size."""
        self._memory, self._latents = memory_management, latents
        self._seen: tuple[int, ...] = ()
        self._reserve: int | None = None
        self._before = 0

    def enter(self, patchers: dict[str, Any], parts: Iterable[str]) -> None:
        """Load these parts unless nothing happened since they were loaded."""
        needed = [patchers[part] for part in ("text_encoders", "vae", "unet") if part in parts]
        if not self._is_settled(needed):
            unet = patchers["unet"]
            if self._reserve is None:
                self._reserve = int(unet.memory_required(self._latents))
            load_without_loras(self._memory, needed, memory_required=self._reserve)
            self._seen = self._loaded()
        if (device := self._memory.get_torch_device()).type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def make_room(self, patchers: dict[str, Any], parts: Iterable[str]) -> None:
        """Unload all but these parts. Forge loads again what it needs for its next picture."""
        needed = {id(patchers[part]) for part in parts}
        keep = [entry for entry in self._memory.current_loaded_models if id(entry.model) in needed]
        with torch.inference_mode():
            self._memory.free_memory(EVERYTHING, self._memory.get_torch_device(), keep)
        self._memory.soft_empty_cache(True)
        self._seen = self._loaded()

    def leave(self) -> None:
        """Learn from the turn that ends how much one takes."""
        if (device := self._memory.get_torch_device()).type == "cuda" and self._reserve is not None:
            self._reserve = max(self._reserve, torch.cuda.max_memory_allocated(device) - self._before)

    def _is_settled(self, needed: list[Any]) -> bool:
        """Whether Forge loaded and unloaded nothing since, and holds these parts without LoRAs."""
        loaded = {id(entry.model) for entry in self._memory.current_loaded_models}
        if self._seen != self._loaded() or not all(id(patcher) in loaded for patcher in needed):
            return False
        return not any(holds_loras(patcher) for patcher in needed)

    def _loaded(self) -> tuple[int, ...]:
        # Not the objects: Forge unloads what nobody else refers to.
        return tuple(id(entry.model) for entry in self._memory.current_loaded_models)
