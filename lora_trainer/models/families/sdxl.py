"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.models.base import ModelInfo
from lora_trainer.models.families.unet.architecture import Architecture, UNetShape, clip_l, open_clip_text
from lora_trainer.models.families.unet.family import NO_SIGMA, UNetFamily
from lora_trainer.models.families.unet.names import block_of_sgm_name
from lora_trainer.models.families.unet.shapes import ADDED, TextRules
from lora_trainer.models.family import Shapes


class SDXL(UNetFamily):
    """Its UNet also reads the second text encoder's pooled output and the pictures' sizes."""

    name = "sdxl"
    title = "SDXL"
    card_version = "SDXL"
    latents = replace(UNetFamily.latents, scale=0.13025)
    lora_versions = ("sdxl_",)
    text_encoders = (
        TextRules("conditioner.embedders.0."),
        TextRules("conditioner.embedders.1.", open_clip=True, projected=True),
    )
    usual = Architecture(
        "sdxl",
        UNetShape((320, 640, 1280), (2, 2, 2), (0, 2, 10), 10, (5, 10, 20), 2048, True, 2816),
        None,
        (
            clip_l("conditioner.embedders.0.transformer."),
            open_clip_text("conditioner.embedders.1.model.", 1280, 32, projection=1280),
        ),
    )
    names_of_file = True
    text_prefixes = ("lora_te1", "lora_te2")
    unused: Mapping[str, str] = {"clip_skip": "SDXL fixes the layer of its text encoders", **NO_SIGMA}
    implementation = "https://github.com/Stability-AI/generative-models"
    roomy_bytes, tight_bytes, assume_roomy = 20 << 30, 10 << 30, False

    def _resembles(self, shapes: Shapes) -> bool:
        return ADDED in shapes and any(name.startswith(self.text_encoders[1].stage) for name in shapes)

    def hidden_state(self, encoder: nn.Module, output: Any, clip_skip: int) -> Tensor:
        return output.hidden_states[-2]

    def time_ids(self, sizes: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(sizes)

    def default_resolution(self, info: ModelInfo) -> int:
        return 1024

    def block_of(self, diffusers_name: str, name_in_file: str) -> int | None:
        return block_of_sgm_name(name_in_file)

    def _versions(self, predicts_v: bool) -> tuple[str, str]:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
