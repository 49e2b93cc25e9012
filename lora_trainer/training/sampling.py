"""Steps of a sampler on the lent model: for pictures, and for latents that are half denoised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_trainer.dataset.samples import Size, uncut
from lora_trainer.models.base import Conditioning, FlowSchedule, LentModel, NoiseSchedule
from lora_trainer.models.families import get_family
from lora_trainer.training.objectives.flow import shifted

CFG = 7.0
"""Guidance of a diffusion model in a preview whose prompt does not say."""


class Sampler(Protocol):
    """levels: the noise levels in the order of the steps, as the model is told of them: timesteps, or σ."""

    @property
    def levels(self) -> Sequence[float]: ...

    def step(self, model_pred: Tensor, index: int, latents: Tensor) -> Tensor:
        """From the latents at ``levels[index]`` to those at the next one, (B, C, h, w); the last step ends in x0."""
        ...


class DdimSampler:
    """Diffusers' DDIM (η = 0) on the very schedule that is trained."""

    def __init__(self, schedule: NoiseSchedule, steps: int):
        self._scheduler = _ddim_scheduler(schedule)
        self._scheduler.set_timesteps(steps)
        self.levels: list[float] = self._scheduler.timesteps.tolist()

    def step(self, model_pred: Tensor, index: int, latents: Tensor) -> Tensor:
        return self._scheduler.step(model_pred, self.levels[index], latents).prev_sample


class EulerSampler:
    """Euler's method along dx/dσ = prediction, from σ = 1 to 0, shifted by e^mu."""

    def __init__(self, schedule: FlowSchedule, steps: int):
        spread = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        self._sigmas: list[float] = shifted(spread, math.exp(schedule.mu)).tolist()
        self.levels = self._sigmas[:-1]

    def step(self, model_pred: Tensor, index: int, latents: Tensor) -> Tensor:
        return latents + (self._sigmas[index + 1] - self._sigmas[index]) * model_pred


def sampler_of(schedule: NoiseSchedule | FlowSchedule, steps: int) -> Sampler:
    return EulerSampler(schedule, steps) if isinstance(schedule, FlowSchedule) else DdimSampler(schedule, steps)


def usual_cfg(schedule: NoiseSchedule | FlowSchedule) -> float:
    """Guidance where nobody says."""
    if not isinstance(schedule, FlowSchedule):
        return CFG
    return schedule.cfg if schedule.guidance is None else schedule.guidance


def told_of_guidance(schedule: NoiseSchedule | FlowSchedule, conditioning: Conditioning, cfg: float) -> Conditioning:
    """The same for a sampler: a model that reads its guidance is told of it."""
    if not isinstance(schedule, FlowSchedule) or schedule.guidance is None:
        return conditioning
    guidance = torch.full((len(conditioning),), float(cfg), device=conditioning.context.device)
    return replace(conditioning, extra={**conditioning.extra, "guidance": guidance})


def guided_pred(
    model: LentModel,
    latents: Tensor,
    level: float,
    conditioning: Conditioning,
    time_ids: Tensor | None,
    cfg: float,
) -> Tensor:
    """ε, v or the velocity by classifier-free guidance, (B, C, h, w). latents: (B, C, h, w). conditioning, time_ids:
    (2B, …), the negative prompts first; (B, …) predicts without guidance."""
    count = len(conditioning)
    levels = torch.full((count,), level, device=latents.device)
    repeated = latents.repeat(count // len(latents), 1, 1, 1)
    model_pred = model.predict(repeated, levels, conditioning, time_ids).float()
    if count == len(latents):
        return model_pred
    negative, positive = model_pred.chunk(2)
    return negative + cfg * (positive - negative)


@torch.no_grad()
def draw_latents(
    model: LentModel,
    encode: Callable[[Sequence[str]], Conditioning],
    prompt: str,
    negative: str,
    size: Size,
    generator: torch.Generator,
    steps: int,
    cfg: float,
) -> Tensor:
    """Scaled latents of one picture (1, C, h, w), on the model's device. size: (width, height) in pixels, multiples of
    the family's. generator: of the first noise, on the CPU. Call it in a turn."""
    family, schedule = get_family(model.info.family), model.schedule
    prompts = [negative, prompt] if schedule.takes_negative(cfg) else [prompt]
    conditioning = told_of_guidance(schedule, encode(prompts).to(model.device), cfg)
    time_ids = family.time_ids([uncut(size)] * len(prompts))
    time_ids = None if time_ids is None else time_ids.to(model.device)
    shape = (1, family.latents.channels, *reversed(family.latents.size(*size)))
    latents, sampler = torch.randn(shape, generator=generator).to(model.device), sampler_of(schedule, steps)
    for index, level in enumerate(sampler.levels):
        latents = sampler.step(guided_pred(model, latents, level, conditioning, time_ids, cfg), index, latents)
    return latents


def _ddim_scheduler(schedule: NoiseSchedule) -> Any:
    from diffusers import DDIMScheduler

    # Under zero terminal SNR sampling must begin at the very last timestep (Lin et al. 2024, §3.3).
    to_the_end = bool(schedule.alphas_cumprod[-1] == 0)
    scheduler = DDIMScheduler(
        num_train_timesteps=len(schedule),
        prediction_type=schedule.prediction_type,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0 if to_the_end else 1,
        timestep_spacing="trailing" if to_the_end else "leading",
    )
    # The very schedule that is trained. For ε the sampler divides by √ᾱ, so it gets the floor that diffusers gives it.
    floor = 0.0 if schedule.prediction_type == "v_prediction" else 2.0**-24
    scheduler.alphas_cumprod = schedule.alphas_cumprod.float().clamp(min=floor)
    return scheduler
