"""A1111's own captioners: how its interrogator and deepbooru come to its device."""

from __future__ import annotations

from typing import Any

from lora_trainer.captioning.base import HostCaptioner
from lora_trainer.host.captioning import OwnBlip, OwnDeepbooru, own_captioners
from lora_trainer.host.turns import Turns


class A1111Blip(OwnBlip):
    """With --medvram the part of the base model that lies on the device leaves it first, as for the WebUI itself."""

    def _to_device(self) -> None:
        webui, interrogator = self._webui, self._interrogator
        webui.lowvram.send_everything_to_cpu()
        if interrogator.blip_model is None:
            model = interrogator.load_blip_model()
            halved = not webui.shared.cmd_opts.no_half and not interrogator.running_on_cpu
            interrogator.blip_model = model.half() if halved else model
        interrogator.blip_model = interrogator.blip_model.to(webui.devices.device_interrogate)
        interrogator.dtype = next(interrogator.blip_model.parameters()).dtype


class A1111Deepbooru(OwnDeepbooru):
    """The same for deepbooru, whose own code forgets it."""

    def _to_device(self) -> None:
        self._webui.lowvram.send_everything_to_cpu()
        super()._to_device()


def a1111_captioners(webui: Any, turns: Turns) -> dict[str, HostCaptioner]:
    return own_captioners(webui, A1111Blip, A1111Deepbooru, lambda: turns.somebody_waits)
