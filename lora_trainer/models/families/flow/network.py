"""What the transformers of flow models have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TIME_CHANNELS = 256
LARGEST_FP16 = 65504.0
THETA = 10_000
EPSILON = 1e-6

Run = Callable[..., Any]


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
