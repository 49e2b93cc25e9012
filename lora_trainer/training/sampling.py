"""Steps of a sampler on the lent model: for previews, and for latents that are half denoised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_trainer.models.base import Conditioning, LentModel, NoiseSchedule


def guided_pred(
    model: LentModel,
    latents: Tensor,
    timestep: float,
    conditioning: Conditioning,
    time_ids: Tensor | None,
    cfg: float,
) -> Tensor:
    """ε or v by classifier-free guidance, (B, C, h, w). latents: (B, C, h, w). conditioning, time_ids: (2B, …), the
    negative prompts first; (B, …) predicts without guidance."""
    count = len(conditioning)
    timesteps = torch.full((count,), timestep, device=latents.device)
    repeated = latents.repeat(count // len(latents), 1, 1, 1)
    model_pred = model.predict(repeated, timesteps, conditioning, time_ids).float()
    if count == len(latents):
        return model_pred
    negative, positive = model_pred.chunk(2)
    return negative + cfg * (positive - negative)


def ddim_scheduler(schedule: NoiseSchedule) -> Any:
    """Diffusers' DDIM sampler on the very schedule that is trained."""
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
