"""Chroma's transformer with the layout and the parameter names of its files: FLUX.1's blocks, whose modulations come
from one small network that is told of the time, and of which modulation it is to make.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_trainer.devices import to_device
from lora_trainer.models.families.chroma.architecture import ChromaShape
from lora_trainer.models.families.flow.network import Run, adaptive_norm, directly, sinusoids
from lora_trainer.models.families.flux.network import DoubleBlock, Embedder, RMSNorm, SingleBlock, rotations


class ModulationMaker(nn.Module):
    """Time (B,) in [0, 1] -> all modulations (B, N, width)."""

    def __init__(self, shape: ChromaShape):
        super().__init__()
        self.inputs, self.count, width = shape.maker_inputs, shape.modulations, shape.maker_width
        self.in_proj, self.out_proj = nn.Linear(self.inputs, width), nn.Linear(width, shape.width)
        self.layers = nn.ModuleList(Embedder(width, width) for _ in range(shape.maker_layers))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(shape.maker_layers))

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        quarter = self.inputs // 4
        # At angles of many thousands the rounding of their sines differs between devices: those of the CPU count.
        which = to_device(sinusoids(torch.arange(self.count), 2 * quarter), time.device)
        told = torch.cat([sinusoids(time, quarter), sinusoids(torch.zeros_like(time), quarter)], dim=-1)
        told = told[:, None].expand(-1, self.count, -1)
        x = self.in_proj(torch.cat([told, which.expand(len(time), -1, -1)], dim=-1).to(dtype))
        for layer, norm in zip(self.layers, self.norms):
            x = x + layer(norm(x))
        return self.out_proj(x)


class GivenDoubleBlock(DoubleBlock):
    """vector: its twelve modulations, (B, 12, width)."""

    modulated = False

    def modulations(self, vector: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        parts = vector.split(1, dim=1)
        return parts[:6], parts[6:]


class GivenSingleBlock(SingleBlock):
    """vector: its three modulations, (B, 3, width)."""

    modulated = False

    def modulations(self, vector: Tensor) -> Sequence[Tensor]:
        return vector.split(1, dim=1)


class GivenLastLayer(nn.Module):
    def __init__(self, shape: ChromaShape):
        super().__init__()
        self.linear = nn.Linear(shape.width, shape.channels)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.linear(adaptive_norm(x, *vector.split(1, dim=1)))


class Chroma(nn.Module):
    """Patches (B, h·w, 64), text (B, L, 4096), time (B,) -> (B, h·w, 64).

    run: computes a block; with gradient checkpointing it is torch's ``checkpoint``.
    """

    def __init__(self, shape: ChromaShape):
        super().__init__()
        self.axes = shape.axes
        self.img_in, self.txt_in = nn.Linear(shape.channels, shape.width), nn.Linear(shape.context_dim, shape.width)
        self.distilled_guidance_layer = ModulationMaker(shape)
        self.double_blocks = nn.ModuleList(GivenDoubleBlock(shape) for _ in range(shape.double))
        self.single_blocks = nn.ModuleList(GivenSingleBlock(shape) for _ in range(shape.single))
        self.final_layer = GivenLastLayer(shape)
        self.run: Run = directly

    def forward(
        self, img: Tensor, txt: Tensor, time: Tensor, size: tuple[int, int], lengths: Tensor | None = None
    ) -> Tensor:
        """size: (h, w) in patches. lengths: (B,), how many tokens of the text count; None for all."""
        img, txt = self.img_in(img), self.txt_in(txt)
        made = self.distilled_guidance_layer(time, img.dtype)
        double, single = len(self.double_blocks), len(self.single_blocks)
        of_single, of_img, of_txt, last = made.split([3 * single, 6 * double, 6 * double, 2], dim=1)
        rotation = rotations(txt.shape[1], size, self.axes, img.device)
        mask = None
        if lengths is not None:
            counts = torch.arange(txt.shape[1], device=img.device) < lengths[:, None]
            mask = torch.cat([counts, counts.new_ones(len(img), img.shape[1])], dim=1)[:, None, None]
        for index, block in enumerate(self.double_blocks):
            own = slice(6 * index, 6 * index + 6)
            vector = torch.cat([of_img[:, own], of_txt[:, own]], dim=1)
            img, txt = self.run(block, img, txt, vector, rotation, mask)
        x = torch.cat([txt, img], dim=1)
        for index, block in enumerate(self.single_blocks):
            x = self.run(block, x, of_single[:, 3 * index : 3 * index + 3], rotation, mask)
        return self.final_layer(x[:, txt.shape[1] :], last)
