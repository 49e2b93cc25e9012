"""Where the parts of A1111's model lie: on the device all the time, or there one at a time (--medvram)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_trainer.host.a1111.model import HostModel
from lora_trainer.models.families.unet.model import DiffusionModel

CPU = torch.device("cpu")


class Residence:
    """Brings the host's weights to the device when they are needed, and remembers where they belong.

    With --medvram the WebUI keeps its parts in main memory and moves one at a time to the device, by hooks of its own
    modules, which ours never call. Ours get hooks that do the same.

    rebind: called with the part's name after it was moved.
    """

    def __init__(self, webui: Any, host: HostModel, rebind: Callable[[str], None]):
        self._webui, self._host, self._rebind = webui, host, rebind
        self._hooks: list[Any] = []
        self._was_parked = not self.one_at_a_time and not self._on_device("unet")

    @property
    def one_at_a_time(self) -> bool:
        return bool(self._host.sd_model.lowvram)

    def follow(self, host: HostModel) -> None:
        """The host made another model object of our checkpoint."""
        self._host = host

    def enter(self) -> None:
        """The host's model is where the turn needs it."""
        if not self.one_at_a_time and not all(self._on_device(part) for part in ("unet", "vae", "text_encoders")):
            # The user unloaded it, which moves it to main memory.
            self._webui.sd_models.send_model_to_device(self._host.sd_model)

    def attach(self, model: DiffusionModel) -> None:
        """From now on the model's parts call their weights to the device when they run."""
        if not self.one_at_a_time:
            return
        first_layers = [("unet", model.unet), ("vae", model.vae.encoder.conv_in), ("vae", model.vae.post_quant_conv)]
        first_layers += [("text_encoders", encoder) for encoder in model.text_encoders]
        for part, module in first_layers:
            self._hooks.append(module.register_forward_pre_hook(self._caller(part)))

    def leave(self, somebody_waits: bool) -> None:
        """Memory is freed only for somebody: moving the weights back and forth at every step would cost more."""
        if somebody_waits and self._webui.devices.device != CPU:
            if self.one_at_a_time:
                self._evict()
            self._webui.devices.torch_gc()

    def give_back(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.one_at_a_time:
            self._webui.lowvram.send_everything_to_cpu()
        elif self._was_parked:
            self._webui.sd_models.send_model_to_cpu(self._host.sd_model)

    def _caller(self, part: str) -> Callable[[nn.Module, tuple], None]:
        def call(module: nn.Module, inputs: tuple) -> None:
            if not self._on_device(part):
                self._evict()
                root = self._host.roots[part]
                root.to(self._webui.devices.device)
                self._webui.lowvram.module_in_gpu = root  # so that the host's next module sends it away
                self._rebind(part)

        return call

    def _evict(self) -> None:
        self._webui.lowvram.send_everything_to_cpu()
        for part in self._host.roots:
            self._rebind(part)  # an alias would keep the memory that the host has just left

    def _on_device(self, part: str) -> bool:
        wanted = self._webui.devices.device
        device = self._host.device(part)
        return device.type == wanted.type and (wanted.index is None or device.index == wanted.index)
