"""What the builtin Lora extensions of the WebUIs have in common: one list of files, known by their names."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class HostLoras(ABC):
    """What the Lora extension keeps in ``networks``. Everything here is done in a turn."""

    @property
    def networks(self) -> Any:
        """The extension's module ``networks``; None where the builtin extension is disabled."""
        return sys.modules.get("networks")

    @abstractmethod
    def unmerge(self, sd_model: Any) -> Any:
        """Leave the model's own weights in it, whatever LoRAs were merged; true when there were some."""

    @abstractmethod
    def forget(self, sd_model: Any, name: str, processing: Any) -> None:
        """Drop a LoRA's weights from memory, from the model and from encoded prompts."""

    @abstractmethod
    def unmatched(self, sd_model: Any, path: Path) -> list[str]:
        """Layers named in a LoRA file for which the extension's own loader finds no place in the model."""

    def obstacle(self, sd_model: Any) -> str | None:
        """Why the WebUI, as it is set, draws no picture of this model with any LoRA, and what to do about it."""
        return None

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
        entry = FileOnDisk(name, str(path))
        networks.available_networks[name] = networks.available_network_aliases[name] = entry
        try:
            yield
        finally:
            for table in (networks.available_networks, networks.available_network_aliases, networks.networks_in_memory):
                table.pop(name, None)
            networks.loaded_networks[:] = [net for net in networks.loaded_networks if net.name != name]


@dataclass
class FileOnDisk:
    """What the extensions read of a ``NetworkOnDisk``. The real one would leave its hash and metadata in the WebUI's
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
