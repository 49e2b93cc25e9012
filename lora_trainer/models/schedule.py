"""The noise schedule that every Stable Diffusion 1, 2 and XL was trained with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def scaled_linear_alphas_cumprod(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> Tensor:
    """Products of (1 - beta) up to each timestep: (steps,) fp32.

    Square roots of beta are spaced evenly; computed in float64 and rounded once, as ldm does
    (``make_beta_schedule`` in CompVis latent-diffusion).
    """
    betas = np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
    return torch.from_numpy(np.cumprod(1.0 - betas)).to(torch.float32)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The schedule stretched so that its last timestep is pure noise: (T,) -> (T,) fp32, the last value 0.

    Algorithm 1 of Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed".
    """
    root = alphas_cumprod.to(torch.float64).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return (((root - last) * (first / (first - last))) ** 2).to(torch.float32)
