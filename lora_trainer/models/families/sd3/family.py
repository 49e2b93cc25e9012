"""Stable Diffusion 3 medium, and 3.5 medium and large."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_trainer.config.schema import TrainConfig
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning, FlowSchedule
from lora_trainer.models.families.flow.architecture import FlowArchitecture
from lora_trainer.models.families.flow.family import T5_XXL, FlowFamily, idle
from lora_trainer.models.families.flow.names import CLIP_G, CLIP_L, T5, Layer
from lora_trainer.models.families.sd3 import folder as files
from lora_trainer.models.families.sd3 import shapes as reading
from lora_trainer.models.families.sd3.architecture import Sd3Shape
from lora_trainer.models.families.sd3.model import T5_CONTEXT, Sd3Model
from lora_trainer.models.families.sd3.names import layers, usual_name
from lora_trainer.models.families.sd3.network import MMDiT
from lora_trainer.models.families.sd3.shapes import MEDIUM
from lora_trainer.models.families.sd3.work import parts, trial
from lora_trainer.models.families.unet.architecture import TextShape, clip_l
from lora_trainer.models.family import LatentFormat, Shapes, Trial
from lora_trainer.models.hints import Hints
from lora_trainer.models.tensors import Tensors
from lora_trainer.models.work import Part

_SHIFT = 3.0  # of the hosts' sampler
_CFG = 4.5


def _usual(variant: str) -> FlowArchitecture:
    return FlowArchitecture(
        "sd3",
        reading.USUAL[variant],
        None,
        (
            clip_l(CLIP_L),
            TextShape(CLIP_G, "transformers", 1280, 32, 5120, 20, "gelu", 49408, 77, 1280, "zero"),
        ),
        T5_XXL,
    )


class Sd3Family(FlowFamily):
    name = "sd3"
    title = reading.TITLE
    latents = LatentFormat(channels=16, factor=8, multiple=16, scale=1.5305, shift=0.0609)
    lora_versions = ("3-medium", "3-5-", "sd3")  # the last is ours of before
    roomy_bytes, tight_bytes = 24 << 30, 8 << 30
    unused = idle(clip_skip="the WebUI says which layer of CLIP Stable Diffusion 3 reads")
    usual = _usual(MEDIUM)
    encoders: Mapping[str, tuple[str, str]] = {
        CLIP_L: ("CLIP-L", "clip_l.safetensors"),
        CLIP_G: ("CLIP-G", "clip_g.safetensors"),
        T5: ("T5-XXL", "t5xxl_fp16.safetensors"),
    }
    needs_t5 = False
    vae_file = "sd3_vae.safetensors"
    alpha = False  # A1111 drops a whole file that holds one
    model = Sd3Model

    # Files --------------------------------------------------------------------------------------------------------

    def usual_name(self, name: str, names: Mapping[str, Any]) -> str:
        return usual_name(name, names)

    def read_folder(self, folder: Path) -> tuple[Tensors, Hints] | None:
        return files.read_folder(folder)

    def claims(self, shapes: Shapes) -> bool:
        return reading.claims(shapes)

    def transformer_shape(self, shapes: Shapes) -> Sd3Shape:
        return reading.transformer_shape(shapes)

    def input_channels(self, transformer: Sd3Shape) -> int:
        return transformer.channels

    def text_widths(self, transformer: Sd3Shape) -> dict[str, int]:
        return {"pooled": transformer.pooled_dim, "context": transformer.context_dim}

    def given_widths(self, architecture: FlowArchitecture) -> dict[str, int]:
        pooled = sum(clip.projection or clip.width for clip in architecture.clips)
        return {"pooled": pooled} | ({} if architecture.t5 is None else {"context": architecture.t5.width})

    def a1111_loads(self, architecture: FlowArchitecture) -> bool:
        return reading.variant(architecture.transformer) == MEDIUM

    def kind(self, architecture: FlowArchitecture) -> str:
        return reading.TITLES[reading.variant(architecture.transformer)]

    def usual_for(self, version: str, names: Collection[str]) -> FlowArchitecture:
        return _usual(reading.variant_of_lora(version, names))

    def check_settings(self, config: TrainConfig) -> None:
        if config.adapter != "lora" or config.dora:
            raise UserError(
                "A LoRA of Stable Diffusion 3 is a plain one: A1111 drops a file that holds anything else.",
                field="adapter",
                remedy="Use adapter: lora without dora.",
            )
        if config.text_encoders_learn:
            raise UserError(
                "Stable Diffusion 3's text encoders do not learn: no one file of theirs is read by A1111 and Forge.",
                field="train_text_encoder",
                remedy="Leave it off, and text_encoder_lr empty.",
            )

    # Computation --------------------------------------------------------------------------------------------------

    def network(self, transformer: Sd3Shape) -> MMDiT:
        return MMDiT(transformer)

    def schedule(self, transformer: Sd3Shape) -> FlowSchedule:
        return FlowSchedule("logit_normal", math.log(_SHIFT), cfg=_CFG)

    def collate(self, items: Sequence[Conditioning], empty: Conditioning) -> Conditioning:
        """T5's encodings, too, may be of unequal length: where its prompts are as long as CLIP's."""
        longest = max(one.extra[T5_CONTEXT].shape[1] if T5_CONTEXT in one.extra else 0 for one in items)
        filled = [Conditioning(one.context, one.pooled, _filled(one.extra, longest, empty)) for one in items]
        return Conditioning.stack(filled, empty)

    # Adapters -----------------------------------------------------------------------------------------------------

    def layers(self, transformer: Sd3Shape) -> Iterator[Layer]:
        return layers(transformer)

    def lora_metadata(self, prediction_type: str, architecture: Any) -> dict[str, str]:
        return {
            "ss_base_model_version": reading.variant(architecture.transformer),
            "ss_v2": "False",
            "modelspec.architecture": "stable-diffusion-3/lora",
            "modelspec.implementation": "https://github.com/Stability-AI/sd3-ref",
        }

    # Forecast -----------------------------------------------------------------------------------------------------

    def parts(self, architecture: FlowArchitecture, resolution: tuple[int, int], config: TrainConfig) -> Iterator[Part]:
        return parts(architecture.transformer, self.latents, resolution, config)

    def trial(
        self, architecture: FlowArchitecture, resolution: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Trial:
        return trial(architecture.transformer, self.latents, resolution, device, dtype)


def _filled(extra: Mapping[str, Tensor], length: int, empty: Conditioning) -> Mapping[str, Tensor]:
    """With T5's encoding filled up to ``length`` with that of the empty caption."""
    if T5_CONTEXT not in extra:
        return extra
    own, filler = extra[T5_CONTEXT], empty.extra[T5_CONTEXT]
    missing = (length - own.shape[1]) // filler.shape[1]
    return {**extra, T5_CONTEXT: torch.cat([own, *[filler.to(own)] * missing], dim=1)}
