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
_LATER = 3  # so many measurements after the lowest validation loss may still be recommended
_LEARNS = 0.05  # share of what was learned so far that a later step must add to be recommended


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
            return self.objective.predict(self.objective.inputs(drawn)).cpu().double()  # MPS has no fp64

    def _drawn(self, source: Source, number: int, count: int) -> Drawn:
        """The pair of this number: its picture, and its noise level."""
        (micro_batch,) = source.micro_batches(0, number % source.steps_per_epoch)
        place = (number % count % PLACES + 0.5) / min(count, PLACES)
        return self.objective.fixed_draws(micro_batch, place, generator_for(self.seed, "validation", number))


def recommended(measurements: Sequence[Measurement]) -> Measurement:
    """The measurement whose weights are the best ones, of at least one: each became it at the moment it was made, so
    that what is to be kept is known then.

    It is that of the lowest validation loss, or one of the ``_LATER`` ones after it, as long as the loss of trained
    samples still falls clearly: by ``_LEARNS`` of its whole fall since the base.

    Why not the lowest validation loss alone: on fixed noise it soon counts where exactly the trained samples have
    their details, which says little about generated ones. Five pictures of a new shape for 400 steps on the demo's
    base: it is lowest at step 50 and twice that from step 100 on, but only at the low noise levels; at the high ones,
    which decide what is drawn, it stays below the base's. Of 64 pictures of unseen prompts, 90.6 % show the shape at
    step 50 (71.9 % by the strict scorer), and 100 % from step 150 on. What tells these apart is the loss of the
    trained pictures on fixed noise, which then stops falling: it is the criterion of Voronov et al. 2023, "Is This
    Loss Informative? Faster Text-to-Image Customization by Tracking Objective Dynamics". Alone it would never end for
    a model that memorises; hence the limit.

    Drift does not choose either: of the shapes that this base draws, half are lost at step 50 (drift 0.025), 9 of 10
    at step 150 (0.039). That is what ``preserve`` is there for.
    """
    base = lowest = chosen = measurements[0]
    later = 0
    for one in measurements[1:]:
        later += 1
        if one.validation < lowest.validation:
            lowest, chosen, later = one, one, 0
        elif later <= _LATER and chosen.training - one.training > _LEARNS * max(0.0, base.training - one.training):
            chosen = one
    return chosen


@dataclass(frozen=True)
class Verdict:
    """kind: "learning", "memorising", "too fast" (the learning rate is too high) or "barely" (it hardly learns).

    best: step of the ``recommended`` measurement. sentence: for people.
    """

    kind: str
    best: int
    sentence: str

    @property
    def stops(self) -> bool:
        """Whether going on would make it worse."""
        return self.kind in ("memorising", "too fast")


def verdict(measurements: Sequence[Measurement], patience: int) -> Verdict | None:
    """What the measurements of a run say; None before there are two.

    patience: so many measurements in a row without a new lowest validation loss mean that it will not fall any more.
    """
    if len(measurements) < 2:
        return None
    first, last, best = measurements[0], measurements[-1], recommended(measurements).step
    lowest = min(measurements, key=lambda one: one.validation)
    since = [one for one in measurements if one.step > lowest.step]
    if len(since) >= patience and last.validation > lowest.validation * (1 + _NOTICEABLE):
        memorises = last.training < lowest.training
        said = [
            f"The loss of held-out data has risen since step {lowest.step}, from {lowest.validation:.4g} to "
            f"{last.validation:.4g}.",
            f"That of training data fell from {lowest.training:.4g} to {last.training:.4g}: it memorises them."
            if memorises
            else "That of training data does not fall either: the learning rate is too high.",
            f"Step {best} is recommended." if best else "No step was better than the base model.",
        ]
        return Verdict("memorising" if memorises else "too fast", best, " ".join(said))
    if len(measurements) > patience and abs(last.validation / first.validation - 1) < _NOTICEABLE:
        said = [
            f"The loss of held-out data has hardly changed in {last.step} steps.",
            "Train longer, or raise the rank or the learning rate.",
        ]
        return Verdict("barely", best, " ".join(said))
    return Verdict("learning", best, f"It is still learning at step {last.step}.")


def measurements_of(progress: Mapping[str, Any]) -> list[Measurement]:
    """Those in a training state, oldest first."""
    return [Measurement(**values) for values in progress.get("measurements", [])]
