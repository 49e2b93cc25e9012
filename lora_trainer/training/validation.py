"""What a run has learned, measured on pictures that it does not train on, and how far the model moved elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.objectives.base import Drawn, generator_for
from lora_trainer.training.source import Source, Turn

PLACES = 8
"""Noise levels of a measurement, evenly spread over those that are trained."""
MOST = 16
"""A measurement has at most so many pairs of picture and noise level."""
DRIFT_PAIRS = 4
COST = 0.05
"""Share of a run's time that measuring may take where the interval is chosen by the program."""
_FORWARD = 0.2, 0.3
"""Time of a forward pass on one picture, as a share of a training step on a batch of b: the first number, plus the
second one divided by b. Measured on the demo's base by tests/benchmarks/validation_cost.py; where larger models keep a
device busy, it is less."""
_NOTICEABLE = 0.002  # relative: a smaller change of the validation loss is none


class Measurable(Protocol):
    """What an objective offers besides training: the same loss, without chance."""

    def fixed_draws(self, micro_batch: Any, place: float, generator: torch.Generator) -> Drawn:
        """Draws for a measurement that is repeated. place: which noise level, from 0 (lowest) to 1 (highest)."""
        ...

    def inputs(self, drawn: Any) -> Any: ...

    def loss(self, inputs: Any) -> Tensor: ...

    def predict(self, inputs: Any) -> Tensor:
        """What the model predicts, fp32."""
        ...


@dataclass(frozen=True)
class Measurement:
    """validation, training: mean loss of held-out and of trained pictures, over the same noise levels. drift: mean
    squared distance of the predictions from the base's, relative to these, for captions without the trigger word."""

    step: int
    epoch: int
    validation: float
    training: float
    drift: float

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.validation, self.training, self.drift)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ValidationData:
    """held_out, seen: see ``dataset.held_out.Split``. untriggered: the held-out ones, with captions that do not name
    what is learned. Each micro-batch is one picture."""

    held_out: Source
    seen: Source
    untriggered: Source

    @property
    def sources(self) -> tuple[Source, Source, Source]:
        return self.held_out, self.seen, self.untriggered


class Validator:
    """Measures with ``objective``; nothing of it touches what the training draws or the weights.

    seed: of the noise, which is the same for every measurement of a run.
    """

    def __init__(self, objective: Measurable, adapters: AdapterSet, data: ValidationData, seed: int):
        self.objective, self.adapters, self.data, self.seed = objective, adapters, data, seed
        self._base: list[Tensor] | None = None  # its predictions for the drift

    def prepare(self, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        """Encode what is measured. Returns False when it was stopped."""
        return all(source.prepare(turn, callbacks, commands) for source in self.data.sources)

    @property
    def pairs(self) -> int:
        return min(MOST, max(PLACES, self.data.held_out.steps_per_epoch))

    def interval(self, total_steps: int, batch_size: int, accumulation: int) -> int:
        """Optimizer steps between two measurements, so that all of a run together take at most ``COST`` of its time.

        One at the start and one at the end there are always, which is more than that in a very short run. A function
        of the settings alone: a resumed run, or another machine, measures at the same steps.
        """
        fixed, shared = _FORWARD
        forwards = COST * total_steps * accumulation / (fixed + shared / batch_size)
        count = int((forwards - DRIFT_PAIRS) / (2 * self.pairs + DRIFT_PAIRS))  # the base is predicted with once more
        return max(1, math.ceil(total_steps / max(1, count - 1)))

    def measure(self, step: int, epoch: int, turn: Turn) -> Measurement:
        """The adapters as they are now, in eval mode. Each picture is computed in a turn of its own."""
        training = self.adapters.training
        self.adapters.eval()
        try:
            validation, seen = (self._loss(source, turn) for source in (self.data.held_out, self.data.seen))
            return Measurement(step, epoch, validation, seen, self._drift(turn))
        finally:
            self.adapters.train(training)

    def _loss(self, source: Source, turn: Turn) -> float:
        losses = []
        for number in range(self.pairs):
            drawn = self._drawn(source, number, self.pairs)
            with turn(), torch.no_grad():
                losses.append(float(self.objective.loss(self.objective.inputs(drawn))) / drawn.count)
        return sum(losses) / len(losses)

    def _drift(self, turn: Turn) -> float:
        draws = [self._drawn(self.data.untriggered, number, DRIFT_PAIRS) for number in range(DRIFT_PAIRS)]
        if self._base is None:
            with self.adapters.enabled(False):
                self._base = [self._predicted(drawn, turn) for drawn in draws]
        now = [self._predicted(drawn, turn) for drawn in draws]
        shares = [
            float((after - before).square().sum() / before.square().sum()) for before, after in zip(self._base, now)
        ]
        return sum(shares) / len(shares)

    def _predicted(self, drawn: Drawn, turn: Turn) -> Tensor:
        with turn(), torch.no_grad():
            return self.objective.predict(self.objective.inputs(drawn)).double().cpu()

    def _drawn(self, source: Source, number: int, count: int) -> Drawn:
        """The pair of this number: its picture, and its noise level."""
        (micro_batch,) = source.micro_batches(0, number % source.steps_per_epoch)
        place = (number % count % PLACES + 0.5) / min(count, PLACES)
        return self.objective.fixed_draws(micro_batch, place, generator_for(self.seed, "validation", number))


@dataclass(frozen=True)
class Verdict:
    """kind: "learning", "memorising", "too fast" (the learning rate is too high) or "barely" (it hardly learns).

    best: step of the lowest validation loss. sentence: for people.
    """

    kind: str
    best: int
    sentence: str

    @property
    def stops(self) -> bool:
        """Whether going on would make it worse."""
        return self.kind in ("memorising", "too fast")


def verdict(measurements: Sequence[Measurement], patience: int, samples: str = "pictures") -> Verdict | None:
    """What the measurements of a run say; None before there are two.

    patience: so many measurements in a row without a new lowest validation loss mean that it will not fall any more.
    samples: what they are called (``Source.sample``, in the plural).
    """
    if len(measurements) < 2:
        return None
    first, last = measurements[0], measurements[-1]
    best = min(measurements, key=lambda one: one.validation)
    since = [one for one in measurements if one.step > best.step]
    if len(since) >= patience and last.validation > best.validation * (1 + _NOTICEABLE):
        memorises = last.training < best.training
        rise = f"from {best.validation:.4g} to {last.validation:.4g}"
        why = (
            f"while that of trained {samples} fell from {best.training:.4g} to {last.training:.4g}: it memorises them."
            if memorises
            else f"and that of trained {samples} does not fall either: the learning rate is too high."
        )
        remedy = f"Step {best.step} is recommended." if best.step else "No step was better than the base model."
        sentence = f"The loss of held-out {samples} has risen since step {best.step}, {rise}, {why} {remedy}"
        return Verdict("memorising" if memorises else "too fast", best.step, sentence)
    if len(measurements) > patience and abs(last.validation / first.validation - 1) < _NOTICEABLE:
        return Verdict(
            "barely",
            best.step,
            f"The loss of held-out {samples} has hardly changed in {last.step} steps: train longer, or raise the rank "
            "or the learning rate.",
        )
    return Verdict("learning", best.step, f"It is still learning at step {last.step}.")


def measurements_of(progress: Mapping[str, Any]) -> list[Measurement]:
    """Those in a training state, oldest first."""
    return [Measurement(**values) for values in progress.get("measurements", [])]
