"""Chroma (Chroma1-Base, HD and what has their keys)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_trainer.config.schema import TrainConfig
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning, FlowSchedule
from lora_trainer.models.families.chroma import folder as files
from lora_trainer.models.families.chroma import shapes as reading
from lora_trainer.models.families.chroma.architecture import ChromaShape
from lora_trainer.models.families.chroma.model import ChromaModel, filled_up
from lora_trainer.models.families.chroma.names import layers
from lora_trainer.models.families.chroma.network import Chroma
from lora_trainer.models.families.flow.architecture import FlowArchitecture
from lora_trainer.models.families.flow.family import T5_XXL, idle
from lora_trainer.models.families.flow.names import T5, Layer
from lora_trainer.models.families.flow.tokenizer import FlowTokenizer, t5_tokenizer
from lora_trainer.models.families.flux.layout import FluxLayoutFamily
from lora_trainer.models.family import Shapes
from lora_trainer.models.hints import Hints
from lora_trainer.models.tensors import Tensors
from lora_trainer.models.tokenizer import Tokenizer

_SAMPLER_MU = 1.0
_CFG = 4.5


class ChromaFamily(FluxLayoutFamily):
    name = "chroma"
    title = reading.TITLE
    lora_versions = ("chroma",)
    unused = idle(clip_skip="Chroma reads no CLIP")
    usual = FlowArchitecture(
        "chroma",
        ChromaShape(19, 38, 3072, 24, 12288, 64, 4096, 0, (16, 56, 56), False, 64, 5120, 5),
        None,
        (),
        T5_XXL,
    )
    encoders: Mapping[str, tuple[str, str]] = {T5: ("T5-XXL", "t5xxl_fp16.safetensors")}
    model = ChromaModel

    # Files: FLUX.1's layout, whose family gives bare names their prefix ---------------------------------------------

    def read_folder(self, folder: Path) -> tuple[Tensors, Hints] | None:
        return files.read_folder(folder)

    def claims(self, shapes: Shapes) -> bool:
        return reading.claims(shapes)

    def transformer_shape(self, shapes: Shapes) -> ChromaShape:
        return reading.transformer_shape(shapes)

    def text_widths(self, transformer: ChromaShape) -> dict[str, int]:
        return {"context": transformer.context_dim}

    def given_widths(self, architecture: FlowArchitecture) -> dict[str, int]:
        assert architecture.t5 is not None
        return {"context": architecture.t5.width}

    def check_settings(self, config: TrainConfig) -> None:
        if config.text_encoders_learn:
            raise UserError(
                "Chroma's text encoder, T5, does not learn.",
                field="train_text_encoder",
                remedy="Leave it off, and text_encoder_lr empty.",
            )

    # Computation --------------------------------------------------------------------------------------------------

    def tokenizer(self, folders: Sequence[Path]) -> FlowTokenizer:
        return FlowTokenizer(Tokenizer(_no_clip), t5_tokenizer(list(folders)))

    def network(self, transformer: ChromaShape) -> Chroma:
        return Chroma(transformer)

    def schedule(self, transformer: ChromaShape) -> FlowSchedule:
        return FlowSchedule("sigmoid", _SAMPLER_MU, cfg=_CFG)

    def collate(self, items: Sequence[Conditioning], empty: Conditioning) -> Conditioning:
        return filled_up(items, max(one.context.shape[1] for one in items))

    # Adapters -----------------------------------------------------------------------------------------------------

    def layers(self, transformer: ChromaShape) -> Iterator[Layer]:
        return layers(transformer)

    def lora_metadata(self, prediction_type: str, architecture: Any) -> dict[str, str]:
        return {
            "ss_base_model_version": "chroma",
            "ss_v2": "False",
            "modelspec.architecture": "chroma/lora",
            # By which Forge knows the LoRAs that it offers for FLUX.1 and Chroma.
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        }


def _no_clip() -> Any:
    raise RuntimeError("Chroma reads no CLIP")
