"""FLUX.1 dev and schnell, and what has their keys (Kontext and Krea as plain text-to-image)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_trainer.models.base import FlowSchedule, LoraTarget
from lora_trainer.models.families.flow.architecture import FlowArchitecture
from lora_trainer.models.families.flow.family import T5_XXL, idle
from lora_trainer.models.families.flow.names import CLIP_L, T5, Layer
from lora_trainer.models.families.flux import folder as files
from lora_trainer.models.families.flux import shapes as reading
from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.families.flux.layout import FluxLayoutFamily
from lora_trainer.models.families.flux.model import FluxModel
from lora_trainer.models.families.flux.names import layers, usual_name
from lora_trainer.models.families.flux.network import Flux
from lora_trainer.models.families.unet.architecture import clip_l
from lora_trainer.models.families.unet.binding import text_body
from lora_trainer.models.families.unet.targets import text_targets
from lora_trainer.models.family import Shapes
from lora_trainer.models.hints import Hints
from lora_trainer.models.tensors import Tensors

_GUIDANCE = 3.5  # that the hosts draw with
_SAMPLER_MU = {True: 1.15, False: 1.0}  # of dev, and of schnell


class FluxFamily(FluxLayoutFamily):
    name = "flux"
    title = reading.TITLE
    lora_versions = ("flux",)
    unused = idle(clip_skip="FLUX.1 reads only the end of CLIP")
    usual = FlowArchitecture(
        "flux",
        FluxShape(19, 38, 3072, 24, 12288, 64, 4096, 768, (16, 56, 56), guidance=True),
        None,
        (clip_l(CLIP_L),),
        T5_XXL,
    )
    encoders: Mapping[str, tuple[str, str]] = {
        CLIP_L: ("CLIP-L", "clip_l.safetensors"), T5: ("T5-XXL", "t5xxl_fp16.safetensors")
    }  # fmt: skip
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

    def text_widths(self, transformer: FluxShape) -> dict[str, int]:
        return {"context": transformer.context_dim, "pooled": transformer.pooled_dim}

    def given_widths(self, architecture: FlowArchitecture) -> dict[str, int]:
        assert architecture.t5 is not None
        return {"context": architecture.t5.width, "pooled": architecture.clips[0].width}

    # Computation --------------------------------------------------------------------------------------------------

    def network(self, transformer: FluxShape) -> Flux:
        return Flux(transformer)

    def schedule(self, transformer: FluxShape) -> FlowSchedule:
        distilled = transformer.guidance
        return FlowSchedule("flux_shift", _SAMPLER_MU[distilled], _GUIDANCE if distilled else None)

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
