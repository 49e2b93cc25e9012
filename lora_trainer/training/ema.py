"""The exponential moving average of the adapter's weights: what is saved and drawn with when ``ema_decay`` is set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ExponentialMovingAverage:
    """shadow ← d·shadow + (1−d)·weight, with d = min(decay, (1+n)/(10+n)) in step n, so that it starts quickly.

    (Polyak & Juditsky 1992; the ramp is TensorFlow's ``ExponentialMovingAverage``, ``num_updates``.)
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.decay = decay
        self.updates = 0
        self._parameters = list(parameters)
        self._shadow = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(self._shadow, [parameter.detach() for parameter in self._parameters], None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the average; afterwards, bit for bit what they held."""
        trained = [parameter.detach().clone() for parameter in self._parameters]
        self._assign(self._shadow)
        try:
            yield
        finally:
            self._assign(trained)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def restart(self) -> None:
        """Begin at what the parameters hold now."""
        self.load_state_dict({"updates": 0, "shadow": self._parameters})

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": list(self._shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for shadow, value in zip(self._shadow, state["shadow"], strict=True):
            shadow.copy_(value)
