"""The WebUI's builtin Lora extension: taking merged LoRAs out of the host's weights, and handing it new ones."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class HostLoras:
    """What the Lora extension keeps in ``networks``. Everything here is done in a turn.

    It merges LoRAs into the host's weights in place, when a layer next runs, and leaves them merged; each layer
    remembers in ``network_current_names`` what is merged into it.
    """

    @property
    def networks(self) -> Any | None:
        return sys.modules.get("networks")  # absent where the builtin extension is disabled

    def take_out(self, sd_model: Any) -> list[Any]:
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

    def put_back(self, layers: Iterable[Any]) -> None:
        """Merge into these layers what the extension has loaded, as it would do by itself when they next run."""
        with torch.no_grad():
            for layer in layers:
                self.networks.network_apply_weights(layer)

    def forget(self, sd_model: Any, name: str, processing: Any) -> None:
        """Drop a LoRA's weights from memory, from the model and from encoded prompts."""
        networks = self.networks
        if networks is None:
            return
        networks.networks_in_memory.pop(name, None)
        for net in [net for net in networks.loaded_networks if net.name == name]:
            networks.loaded_networks.remove(net)
        merged = {entry[0] for layer in _layers(sd_model) for entry in _merged(layer)}
        if name in merged:
            self.take_out(sd_model)
        forget_prompts(processing)

    def announce(self, name: str) -> None:
        """Make the picker know a new or replaced file of this name."""
        networks = self.networks
        if networks is None:
            return
        stale = networks.available_networks.pop(name, None)
        if stale is not None:
            # Listed anew under the same alias, the extension would take the alias for one that two files claim.
            for alias in [alias for alias, entry in networks.available_network_aliases.items() if entry is stale]:
                del networks.available_network_aliases[alias]
        networks.update_available_networks_by_names([name])

    @contextmanager
    def registered(self, name: str, path: Path) -> Iterator[None]:
        """Inside, ``<lora:name:…>`` means this file, wherever it lies; afterwards no trace of it is left."""
        networks = self.networks
        entry = _FileOnDisk(name, str(path))
        networks.available_networks[name] = networks.available_network_aliases[name] = entry
        try:
            yield
        finally:
            for table in (networks.available_networks, networks.available_network_aliases, networks.networks_in_memory):
                table.pop(name, None)
            networks.loaded_networks[:] = [net for net in networks.loaded_networks if net.name != name]

    def unmatched(self, path: Path) -> list[str]:
        """Layers named in a LoRA file for which the extension's own loader finds no place in the loaded model."""
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            stems = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118 - not a dict
        net = self.networks.load_network(path.stem, _FileOnDisk(path.stem, str(path)))
        found = {module.network_key.partition(".")[0] for module in net.modules.values()}
        return sorted(stems - found)


@dataclass
class _FileOnDisk:
    """What the extension reads of a ``NetworkOnDisk``. The real one would leave its hash and metadata in the WebUI's
    cache for every preview."""

    name: str
    filename: str
    metadata: dict[str, str] = field(default_factory=dict)
    hash: str = ""
    shorthash: str = ""
    is_safetensors: bool = True

    @property
    def alias(self) -> str:
        return self.name

    def read_hash(self) -> None:
        """Nothing to read: the file is gone before anybody could look it up."""


def forget_prompts(processing: Any) -> None:
    """Encoded prompts are kept by the names of LoRAs, whatever their weights are now. All runs share these lists."""
    for owner in (processing.StableDiffusionProcessing, processing.StableDiffusionProcessingTxt2Img):
        for kept in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
            cache = getattr(owner, kept, None)
            if isinstance(cache, list):
                cache[:] = [None] * len(cache)


def _merged(layer: Any) -> tuple:
    return vars(layer).get("network_current_names", ())  # getattr is slow where a module has none


def _layers(sd_model: Any) -> Iterable[Any]:
    return getattr(sd_model, "network_layer_mapping", {}).values()
