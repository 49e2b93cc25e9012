"""What the transformers of flow models have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_CHANNELS = 256
LARGEST_FP16 = 65504.0
THETA = 10_000
EPSILON = 1e-6

Run = Callable[..., Any]


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """x / √(mean(x²) + ε) · scale over the last dimension, computed in fp32."""
    exact = x.float()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPSILON)
    return (exact * scale.float()).to(x.dtype)


class RMSNorm(nn.Module):
    """See ``rms_norm``."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


def adaptive_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then what the time and the text make of it."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift


class LastLayer(nn.Module):
    """Tokens (B, L, width) and the vector (B, width) that time and text were put into -> (B, L, channels)."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)
        return self.linear(adaptive_norm(x, shift, scale))


def finite(x: Tensor) -> Tensor:
    """fp16 cannot hold what the last blocks give for some prompts."""
    return x.clamp(-LARGEST_FP16, LARGEST_FP16) if x.dtype == torch.float16 else x


def directly(block: nn.Module, *inputs: Tensor) -> Any:
    return block(*inputs)


def sinusoids(values: Tensor, channels: int = TIME_CHANNELS) -> Tensor:
    """cos and sin of 1000·value at falling frequencies: (B,) -> (B, channels) fp32."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = 1000 * values.float()[:, None] * torch.exp(-math.log(THETA) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
