"""Detects what a host changed in its weights between two turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

_SAMPLES = 64  # values looked at per tensor: merged LoRAs and other checkpoints differ nearly everywhere

Place = tuple[int, int, torch.device, torch.dtype, int]


def place(tensor: Tensor) -> Place:
    """Object, address, device, number format and write counter of a tensor: cheap, and equal only if nobody wrote."""
    version = 0 if tensor.is_inference() else tensor._version  # inference tensors count no writes
    return id(tensor), tensor.data_ptr(), tensor.device, tensor.dtype, version


class WeightSnapshot:
    """Addresses and sampled values of a model's tensors, taken when they were last known to be right."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._places: dict[str, Place] = {}
        self._contents = contents(tensors, tensors)
        self.settle(tensors)

    def moved(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors that are not where they were, or were written to."""
        return [name for name, tensor in tensors.items() if self._places.get(name) != place(tensor)]

    def altered(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
        """Those of ``names`` whose values are not what they were. The same values in a finer format are the same."""
        return [name for name, content in contents(tensors, names).items() if self._contents.get(name) != content]

    def rounded(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> bool:
        """Whether the values of ``names`` are what they were, rounded to fp16 or bf16."""
        for name, content in contents(tensors, names).items():
            dtype, before = tensors[name].dtype, self._contents.get(name)
            if before is None or dtype not in (torch.float16, torch.bfloat16):
                return False
            values = torch.from_numpy(np.frombuffer(before, np.float32).copy())
            if values.to(dtype).float().numpy().tobytes() != content:
                return False
        return True

    def take(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Take the values of ``names`` as the right ones from now on."""
        self._contents.update(contents(tensors, names))

    def settle(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these addresses as the right ones from now on."""
        self._places = {name: place(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def contents(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, bytes]:
    """Evenly spread values of each tensor, fetched from a device in one go."""
    names = list(names)
    samples = []
    for name in names:
        flat = tensors[name].detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float())
    if not samples:
        return {}
    # A device is asked once, not once a tensor. Tensors of one model may lie on several.
    devices = {sample.device for sample in samples}
    found: dict[str, bytes] = {}
    for device in devices:
        here = [(name, sample) for name, sample in zip(names, samples) if sample.device == device]
        values = torch.cat([sample for _, sample in here]).cpu().numpy()
        ends = np.cumsum([len(sample) for _, sample in here])
        for (name, _), part in zip(here, np.split(values, ends[:-1])):
            found[name] = part.tobytes()
    return found
