"""FLUX.1 dev and schnell, and what has their keys (Kontext and Krea as plain text-to-image)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_trainer.config.schema import TrainConfig
from lora_trainer.models.base import FlowSchedule, LoraTarget
from lora_trainer.models.families.flow.architecture import FlowArchitecture, T5Shape
from lora_trainer.models.families.flow.family import FlowFamily, idle
from lora_trainer.models.families.flow.names import CLIP_L, T5, Layer
from lora_trainer.models.families.flux import folder as files
from lora_trainer.models.families.flux import shapes as reading
from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.families.flux.model import FluxModel
from lora_trainer.models.families.flux.names import layers, usual_name
from lora_trainer.models.families.flux.network import Flux
from lora_trainer.models.families.flux.work import parts, trial
from lora_trainer.models.families.unet.architecture import clip_l
from lora_trainer.models.families.unet.binding import text_body
from lora_trainer.models.families.unet.targets import text_targets
from lora_trainer.models.family import LatentFormat, Shapes, Trial
from lora_trainer.models.hints import Hints
from lora_trainer.models.tensors import Tensors
from lora_trainer.models.work import Part

_GUIDANCE = 3.5  # that the hosts draw with
_SAMPLER_MU = {True: 1.15, False: 1.0}  # of dev, and of schnell


class FluxFamily(FlowFamily):
    name = "flux"
    title = reading.TITLE
    card_version = "Flux"
    latents = LatentFormat(channels=16, factor=8, multiple=16, scale=0.3611, shift=0.1159)
    lora_versions = ("flux",)
    roomy_bytes, tight_bytes = 60 << 30, 10 << 30
    unused = idle(clip_skip="FLUX.1 reads only the end of CLIP")
    usual = FlowArchitecture(
        "flux",
        FluxShape(19, 38, 3072, 24, 12288, 64, 4096, 768, (16, 56, 56), guidance=True),
        None,
        (clip_l(CLIP_L),),
        T5Shape(T5, 4096, 24, 4096, 64, 10240, 32128, 32),
    )
    encoders: Mapping[str, tuple[str, str]] = {
        CLIP_L: ("CLIP-L", "clip_l.safetensors"), T5: ("T5-XXL", "t5xxl_fp16.safetensors")
    }  # fmt: skip
    vae_file = "ae.safetensors"
    model = FluxModel

    # Files --------------------------------------------------------------------------------------------------------

    def usual_name(self, name: str, names: Mapping[str, Any]) -> str:
        return usual_name(name, names)

    def read_folder(self, folder: Path) -> tuple[Tensors, Hints] | None:
        return files.read_folder(folder)

    def claims(self, shapes: Shapes) -> bool:
        return reading.claims(shapes)

    def transformer_shape(self, shapes: Shapes) -> FluxShape:
        return reading.transformer_shape(shapes)

    def input_channels(self, transformer: FluxShape) -> int:
        return transformer.channels // 4

    def text_widths(self, transformer: FluxShape) -> dict[str, int]:
        return {"context": transformer.context_dim, "pooled": transformer.pooled_dim}

    def given_widths(self, architecture: FlowArchitecture) -> dict[str, int]:
        assert architecture.t5 is not None
        return {"context": architecture.t5.width, "pooled": architecture.clips[0].width}

    # Computation --------------------------------------------------------------------------------------------------

    def network(self, transformer: FluxShape) -> Flux:
        return Flux(transformer)

    def schedule(self, transformer: FluxShape) -> FlowSchedule:
        guided = transformer.guidance
        return FlowSchedule("flux_shift", _SAMPLER_MU[guided], _GUIDANCE if guided else None)

    # Adapters -----------------------------------------------------------------------------------------------------

    def layers(self, transformer: FluxShape) -> Iterator[Layer]:
        return layers(transformer)

    def targets(
        self, transformer: nn.Module, clips: Sequence[nn.Module], architecture: FlowArchitecture
    ) -> list[LoraTarget]:
        found = super().targets(transformer, clips, architecture)
        for clip, shape in zip(clips, architecture.clips):
            found += text_targets(text_body(clip), shape, "lora_te1", 0)
        return found

    def lora_metadata(self, prediction_type: str, architecture: Any) -> dict[str, str]:
        return {
            "ss_base_model_version": "flux1",
            "ss_v2": "False",
            "modelspec.architecture": "flux-1-dev/lora",
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        }

    # Forecast -----------------------------------------------------------------------------------------------------

    def parts(self, architecture: FlowArchitecture, resolution: tuple[int, int], config: TrainConfig) -> Iterator[Part]:
        return parts(architecture, self.latents, resolution, config)

    def trial(
        self, architecture: FlowArchitecture, resolution: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Trial:
        return trial(architecture.transformer, self.latents, resolution, device, dtype)
