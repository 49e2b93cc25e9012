"""Pictures along the way, drawn by the lent model itself with diffusers' DDIM sampler."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor, nn

from lora_trainer.config import parse_prompt
from lora_trainer.models.base import FlowSchedule, LentModel
from lora_trainer.models.families import get_family
from lora_trainer.models.family import LatentFormat
from lora_trainer.training.objectives.base import generator_for
from lora_trainer.training.objectives.flow import shifted
from lora_trainer.training.sampling import ddim_scheduler, guided_pred
from lora_trainer.training.source import Turn

CFG = 7.0
"""Guidance of a diffusion model where a prompt does not say."""


@torch.no_grad()
def sample(
    model: LentModel,
    prompt: str,
    negative: str = "",
    *,
    width: int = 512,
    height: int = 512,
    steps: int = 20,
    cfg: float | None = None,
    seed: int = 0,
) -> Image.Image:
    """One picture by DDIM (η = 0) with classifier-free guidance, ε = ε_neg + cfg·(ε_pos − ε_neg) (Ho & Salimans 2022);
    of a flow model by Euler's method.

    ``width`` and ``height`` in pixels are cut to multiples that the model can draw. The first noise depends on ``seed``
    alone. cfg: None for what is usual. Call it in a turn.
    """
    family = get_family(model.info.family)
    latent_format = family.latents
    width, height = (side - side % latent_format.multiple for side in (width, height))
    if isinstance(model.schedule, FlowSchedule):
        return _sample_flow(model, model.schedule, latent_format, prompt, negative, (width, height), steps, cfg, seed)
    scheduler = ddim_scheduler(model.schedule)
    scheduler.set_timesteps(steps)
    cfg = CFG if cfg is None else cfg
    guided = cfg != 1
    time_ids = family.time_ids([(height, width, 0, 0, height, width)] * (2 if guided else 1))
    time_ids = None if time_ids is None else time_ids.to(model.device)
    conditioning = model.encode_prompts([negative, prompt] if guided else [prompt]).to(model.device)

    shape = (1, latent_format.channels, *reversed(latent_format.size(width, height)))
    latents = torch.randn(shape, generator=generator_for(seed, "preview"))
    latents = latents.to(model.device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps.tolist():
        model_pred = guided_pred(model, latents, timestep, conditioning, time_ids, cfg)
        latents = scheduler.step(model_pred, timestep, latents).prev_sample
    return _to_image(model.decode_latents(latents))


def _sample_flow(
    model: LentModel,
    schedule: FlowSchedule,
    latent_format: LatentFormat,
    prompt: str,
    negative: str,
    size: tuple[int, int],
    steps: int,
    cfg: float | None,
    seed: int,
) -> Image.Image:
    """One picture by Euler's method along dx/dσ = prediction, from σ = 1 to 0 in ``steps`` steps, shifted by e^mu.

    A model that reads its guidance is told of ``cfg``; another one is guided by a second prediction, unless that is 1.
    """
    distilled = schedule.guidance is not None
    usual = schedule.guidance if schedule.guidance is not None else 1.0
    scale = usual if cfg is None else cfg
    guided = not distilled and scale != 1
    conditioning = model.encode_prompts([negative, prompt] if guided else [prompt]).to(model.device)
    if distilled:
        conditioning = replace(conditioning, extra={**conditioning.extra, "guidance": torch.tensor([float(scale)])})
    sigmas = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), math.exp(schedule.mu)).tolist()
    shape = (1, latent_format.channels, *reversed(latent_format.size(*size)))
    latents = torch.randn(shape, generator=generator_for(seed, "preview")).to(model.device)
    for sigma, following in pairwise(sigmas):
        latents = latents + (following - sigma) * guided_pred(model, latents, sigma, conditioning, None, scale)
    return _to_image(model.decode_latents(latents))


def _to_image(pixels: Tensor) -> Image.Image:
    """(1, 3, H, W) in [-1, 1] -> RGB. What is not finite becomes black."""
    levels = ((pixels[0].float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


class ModelPreviewer:
    """The previewer of runs without a WebUI: the lent model in a turn of its own."""

    def __init__(self, model: LentModel, turn: Turn, size: tuple[int, int], steps: int = 20):
        self.model, self.turn = model, turn
        self.width, self.height = size
        self.steps = steps

    def draw(self, prompt: str, seed: int, step: int, adapters: nn.Module) -> Image.Image:
        wanted = parse_prompt(prompt)
        with self.turn():
            return sample(
                self.model,
                wanted.text,
                wanted.negative,
                width=wanted.width or self.width,
                height=wanted.height or self.height,
                steps=wanted.steps or self.steps,
                cfg=wanted.cfg,
                seed=seed if wanted.seed is None else wanted.seed,
            )
