"""Where the parts of A1111's model lie: on the device all the time, or there one at a time (--medvram)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_trainer.host.a1111.model import HostModel
from lora_trainer.host.lending import PARTS, PartedLentModel

CPU = torch.device("cpu")


class Residence:
    """Brings the host's weights to the device when they are needed, and remembers where they belong.

    With --medvram the WebUI keeps its parts in main memory and moves one at a time to the device, by hooks of its own
    modules, which ours never call. Ours get hooks that do the same. Text encoders that learn stay beside the UNet:
    their gradients are computed after it, with their weights.

    device: where the host computes.
    rebind: called with the part's name after it was moved, and whether it is on the device now.
    """

    def __init__(self, webui: Any, host: HostModel, device: torch.device, rebind: Callable[[str, bool], None]):
        self._webui, self._host, self._device, self._rebind = webui, host, device, rebind
        self._hooks: list[Any] = []
        self._text_learns = False
        self._spare: frozenset[str] = frozenset()  # parts that make room during our turns
        self._parked = False  # they are in main memory now
        self._sent_away: list[Any] = []  # the host's other models
        self._was_parked = not self.one_at_a_time and not self._on_device("unet")

    @property
    def one_at_a_time(self) -> bool:
        return bool(self._host.sd_model.lowvram)

    def follow(self, host: HostModel) -> None:
        """The host made another model object of our checkpoint."""
        self._host = host

    def enter(self) -> None:
        """The host's model is where the turn needs it."""
        if self.one_at_a_time:
            if not self._hooks:  # the model is built next, from main memory, from where its hooks call the parts
                self._send_to_memory()
            return
        if not all(self._on_device(part) for part in PARTS):
            # The user unloaded it, which moves it to main memory.
            self._webui.sd_models.send_model_to_device(self._host.sd_model)
        self._park()

    def attach(self, model: PartedLentModel) -> None:
        """From now on the model's parts call their weights to the device when they run."""
        if not self.one_at_a_time:
            return
        decoder = model.vae.post_quant_conv or model.vae.decoder.conv_in
        first_layers = [("unet", model.unet), ("vae", model.vae.encoder.conv_in), ("vae", decoder)]
        first_layers += [("text_encoders", encoder) for encoder in model.text_encoders]
        for part, module in first_layers:
            self._hooks.append(module.register_forward_pre_hook(self._caller(part)))

    def make_room(self, needed: frozenset[str]) -> None:
        """Send away what no step needs: the host's other models until ``give_back``, the parts of ours that are not
        ``needed`` during each turn."""
        sd_models = self._webui.sd_models
        for sd_model in sd_models.model_data.loaded_sd_models:
            if sd_model is not self._host.sd_model and not sd_model.lowvram and self._is_here(sd_model):
                self._sent_away.append(sd_model)
                sd_models.send_model_to_cpu(sd_model)
        if not self.one_at_a_time:
            self._spare = PARTS - needed
            self._park()
        self._webui.devices.torch_gc()

    def leave(self, somebody_waits: bool) -> None:
        """The host finds its parts where it left them. Memory is freed only for somebody: moving the weights back and
        forth at every step would cost more."""
        self.unpark()
        if somebody_waits and self._device != CPU:
            if self.one_at_a_time:
                self._evict()
            self._webui.devices.torch_gc()

    def give_back(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        sd_models = self._webui.sd_models
        if self.one_at_a_time:
            self._send_to_memory()
        elif self._was_parked:
            sd_models.send_model_to_cpu(self._host.sd_model)
        else:
            self.unpark()
        for sd_model in self._sent_away:
            if sd_model in sd_models.model_data.loaded_sd_models:
                sd_models.send_model_to_device(sd_model)
        self._sent_away.clear()

    def _caller(self, part: str) -> Callable[[nn.Module, tuple], None]:
        def call(module: nn.Module, inputs: tuple) -> None:
            if part == "text_encoders":
                self._text_learns = torch.is_grad_enabled()
            if not self._on_device(part):
                self._evict(keep="text_encoders" if part == "unet" and self._text_learns else None)
                root = self._host.roots[part]
                root.to(self._device)
                self._webui.lowvram.module_in_gpu = root  # so that the host's next module sends it away
                self._rebind(part, True)

        return call

    def _evict(self, keep: str | None = None) -> None:
        self._send_to_memory(keep)
        for part in PARTS - {keep}:
            self._rebind(part, False)  # an alias would keep the memory that the host has just left

    def _send_to_memory(self, keep: str | None = None) -> None:
        """Every part to main memory, but one that is on the device and is to stay there."""
        lowvram, roots = self._webui.lowvram, self._host.roots
        if keep is not None and lowvram.module_in_gpu is roots[keep]:
            lowvram.module_in_gpu = None
        lowvram.send_everything_to_cpu()
        for part in PARTS - {keep}:
            if self._device in self._host.devices(part):
                roots[part].to(CPU)

    def _park(self) -> None:
        self._parked = True
        for part in self._spare:
            self._host.roots[part].to(CPU)

    def unpark(self) -> None:
        """The host finds its parts where it left them."""
        if self._parked:
            for part in self._spare:
                self._host.roots[part].to(self._device)
        self._parked = False

    @property
    def has_vae(self) -> bool:
        """Whether the host's VAE is on the device although parts are there one at a time: no hook will call ours."""
        return self.one_at_a_time and self._on_device("vae")

    def _on_device(self, part: str) -> bool:
        """As a whole."""
        return self._host.devices(part) == {self._device}

    def _is_here(self, sd_model: nn.Module) -> bool:
        return any(parameter.device == self._device for parameter in sd_model.parameters())
