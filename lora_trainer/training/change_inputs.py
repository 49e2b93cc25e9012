"""What the steps are fed with that learn a change: prompts, pairs of pictures, or pictures of two opposites."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from lora_trainer.config.changes import PLACE, filled
from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.samples import uncut
from lora_trainer.models.base import Conditioning, LentModel
from lora_trainer.models.families import get_family
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.inputs import CAPTIONS_PER_TURN, BatchSource
from lora_trainer.training.objectives.change import PairBatch, WordBatch
from lora_trainer.training.objectives.pictures import Batch
from lora_trainer.training.precision import Precision
from lora_trainer.training.source import Turn

WORD_STEPS = 300
"""Steps of a run on words whose settings do not say how many."""

Lesson = tuple[str, tuple[tuple[float, str], ...]]
"""The student's prompt, and the terms of its target: weights and prompts."""


def lessons(config: TrainConfig) -> tuple[Lesson, Lesson | None]:
    """What is taught at weight 1, and at -1 if the settings want both ways."""
    original, target, guidance = config.original_prompt, config.target_prompt, config.guidance

    def slid(strength: float) -> Lesson:
        more = (strength, config.positive_prompt), (-strength, config.negative_prompt)
        return original, ((1.0, target or original), *more)

    def turned(student: str, other: str) -> Lesson:
        return student, ((1.0, other),) if guidance == 1 else ((guidance, other), (1 - guidance, student))

    if config.positive_prompt or config.negative_prompt:
        there, back = slid(guidance), slid(-guidance)
    else:
        there, back = turned(original, target), turned(target, original)
    return there, back if config.both_ways else None


def templates_of(config: TrainConfig) -> list[str]:
    return config.prompt_templates or [PLACE]


def kept_prompts(config: TrainConfig, takes_negative: bool) -> list[str]:
    """What is to be answered as the base does: the protected prompts, and the empty one unless that is what changes.

    A sampler with guidance moves away from the prediction for the empty prompt. Without this the LoRA changes that one,
    too, and guidance takes much of the change away again. takes_negative: whether the model is drawn with a negative
    prompt.
    """
    students = [lesson[0] for lesson in lessons(config) if lesson is not None]
    taught = {filled(template, student) for template in templates_of(config) for student in students}
    empty = [""] if takes_negative and "" not in taught else []
    return list(dict.fromkeys([*empty, *config.protected_prompts]))


def kept_batches(config: TrainConfig, takes_negative: bool) -> int:
    """Batches of a step of what is to stay, beside each of the change: no more than there are prompts."""
    return min(config.protected_batches, len(kept_prompts(config, takes_negative)))


class WordSource:
    """The ``Source`` of runs on words. A step is one lesson, and ``kept_batches`` of what is to stay.

    size: of the pictures, (width, height) in pixels.
    """

    sample, size_setting = "prompt", "resolution"
    blame = "The model is damaged: choose another base_model"

    def __init__(
        self,
        config: TrainConfig,
        model: LentModel,
        size: tuple[int, int],
        precision: Precision,
        keep_model_parts: bool = False,
    ):
        self._config, self._model, self._precision = config, model, precision
        self._family = get_family(model.info.family)
        self._size, self._keep_model_parts = size, keep_model_parts
        self._lessons, self._templates = lessons(config), templates_of(config)
        takes_negative = model.schedule.takes_negative()
        self._kept, self._kept_batches = kept_prompts(config, takes_negative), kept_batches(config, takes_negative)
        self._encoded: dict[str, Conditioning] = {}
        self.total_steps = self.steps_per_epoch = config.max_train_steps or WORD_STEPS

    @property
    def prompts(self) -> list[str]:
        """Every prompt that a step may need."""
        found = list(self._config.protected_prompts)
        for lesson in self._lessons:
            if lesson is not None:
                found += [lesson[0], *(prompt for _, prompt in lesson[1])]
        return list(dict.fromkeys(["", *(filled(template, one) for template in self._templates for one in found)]))

    def prepare(self, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        self._encode(turn, callbacks, commands)
        if not self._keep_model_parts:
            self._model.release("vae", "text_encoders")
        return not commands.stopping

    def prepare_epoch(self, epoch: int, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        return not commands.stopping

    def worth_trying(self) -> bool:
        return False  # all prompts are encoded before either, the trial or the first step

    def trial_batch(self, number: int, turn: Turn, commands: TrainCommands) -> WordBatch | None:
        self._encode(turn, TrainCallbacks(), commands)
        return None if commands.stopping else self.micro_batches(0, number)[0]

    def micro_batches(self, epoch: int, position: int, share: slice = slice(None)) -> list[WordBatch]:
        config, step = self._config, epoch * self.steps_per_epoch + position
        there, back = self._lessons
        forth = back is None or step % 2 == 0
        student, terms = there if forth or back is None else back
        # Each way goes through the protected prompts by itself, so that all of them are kept at both weights.
        turn = step if back is None else step // 2
        strength, batches = 1.0 if forth else -1.0, []
        count = config.gradient_accumulation_steps * config.batch_size
        for place in range(0, count, config.batch_size):
            first, size, times = step * count + place, config.batch_size, self._kept_batches
            batches.append(self._batch([student] * size, terms, strength, range(first, first + size)))
            for start in range(first * times, (first + size) * times, size):
                rows = range(start, start + size)
                chosen = [self._kept[(row + (turn - step) * count * times) % len(self._kept)] for row in rows]
                batches.append(self._batch(chosen, None, strength, rows))
        return batches[share]

    def _batch(
        self, students: Sequence[str], terms: Sequence[tuple[float, str]] | None, strength: float, rows: range
    ) -> WordBatch:
        """terms: None for prompts that are to be answered as the base does. rows: their numbers among those of their
        kind in the run, by which templates are drawn."""
        empty = self._encoded[""]
        templates = [random.Random(f"{self._config.seed} template {row}").choice(self._templates) for row in rows]

        def collated(prompts: Sequence[str], beside: Sequence[str] = ()) -> Conditioning:
            """Filled up to the longest of both."""
            items = [self._encoded[prompt] for prompt in (*prompts, *beside)]
            return self._family.collate(items, empty)[: len(prompts)]

        seen = [filled(*one) for one in zip(templates, students)]
        latent_format, student = self._family.latents, collated(seen)
        across, down = latent_format.size(*self._size)
        target = [(1.0, student)]
        if terms is not None:
            target = [(weight, collated([filled(one, prompt) for one in templates])) for weight, prompt in terms]
        return WordBatch(
            (latent_format.channels, down, across),
            student,
            tuple(target),
            self._family.time_ids([uncut(self._size)] * len(rows)),
            strength,
            collated([""] * len(rows), seen),
        )

    def encode_prompts(self, captions: Sequence[str], rows: slice = slice(None)) -> Conditioning:
        """Prompts as this run reads them."""
        config = self._config
        return self._model.encode_prompts(captions, config.max_token_length, config.weighted_captions, rows)

    def _encode(self, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> None:
        """All prompts that are not encoded yet, some in each turn, until it is stopped."""
        prompts = self.prompts
        missing = [prompt for prompt in prompts if prompt not in self._encoded]
        for start in range(0, len(missing), CAPTIONS_PER_TURN):
            callbacks.on_phase("captions", len(self._encoded), len(prompts))
            commands.wait_while_paused()
            if commands.stopping:
                return
            with turn(), torch.no_grad():
                for prompt in missing[start : start + CAPTIONS_PER_TURN]:  # one by one: each as long as it is
                    encoded = self.encode_prompts([prompt])
                    self._encoded[prompt] = encoded.to("cpu", self._precision.compute_dtype)
        if missing:
            callbacks.on_phase("captions", len(prompts), len(prompts))


class _Sources:
    """Two sources of pictures that are read side by side."""

    sample, size_setting, blame = BatchSource.sample, BatchSource.size_setting, BatchSource.blame

    def __init__(self, first: BatchSource, second: BatchSource):
        self._both = first, second

    @property
    def steps_per_epoch(self) -> int:
        return self._both[0].steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self._both[0].total_steps

    def encode_prompts(self, captions: Sequence[str], rows: slice = slice(None)) -> Conditioning:
        return self._both[0].encode_prompts(captions, rows)

    def worth_trying(self) -> bool:
        return any(one.worth_trying() for one in self._both)

    def prepare(self, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        """The first one keeps what encodes until the second has used it."""
        first, second = self._both
        kept, first.keep_model_parts = first.keep_model_parts, True
        try:
            return first.prepare(turn, callbacks, commands) and second.prepare(turn, callbacks, commands)
        finally:
            first.keep_model_parts = kept

    def prepare_epoch(self, epoch: int, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        return all(one.prepare_epoch(epoch, turn, callbacks, commands) for one in self._both)


class PairSource(_Sources):
    """The ``Source`` of runs on pairs: even steps teach the way forth, odd ones the way back.

    before, after: sources whose samples are in the same order, of the same sizes and keys, so that their plans agree.
    """

    def __init__(self, config: TrainConfig, before: BatchSource, after: BatchSource):
        super().__init__(before, after)
        # The LoRA is saved with an alpha that is higher by ``strength``, and trained as if it were not.
        self._weight = config.pair_weight / config.strength

    def trial_batch(self, number: int, turn: Turn, commands: TrainCommands) -> PairBatch | None:
        before, after = (one.trial_batch(number, turn, commands) for one in self._both)
        return None if before is None or after is None else self._pair(before, after, number)

    def micro_batches(self, epoch: int, position: int, share: slice = slice(None)) -> list[PairBatch]:
        step = epoch * self.steps_per_epoch + position
        both = (one.micro_batches(epoch, position, share) for one in self._both)
        return [self._pair(before, after, step) for before, after in zip(*both)]

    def _pair(self, before: Batch, after: Batch, step: int) -> PairBatch:
        forth = step % 2 == 0
        return PairBatch(before, after, forth, self._weight if forth else -self._weight)


class SliderSource(_Sources):
    """The ``Source`` of sliders from pictures: each step learns from a batch of the one kind at weight 1 and from one
    of its opposite at weight -1. The kind with fewer pictures is gone through anew."""

    @property
    def steps_per_epoch(self) -> int:
        return max(one.steps_per_epoch for one in self._both)

    @property
    def total_steps(self) -> int:
        config = self._both[0].config
        return config.max_train_steps or config.epochs * self.steps_per_epoch

    def prepare_epoch(self, epoch: int, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        for one in self._both:
            first, last = (self._place(one, epoch, position)[0] for position in (0, self.steps_per_epoch - 1))
            for round_ in range(first, last + 1):
                if not one.prepare_epoch(round_, turn, callbacks, commands):
                    return False
        return True

    def trial_batch(self, number: int, turn: Turn, commands: TrainCommands) -> Batch | None:
        """The largest batch of each kind."""
        if number >= len(self._both):
            return None
        batch = self._both[number].trial_batch(0, turn, commands)
        return batch and replace(batch, strength=(1.0, -1.0)[number])

    def micro_batches(self, epoch: int, position: int, share: slice = slice(None)) -> list[Batch]:
        batches = []
        for one, strength in zip(self._both, (1.0, -1.0)):
            found = one.micro_batches(*self._place(one, epoch, position))
            batches += [replace(batch, strength=strength) for batch in found]
        return batches[share]

    def _place(self, one: BatchSource, epoch: int, position: int) -> tuple[int, int]:
        return divmod(epoch * self.steps_per_epoch + position, one.steps_per_epoch)
