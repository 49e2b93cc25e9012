"""The WebUI's builtin Lora extension: taking merged LoRAs out of the host's weights, and handing it new ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_trainer.host.lending import loaded_model
from lora_trainer.host.loras import FileOnDisk, HostLoras, forget_prompts


class A1111Loras(HostLoras):
    """It merges LoRAs into the host's weights in place, when a layer next runs, and leaves them merged; each layer
    remembers in ``network_current_names`` what is merged into it.
    """

    def __init__(self, webui: Any):
        self._webui = webui

    def unmerge(self, sd_model: Any) -> list[Any]:
        """Restore the weights of every layer that a LoRA is merged into; returns these layers.

        ``loaded_networks`` stays: the extension needs it to drop a LoRA's bundled embeddings, and merges again when a
        layer next runs.
        """
        layers = [layer for layer in _layers(sd_model) if _merged(layer)]
        with torch.no_grad():
            for layer in layers:
                self.networks.network_restore_weights_from_backup(layer)
                layer.network_current_names = ()
        return layers

    def merge(self, layers: Iterable[Any]) -> None:
        """Merge into these layers what the extension has loaded, as it would do by itself when they next run."""
        with torch.no_grad():
            for layer in layers:
                self.networks.network_apply_weights(layer)

    def forget(self, sd_model: Any, name: str, processing: Any) -> None:
        networks = self.networks
        if networks is None:
            return
        networks.networks_in_memory.pop(name, None)
        for net in [net for net in networks.loaded_networks if net.name == name]:
            networks.loaded_networks.remove(net)
        merged = {entry[0] for layer in _layers(sd_model) for entry in _merged(layer)}
        if name in merged:
            self.unmerge(sd_model)
        forget_prompts(processing)

    @contextmanager
    def registered(self, name: str, path: Path) -> Iterator[None]:
        # The extension copies a layer's weights before it merges a LoRA, and keeps the copy as long as the model: what
        # it copied for us alone is a second model in memory for nothing.
        bare = [layer for layer in _layers(loaded_model(self._webui)) if not _has_copy(layer)]
        try:
            with super().registered(name, path):
                yield
        finally:
            for layer in bare:
                if _has_copy(layer) and not _merged(layer):
                    layer.network_weights_backup = layer.network_bias_backup = None

    def unmatched(self, sd_model: Any, path: Path) -> list[str]:
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            stems = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118 - not a dict
        net = self.networks.load_network(path.stem, FileOnDisk(path.stem, str(path)))
        found = {module.network_key.partition(".")[0] for module in net.modules.values()}
        return sorted(stems - found)


def _merged(layer: Any) -> tuple:
    return vars(layer).get("network_current_names", ())  # getattr is slow where a module has none


def _has_copy(layer: Any) -> bool:
    return vars(layer).get("network_weights_backup") is not None


def _layers(sd_model: Any) -> Iterable[Any]:
    return getattr(sd_model, "network_layer_mapping", {}).values()
