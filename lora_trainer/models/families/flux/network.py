"""FLUX.1's transformer with the layout and the parameter names of Black Forest Labs' files.

q, k and v are one layer, and so are they and the MLP's first layer in the single blocks: a quantized weight cannot be
cut, and LoRA files name the layers so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_trainer.devices import to_device
from lora_trainer.models.families.flow.network import (
    THETA,
    TIME_CHANNELS,
    LastLayer,
    Run,
    adaptive_norm,
    directly,
    finite,
    rms_norm,
    sinusoids,
)
from lora_trainer.models.families.flux.architecture import FluxShape


class RMSNorm(nn.Module):
    """See ``rms_norm``."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(head_dim), RMSNorm(head_dim)


class Embedder(nn.Module):
    """Two layers with SiLU between them: (B, in) -> (B, width)."""

    def __init__(self, inside: int, width: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(inside, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """``count`` shifts, scales and gates, (B, 1, width) each, by the vector that everything else was put into."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count, self.lin = count, nn.Linear(width, count * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vector))[:, None].chunk(self.count, dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(width, 3 * width), QKNorm(head_dim), nn.Linear(width, width)


def _split_heads(qkv: Tensor, norm: QKNorm, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3·width) -> three of (B, heads, L, head_dim); q and k normalized."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return norm.query_norm(q), norm.key_norm(k), v


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers, turned. x: (B, H, L, D); rotation: (L, D/2, 2), cosine and sine."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation.unbind(-1)
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1).flatten(-2).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, L, D) each -> (B, L, H·D). mask: (B, 1, 1, L), True for the tokens that count."""
    mixed = F.scaled_dot_product_attention(_rotate(q, rotation), _rotate(k, rotation), v, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    """Image and text, each with weights of its own, in one attention. modulated: it makes its modulations itself."""

    modulated = True

    def __init__(self, shape: FluxShape):
        super().__init__()
        self.heads, width = shape.heads, shape.width
        for side in ("img", "txt"):
            if self.modulated:
                setattr(self, f"{side}_mod", Modulation(width, 6))
            setattr(self, f"{side}_attn", SelfAttention(width, shape.head_dim))
            mlp = nn.Sequential(nn.Linear(width, shape.hidden), nn.GELU("tanh"), nn.Linear(shape.hidden, width))
            setattr(self, f"{side}_mlp", mlp)

    def modulations(self, vector: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Of image and text, (B, 1, width) each: shift, scale, gate, and again for the MLP."""
        return self.img_mod(vector), self.txt_mod(vector)

    def forward(
        self, img: Tensor, txt: Tensor, vector: Tensor, rotation: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.modulations(vector)
        q, k, v = (
            torch.cat(both, dim=2)  # the text comes first
            for both in zip(
                _split_heads(self.txt_attn.qkv(adaptive_norm(txt, *txt_mod[:2])), self.txt_attn.norm, self.heads),
                _split_heads(self.img_attn.qkv(adaptive_norm(img, *img_mod[:2])), self.img_attn.norm, self.heads),
            )
        )
        mixed = _attention(q, k, v, rotation, mask)
        from_txt, from_img = mixed.split([txt.shape[1], img.shape[1]], dim=1)
        img = img + img_mod[2] * self.img_attn.proj(from_img)
        img = img + img_mod[5] * self.img_mlp(adaptive_norm(img, *img_mod[3:5]))
        txt = txt + txt_mod[2] * self.txt_attn.proj(from_txt)
        txt = txt + txt_mod[5] * self.txt_mlp(adaptive_norm(txt, *txt_mod[3:5]))
        return finite(img), finite(txt)


class SingleBlock(nn.Module):
    """Attention and MLP beside each other, over text and image together. modulated: see ``DoubleBlock``."""

    modulated = True

    def __init__(self, shape: FluxShape):
        super().__init__()
        self.heads, self.width = shape.heads, shape.width
        self.linear1 = nn.Linear(shape.width, 3 * shape.width + shape.hidden)
        self.linear2 = nn.Linear(shape.width + shape.hidden, shape.width)
        self.norm = QKNorm(shape.head_dim)
        if self.modulated:
            self.modulation = Modulation(shape.width, 3)

    def modulations(self, vector: Tensor) -> Sequence[Tensor]:
        return self.modulation(vector)

    def forward(self, x: Tensor, vector: Tensor, rotation: Tensor, mask: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulations(vector)
        qkv, hidden = self.linear1(adaptive_norm(x, shift, scale)).tensor_split([3 * self.width], dim=-1)
        mixed = _attention(*_split_heads(qkv, self.norm, self.heads), rotation, mask)
        return finite(x + gate * self.linear2(torch.cat([mixed, F.gelu(hidden, approximate="tanh")], dim=-1)))


class Flux(nn.Module):
    """Patches (B, h·w, 64), text (B, L, 4096), pooled text (B, 768), time and guidance (B,) -> (B, h·w, 64).

    run: computes a block; with gradient checkpointing it is torch's ``checkpoint``.
    """

    def __init__(self, shape: FluxShape):
        super().__init__()
        self.axes, width = shape.axes, shape.width
        self.img_in, self.txt_in = nn.Linear(shape.channels, width), nn.Linear(shape.context_dim, width)
        self.time_in, self.vector_in = Embedder(TIME_CHANNELS, width), Embedder(shape.pooled_dim, width)
        self.guidance_in = Embedder(TIME_CHANNELS, width) if shape.guidance else None
        self.double_blocks = nn.ModuleList(DoubleBlock(shape) for _ in range(shape.double))
        self.single_blocks = nn.ModuleList(SingleBlock(shape) for _ in range(shape.single))
        self.final_layer = LastLayer(width, shape.channels)
        self.run: Run = directly

    def forward(
        self, img: Tensor, txt: Tensor, pooled: Tensor, time: Tensor, guidance: Tensor | None, size: tuple[int, int]
    ) -> Tensor:
        """size: (h, w) in patches. time: in [0, 1]."""
        img, txt = self.img_in(img), self.txt_in(txt)
        vector = self.time_in(sinusoids(time).to(img.dtype)) + self.vector_in(pooled)
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model reads its guidance")
            vector = vector + self.guidance_in(sinusoids(guidance).to(img.dtype))
        rotation = rotations(txt.shape[1], size, self.axes, img.device)
        for block in self.double_blocks:
            img, txt = self.run(block, img, txt, vector, rotation)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = self.run(block, x, vector, rotation)
        return self.final_layer(x[:, txt.shape[1] :], vector)


def rotations(text: int, size: tuple[int, int], axes: Sequence[int], device: torch.device) -> Tensor:
    """Cosines and sines of every token's position, (L, D/2, 2) fp32: those of the text are all at 0, those of the image
    at (0, row, column)."""
    rows, columns = size
    ids = torch.zeros(text + rows * columns, 3, dtype=torch.float64)
    ids[text:, 1] = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    ids[text:, 2] = torch.arange(columns, dtype=torch.float64).repeat(rows)
    angles = torch.cat(
        [
            ids[:, axis, None] * THETA ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
            for axis, channels in enumerate(axes)
        ],
        dim=-1,
    )
    return to_device(torch.stack([angles.cos(), angles.sin()], dim=-1).float(), device)


def patches(latents: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> (B, h·w, 4C), in the order channel, row, column."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpatched(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h·w, 4C) -> (B, C, 2h, 2w)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, size), 2)
