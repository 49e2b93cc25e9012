"""Stable Diffusion 3's transformer (Esser et al. 2024, "MM-DiT") with the layout and the parameter names of Stability's
files. q, k and v are one layer: a quantized weight cannot be cut, and LoRA files name the layers so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_trainer.models.families.flow.network import (
    TIME_CHANNELS,
    LastLayer,
    RMSNorm,
    Run,
    adaptive_norm,
    directly,
    finite,
    sinusoids,
)
from lora_trainer.models.families.sd3.architecture import Sd3Shape
from lora_trainer.storage import dense_weight, packing_of

PATCH = 2


class SelfAttention(nn.Module):
    """proj: None where nothing reads what comes out."""

    def __init__(self, shape: Sd3Shape, last: bool = False):
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.ln_q, self.ln_k = (RMSNorm(shape.head_dim) if shape.normalized else None for _ in range(2))
        self.proj = None if last else nn.Linear(shape.width, shape.width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, width) -> q, k and v, (B, heads, L, head_dim) each."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (q, k, v) if self.ln_q is None or self.ln_k is None else (self.ln_q(q), self.ln_k(k), v)


class MLP(nn.Module):
    def __init__(self, shape: Sd3Shape):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Stream(nn.Module):
    """What one side of a block has for itself. last: nothing reads this side after the attention. dual: it also attends
    to itself alone."""

    def __init__(self, shape: Sd3Shape, last: bool = False, dual: bool = False):
        super().__init__()
        count = 2 if last else 9 if dual else 6
        self.count = count
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(shape.width, count * shape.width))
        self.attn = SelfAttention(shape, last)
        self.attn2 = SelfAttention(shape) if dual else None
        self.mlp = None if last else MLP(shape)

    def modulations(self, vector: Tensor) -> Sequence[Tensor]:
        """Shift, scale and gate (B, 1, width) of the attention, of the MLP, of the second attention: what there is."""
        return self.adaLN_modulation(vector)[:, None].chunk(self.count, dim=-1)

    def after(self, x: Tensor, mixed: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """mixed: what of the attention is this side's."""
        assert self.attn.proj is not None and self.mlp is not None, "the last one ends with the attention"
        attended = x + modulations[2] * self.attn.proj(mixed)
        if self.attn2 is not None and self.attn2.proj is not None:
            alone = _attention(*self.attn2.split(adaptive_norm(x, modulations[6], modulations[7])))
            attended = attended + modulations[8] * self.attn2.proj(alone)
        x = attended
        return finite(x + modulations[5] * self.mlp(adaptive_norm(x, modulations[3], modulations[4])))


class JointBlock(nn.Module):
    """Text and image, each with weights of its own, in one attention. The last block gives no text."""

    def __init__(self, shape: Sd3Shape, last: bool, dual: bool):
        super().__init__()
        self.context_block, self.x_block = Stream(shape, last=last), Stream(shape, dual=dual)

    def forward(self, context: Tensor, x: Tensor, vector: Tensor) -> tuple[Tensor | None, Tensor]:
        of_context, of_x = self.context_block.modulations(vector), self.x_block.modulations(vector)
        q, k, v = (
            torch.cat(both, dim=2)
            for both in zip(
                self.context_block.attn.split(adaptive_norm(context, *of_context[:2])),
                self.x_block.attn.split(adaptive_norm(x, *of_x[:2])),
            )
        )
        from_context, from_x = _attention(q, k, v).split([context.shape[1], x.shape[1]], dim=1)
        x = self.x_block.after(x, from_x, of_x)
        if self.context_block.mlp is None:
            return None, x
        return self.context_block.after(context, from_context, of_context), x


class Patches(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, PATCH, stride=PATCH)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, 2h, 2w) -> (B, h·w, width)."""
        return self.proj(latents).flatten(2).transpose(1, 2)


class Embedder(nn.Module):
    """(B, in) -> (B, width)."""

    def __init__(self, inside: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inside, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class MMDiT(nn.Module):
    """Latents (B, C, 2h, 2w), text (B, L, 4096), pooled text (B, 2048), time (B,) in [0, 1] -> (B, C, 2h, 2w).

    run: computes a block; with gradient checkpointing it is torch's ``checkpoint``.
    """

    def __init__(self, shape: Sd3Shape):
        super().__init__()
        self.positions, width = shape.positions, shape.width
        self.x_embedder, self.context_embedder = Patches(shape.channels, width), nn.Linear(shape.context_dim, width)
        self.t_embedder, self.y_embedder = Embedder(TIME_CHANNELS, width), Embedder(shape.pooled_dim, width)
        self.pos_embed = nn.Parameter(torch.empty(1, shape.positions**2, width))
        self.joint_blocks = nn.ModuleList(
            JointBlock(shape, last=index == shape.blocks - 1, dual=index < shape.dual) for index in range(shape.blocks)
        )
        self.final_layer = LastLayer(width, shape.channels * PATCH**2)
        self.run: Run = directly

    def forward(self, latents: Tensor, context: Tensor, pooled: Tensor, time: Tensor) -> Tensor:
        rows, columns = latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
        x = self.x_embedder(latents) + self._positions(rows, columns, latents.dtype)
        vector = self.t_embedder(sinusoids(time).to(x.dtype)) + self.y_embedder(pooled)
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, x = self.run(block, context, x, vector)
        x = self.final_layer(x, vector).unflatten(1, (rows, columns)).unflatten(-1, (PATCH, PATCH, -1))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)

    def _positions(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """(1, rows·columns, width): the middle of the table."""
        side = self.positions
        if max(rows, columns) > side:
            raise ValueError(f"this model knows pictures of up to {side}×{side} patches, not {rows}×{columns}")
        top, left = (side - rows) // 2, (side - columns) // 2
        table: Tensor = self.pos_embed
        if packing_of(table) is not None or not table.is_floating_point():
            table = dense_weight(table, dtype)
        # Cast after it was cut: the table is that of the largest picture.
        table = table.unflatten(1, (side, side))[:, top : top + rows, left : left + columns]
        return dense_weight(table, dtype).flatten(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, L, D) each -> (B, L, H·D)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
