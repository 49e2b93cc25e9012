"""The device of a WebUI for something else, such as a language model: its own model leaves it, and comes back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor

from lora_trainer.host.snapshot import WeightSnapshot
from lora_trainer.host.turns import Turns
from lora_trainer.models.base import Lender, ModelInfo
from lora_trainer.models.families.causal_lm.lender import LanguageModelLender
from lora_trainer.models.families.causal_lm.model import LanguageModel

log = logging.getLogger(__name__)


class OwnModels(Protocol):
    """The models that a WebUI has loaded, all of them. Every method is called inside a turn."""

    def send_away(self) -> None:
        """Take them off the device."""
        ...

    def bring_back(self) -> None:
        """Put those that ``send_away`` took off the device where they were."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Those of the model that pictures are drawn with, by name; none where no model is loaded."""
        ...

    def load_again(self) -> None:
        """Load that model from its file."""
        ...


class ClearedDevice:
    """Inside, the WebUI's lock is held and its models are off the device; afterwards they are as they were.

    To be used in one thread. When somebody waits for the lock, ``rest`` lets them in.
    """

    def __init__(self, turns: Turns, own: OwnModels):
        self._turns, self._own = turns, own
        self._snapshot = WeightSnapshot({})

    @contextmanager
    def held(self) -> Iterator[ClearedDevice]:
        with self._turns.hold():
            try:
                self._clear()
                yield self
            finally:
                self._restore()

    @property
    def somebody_waits(self) -> bool:
        return self._turns.somebody_waits

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Inside, the WebUI works, with its models on the device."""
        self._restore()
        try:
            with self._turns.rest():
                yield
        finally:
            self._clear()

    def _clear(self) -> None:
        self._snapshot = WeightSnapshot(self._own.tensors())
        self._own.send_away()

    def _restore(self) -> None:
        """The WebUI's model is where it was and what it was: what is not is loaded again."""
        self._own.bring_back()
        tensors = self._own.tensors()
        if self._snapshot.altered(tensors, tensors):
            log.warning("The WebUI's model was changed during the training; it is loaded again")
            self._own.load_again()


class ClearedLender(Lender[LanguageModel]):
    """Lends what ``inner`` lends. The WebUI's lock is held for the whole run, as its model is not on the device.

    When somebody waits for the lock, the two change places between two steps: the WebUI has its model back before the
    lock is released, and the language model waits in main memory.
    """

    def __init__(self, inner: LanguageModelLender, turns: Turns, own: OwnModels):
        self._inner, self._turns, self._device = inner, turns, ClearedDevice(turns, own)
        self._model: LanguageModel | None = None

    def describe(self) -> ModelInfo:
        return self._inner.describe()

    @contextmanager
    def borrow(self) -> Iterator[LanguageModel]:
        with self._device.held():
            try:
                with self._inner.borrow() as self._model:
                    yield self._model
            finally:
                self._model = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        if self._device.somebody_waits:
            with self.rest():
                pass
        yield

    @contextmanager
    def rest(self) -> Iterator[None]:
        if self._model is None:
            yield
            return
        self._model.send("cpu")
        try:
            with self._device.rest():
                yield
        finally:
            self._model.send(self._model.device)

    def device_turn(self) -> AbstractContextManager[Any]:
        return self._turns.take()

    def model_hash(self) -> str | None:
        return self._inner.model_hash()


def real_tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    """Those of a state_dict that hold numbers."""
    return {name: value for name, value in values.items() if isinstance(value, Tensor) and not value.is_meta}
