"""Forge's own captioners: its memory manager brings them to the device and takes them away when it needs the room."""

from __future__ import annotations

from typing import Any

from lora_trainer.captioning.base import HostCaptioner
from lora_trainer.host.captioning import OwnBlip, OwnDeepbooru, own_captioners
from lora_trainer.host.turns import Turns


class ForgeBlip(OwnBlip):
    """What Forge's interrogator does, without CLIP."""

    def _to_device(self) -> None:
        interrogator = self._interrogator
        if interrogator.blip_model is None:
            places = {"load_device": interrogator.load_device, "offload_device": interrogator.offload_device}
            model = interrogator.load_blip_model().to(device=interrogator.offload_device, dtype=interrogator.dtype)
            interrogator.blip_model, interrogator.blip_patcher = model, self._webui.ModelPatcher(model, **places)
        self._webui.memory_management.load_models_gpu([interrogator.blip_patcher])

    def _drop(self) -> None:
        super()._drop()
        self._interrogator.blip_patcher = None  # Forge unloads what nobody refers to


class ForgeDeepbooru(OwnDeepbooru):
    def _drop(self) -> None:
        super()._drop()
        self._deepbooru.patcher = None


def forge_captioners(webui: Any, turns: Turns) -> dict[str, HostCaptioner]:
    return own_captioners(webui, ForgeBlip, ForgeDeepbooru, lambda: turns.somebody_waits)
