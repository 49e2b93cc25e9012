"""The loss of LoRAs that learn a change: what the base predicts is the target.

Teacher and student see latents of the same noise and timestep. The teacher is the same model without its adapters, so a
target costs a forward pass and no memory. x_t, ᾱ and ε as in ``objectives.diffusion``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_trainer.config.schema import TrainConfig
from lora_trainer.devices import to_device
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning, LentModel, NoiseSchedule
from lora_trainer.training.objectives.diffusion import trained_schedule
from lora_trainer.training.objectives.of_pictures import picture_objective
from lora_trainer.training.objectives.pictures import Batch
from lora_trainer.training.sampling import guided_pred, sampler_of, told_of_guidance, usual_cfg

DENOISING_CFG = 3.0
"""Guidance of the sampler that makes partly denoised latents, as ESD has it (Gandikota et al. 2023); a model without a
second prediction has its own."""
DIFFERENT = 0.1
"""Where two pictures differ: their latents do so by more than this share of the largest difference."""


@dataclass(frozen=True)
class ChangeInputs:
    """What the loss of a micro-batch reads, on the device.

    noisy_latents: (B, C, h, w) fp32, x_t. target: (B, C, h, w) fp32, what the teacher predicts. mask: (B, 1, h, w) in
    [0, 1], the weight of each place, or None. strength: see ``Objective.inputs``.
    """

    noisy_latents: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    time_ids: Tensor | None
    target: Tensor
    mask: Tensor | None
    strength: float


class _ChangeObjective:
    """What learning from words and learning from a pair have in common.

    encode: captions and which rows of them are needed -> their encoding, for micro-batches that come without one.
    bare: inside, the model is the base: without its adapters.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: LentModel,
        encode: Callable[[Sequence[str], slice], Conditioning],
        bare: Callable[[], AbstractContextManager[None]],
    ):
        self.config, self.model, self.encode, self.bare = config, model, encode, bare
        self._levels = picture_objective(config, model, encode, bare)  # draws noise levels, and adds noise

    def loss(self, inputs: ChangeInputs) -> Tensor:
        """The sum over the rows of the mean squared distance from the target; with a mask, the mean over what it
        shows."""
        model_pred = self.model.predict(
            inputs.noisy_latents, inputs.timesteps, inputs.conditioning, inputs.time_ids
        ).float()
        squares = (model_pred - inputs.target) ** 2
        if inputs.mask is None:
            return squares.mean(dim=(1, 2, 3)).sum()
        shown = inputs.mask.sum(dim=(1, 2, 3)) * squares.shape[1]
        return ((squares * inputs.mask).sum(dim=(1, 2, 3)) / shown.clamp_min(1)).sum()

    def addresses(self) -> tuple[int, ...]:
        return self.model.addresses()

    def warnings(self) -> list[str]:
        return []


# ---- words ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordBatch:
    """A lesson in words, B times over: student(prompt) = Σ weight · base(other prompt).

    shape: (C, h, w) of the latents. student: (B, …) on the CPU. terms: of the target, each with its weight.
    time_ids: (B, …) or None. strength: of the adapters.
    negative: the empty prompt, (B, …), for who denoises.
    """

    shape: tuple[int, int, int]
    student: Conditioning
    terms: tuple[tuple[float, Conditioning], ...]
    time_ids: Tensor | None
    strength: float
    negative: Conditioning

    def __len__(self) -> int:
        return len(self.student)

    def __getitem__(self, rows: slice) -> WordBatch:
        terms = tuple((weight, conditioning[rows]) for weight, conditioning in self.terms)
        time_ids = None if self.time_ids is None else self.time_ids[rows]
        return replace(self, student=self.student[rows], terms=terms, time_ids=time_ids, negative=self.negative[rows])


@dataclass(frozen=True)
class WordDraws:
    """See ``objectives.base.Drawn``. noise: (B, C, h, w). timesteps: (B,), as in ``PictureDraws``.

    steps: so many of the sampler's steps are done on the noise, up to ``timesteps``, which are equal then.
    """

    batch: WordBatch
    noise: Tensor
    timesteps: Tensor
    steps: int = 0

    @property
    def count(self) -> int:
        return len(self.timesteps)

    def __len__(self) -> int:
        return len(self.timesteps)

    def __getitem__(self, rows: slice) -> WordDraws:
        return WordDraws(self.batch[rows], self.noise[rows], self.timesteps[rows], self.steps)


class WordObjective(_ChangeObjective):
    """Learning from prompts alone (LECO; Gandikota et al. 2023, "Erasing Concepts from Diffusion Models").

    x_t is noise, drawn anew for each step, or what a sampler makes of it in the steps before t, with the LoRA as it is.
    at: inside, the adapters have the strength that is given.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: LentModel,
        encode: Callable[[Sequence[str], slice], Conditioning],
        bare: Callable[[], AbstractContextManager[None]],
        at: Callable[[float], AbstractContextManager[None]],
    ):
        super().__init__(config, model, encode, bare)
        self._at = at
        self._places: list[int] = []
        if not config.denoised_steps:
            return
        schedule = model.schedule
        if isinstance(schedule, NoiseSchedule):
            schedule = trained_schedule(config, schedule, model.info.zero_terminal_snr)
        self._sampler = sampler_of(schedule, config.denoised_steps)
        self._cfg = DENOISING_CFG if schedule.takes_negative() else usual_cfg(schedule)
        low, high = self._levels.level_at(0), self._levels.level_at(1)
        self._places = [place for place, level in enumerate(self._sampler.levels) if low <= level <= high]
        if not self._places:
            raise UserError(
                "No step of the sampler lies between min_timestep and max_timestep.",
                field="denoised_steps",
                remedy="Raise it, or widen what lies between min_timestep and max_timestep.",
            )

    def draw(self, micro_batch: WordBatch, generator: torch.Generator) -> WordDraws:
        count = len(micro_batch)
        noise = torch.randn((count, *micro_batch.shape), generator=generator)
        if not self._places:
            return WordDraws(micro_batch, noise, self._levels.draw_levels(noise, generator))
        place = self._places[int(torch.randint(len(self._places), (), generator=generator))]
        return WordDraws(micro_batch, noise, torch.full((count,), self._sampler.levels[place]), place)

    def inputs(self, drawn: WordDraws) -> ChangeInputs:
        device, batch = self.model.device, drawn.batch
        student, time_ids = _on(batch.student, device), to_device(batch.time_ids, device)
        latents, timesteps = to_device(drawn.noise, device), to_device(drawn.timesteps, device)
        with torch.no_grad():
            if drawn.steps:
                with self._at(batch.strength):
                    latents = self._denoised(latents, drawn.steps, _on(batch.negative, device), student, time_ids)
            with self.bare():
                target = torch.zeros_like(latents)
                for weight, conditioning in batch.terms:
                    target += weight * self.model.predict(latents, timesteps, _on(conditioning, device), time_ids)
        return ChangeInputs(latents, timesteps, student, time_ids, target, None, batch.strength)

    def _denoised(
        self, latents: Tensor, steps: int, negative: Conditioning, positive: Conditioning, time_ids: Tensor | None
    ) -> Tensor:
        """What the first ``steps`` steps of the sampler make of noise, by the model with its adapters."""
        told = positive
        if self.model.schedule.takes_negative():
            pairs = zip(negative.tensors.items(), positive.tensors.values())
            told = Conditioning.from_tensors({name: torch.cat([one, other]) for (name, one), other in pairs})
            time_ids = None if time_ids is None else torch.cat([time_ids, time_ids])
        told = told_of_guidance(self.model.schedule, told, self._cfg)
        for index, level in enumerate(self._sampler.levels[:steps]):
            model_pred = guided_pred(self.model, latents, level, told, time_ids, self._cfg)
            latents = self._sampler.step(model_pred, index, latents)
        return latents


# ---- a pair ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairBatch:
    """Pictures before and after a change, of one bucket.

    forth: the student sees the pictures after the change, at ``strength``, and the teacher those before it; else the
    other way around.
    """

    before: Batch
    after: Batch
    forth: bool
    strength: float

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, rows: slice) -> PairBatch:
        return replace(self, before=self.before[rows], after=self.after[rows])


@dataclass(frozen=True)
class PairDraws:
    """See ``objectives.base.Drawn``. noise: (B, C, h, w), the same for both pictures. timesteps: (B,), as in
    ``PictureDraws``."""

    batch: PairBatch
    noise: Tensor
    timesteps: Tensor
    rows: range

    @property
    def count(self) -> int:
        return len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> PairDraws:
        return replace(self, rows=self.rows[rows])


class PairObjective(_ChangeObjective):
    """The alternating difference of two pictures (ADDifT): the student is to find the noise in x_t of the one that the
    base finds in x_t of the other.

    So its x0 is the base's and the difference of the pictures. For ε the target is the base's prediction; for v and for
    flow it is moved by what the right answers differ by, -√(1-ᾱ)·(seen - shown) and -(seen - shown): without that, of
    the difference ᾱ or 1 - σ would be taught, nothing where most of a picture is decided.
    """

    def draw(self, micro_batch: PairBatch, generator: torch.Generator) -> PairDraws:
        shape = self.model.sample_latents(micro_batch.before.moments, None).shape
        noise = torch.randn(shape, generator=generator)
        timesteps = self._levels.draw_levels(noise, generator)
        return PairDraws(micro_batch, noise, timesteps, range(len(micro_batch)))

    def inputs(self, drawn: PairDraws) -> ChangeInputs:
        rows, device = slice(drawn.rows.start, drawn.rows.stop), self.model.device
        pair = drawn.batch[rows]
        before = self.model.sample_latents(pair.before.moments, None)  # the means: a sample would be a difference, too
        after = self.model.sample_latents(pair.after.moments, None)
        before, after = to_device(before, device), to_device(after, device)
        mask = different(before, after) if self.config.pair_mask else None
        seen, shown = (after, before) if pair.forth else (before, after)
        batch = pair.before.to(device)
        noise, timesteps = to_device(drawn.noise[rows], device), to_device(drawn.timesteps[rows], device)
        with torch.no_grad():
            conditioning = batch.conditioning
            if conditioning is None:
                conditioning = self.encode(drawn.batch.before.captions, rows)
            with self.bare():
                noisy = self._levels.add_noise(shown, noise, timesteps)
                target = self.model.predict(noisy, timesteps, conditioning, batch.time_ids).float()
            right = [self._levels.target(latents, noise, timesteps) for latents in (seen, shown)]
            target = target + (right[0] - right[1])
        noisy = self._levels.add_noise(seen, noise, timesteps)
        mask = _both(mask, batch.mask)
        return ChangeInputs(noisy, timesteps, conditioning, batch.time_ids, target, mask, pair.strength)


def different(before: Tensor, after: Tensor) -> Tensor:
    """Where two pictures' latents (B, C, h, w) differ, and one place around it: (B, 1, h, w) of 0 and 1. All of them
    where they are equal."""
    distance = (after - before).abs().mean(1, keepdim=True)
    shown = distance >= DIFFERENT * distance.amax(dim=(1, 2, 3), keepdim=True)
    return F.max_pool2d(shown.float(), 3, stride=1, padding=1)


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one * other


def _on(conditioning: Conditioning, device: torch.device) -> Conditioning:
    return conditioning.map(lambda tensor: to_device(tensor, device))
