"""Pictures from the small base without a decoder: DDIM on 16×16 latents, then smooth enlargement."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lora_trainer.demo.vae import reduced_from_latents

TIMESTEPS = 1000


def alphas_cumprod() -> torch.Tensor:
    """The scaled-linear schedule of Stable Diffusion 1, 0.00085 → 0.012: [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


@torch.no_grad()
def sample_latents(
    unet: Any, text: Any, ids: torch.Tensor, empty_ids: torch.Tensor, *, seed: int, steps: int = 16, cfg: float = 3.0
) -> torch.Tensor:
    """Scaled latents [B, 4, 16, 16] for token ids [B, 77] by deterministic DDIM (Song et al. 2021, eq. 12)."""
    alphas = alphas_cumprod()
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn((len(ids), 4, 16, 16), generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        context = text(torch.cat([empty_ids.expand(len(ids), -1), ids])).last_hidden_state
    times = torch.linspace(TIMESTEPS - 1, 0, steps + 1).long()
    for now, after in pairwise(times):
        with torch.autocast("cpu", torch.bfloat16):
            free, told = unet(torch.cat([x, x]), now, context).sample.float().chunk(2)
        noise = free + cfg * (told - free)
        clean = (x - (1 - alphas[now]).sqrt() * noise) / alphas[now].sqrt()
        if after == 0:
            return clean
        x = alphas[after].sqrt() * clean + (1 - alphas[after]).sqrt() * noise
    return x


def pictures_of(latents: torch.Tensor) -> list[Image.Image]:
    """What the constructed decoder makes of scaled latents [B, 4, h, w], without running it: eight times as large."""
    rgb = torch.from_numpy(reduced_from_latents(latents.permute(0, 2, 3, 1).numpy())).permute(0, 3, 1, 2)
    for _ in range(3):
        rgb = F.interpolate(rgb, scale_factor=2, mode="bilinear", align_corners=False)
    pixels = ((rgb.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels]


def sample(unet: Any, text: Any, ids: torch.Tensor, empty_ids: torch.Tensor, **options: Any) -> list[Image.Image]:
    """`sample_latents` as pictures."""
    return pictures_of(sample_latents(unet, text, ids, empty_ids, **options))
