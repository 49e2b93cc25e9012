"""FLUX.1 dev and schnell, and what has their keys (Kontext and Krea as plain text-to-image)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.config.schema import TrainConfig
from lora_trainer.models.base import FlowSchedule, LoraTarget, ModelInfo
from lora_trainer.models.families.flow.architecture import T5Shape
from lora_trainer.models.families.flow.folder import add_text_encoders
from lora_trainer.models.families.flow.names import CLIP_L, T5
from lora_trainer.models.families.flow.shapes import refuse_storage
from lora_trainer.models.families.flow.t5 import T5Encoder
from lora_trainer.models.families.flow.tokenizer import FlowTokenizer, load_tokenizers
from lora_trainer.models.families.flux import folder as files
from lora_trainer.models.families.flux import shapes as reading
from lora_trainer.models.families.flux.architecture import FluxArchitecture, FluxShape
from lora_trainer.models.families.flux.model import FluxModel
from lora_trainer.models.families.flux.names import usual_name
from lora_trainer.models.families.flux.network import Flux
from lora_trainer.models.families.flux.targets import lora_targets
from lora_trainer.models.families.flux.work import parts, trial
from lora_trainer.models.families.unet.architecture import clip_l
from lora_trainer.models.families.unet.binding import build_text_encoder, build_vae
from lora_trainer.models.families.unet.folder import add_vae_file
from lora_trainer.models.family import Family, LatentFormat, MetaModel, Shapes, Trial
from lora_trainer.models.hints import Hints
from lora_trainer.models.tensors import Tensors
from lora_trainer.models.work import Part

_ENCODERS = {CLIP_L: ("CLIP-L", "clip_l.safetensors"), T5: ("T5", "t5xxl_fp16.safetensors (or fp8)")}
_ENCODER_COPIES = 5  # as of Stable Diffusion's VAE, whose encoder this one's is
_FLOW = "FLUX.1 learns by flow matching"
_GUIDANCE = 3.5  # that the hosts draw with
_SAMPLER_MU = {True: 1.15, False: 1.0}  # of dev, and of schnell


class FluxFamily(Family):
    name = "flux"
    title = reading.TITLE
    card_version = "Flux"
    latents = LatentFormat(channels=16, factor=8, multiple=16, scale=0.3611, shift=0.1159)
    as_stored = ""  # every tensor: 12 billion numbers are not converted, each layer casts its own
    lora_versions = ("flux",)
    quantized = True
    roomy_bytes, tight_bytes, assume_roomy = 60 << 30, 10 << 30, False
    presets: Mapping[str, Mapping[str, Any]] = {
        kind: {"learning_rate": 1e-4, "lora_rank": 16, "alpha": 16, "batch_size": 1, "gradient_checkpointing": True}
        for kind in ("style", "character", "scene", "object")
    }
    unused: Mapping[str, str] = {
        "v_prediction": _FLOW,
        "zero_terminal_snr": _FLOW,
        "min_snr_gamma": _FLOW,
        "debiased_estimation": _FLOW,
        "clip_skip": "FLUX.1 reads only the end of CLIP",
        "weighted_captions": "FLUX.1's text encoders know no emphasis",
        "conv_rank": "FLUX.1 has no convolutions",
        "block_ranks": "FLUX.1 has other blocks than a UNet",
        "block_lr_weights": "FLUX.1 has other blocks than a UNet",
    }
    usual = FluxArchitecture(
        "flux",
        FluxShape(19, 38, 3072, 24, 12288, 64, 4096, 768, (16, 56, 56), guidance=True),
        None,
        clip_l(CLIP_L),
        T5Shape(T5, 4096, 24, 4096, 64, 10240, 32128, 32),
    )

    # Files --------------------------------------------------------------------------------------------------------

    def usual_name(self, name: str, names: Mapping[str, Any]) -> str:
        return usual_name(name, names)

    def read_folder(self, folder: Path) -> tuple[Tensors, Hints] | None:
        return files.read_folder(folder)

    def add_vae(self, tensors: Tensors, path: Path) -> None:
        add_vae_file(tensors, path)

    def add_text_encoders(self, tensors: Tensors, path: Path) -> None:
        add_text_encoders(tensors, path, _ENCODERS)

    def claims(self, shapes: Shapes) -> bool:
        return reading.claims(shapes)

    def architecture(
        self, shapes: Shapes, *, dtypes: Mapping[str, str], source: str | Path, hints: Hints
    ) -> FluxArchitecture:
        refuse_storage(shapes, dtypes, source, self.title)
        return reading.architecture(shapes, self.name, self.latents, source)

    def check_complete(self, architecture: FluxArchitecture, source: str | Path) -> None:
        reading.check_complete(architecture, source)

    def prediction_type(self, tensors: Mapping[str, Tensor], architecture: FluxArchitecture) -> str:
        return "flow"

    # Computation --------------------------------------------------------------------------------------------------

    def tokenizer(self, folders: Sequence[Path]) -> FlowTokenizer:
        return load_tokenizers(folders)

    def build(
        self,
        tensors: Mapping[str, Tensor],
        architecture: FluxArchitecture,
        tokenizer: FlowTokenizer,
        *,
        info: ModelInfo,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        clip_skip: int = 1,
        alphas_cumprod: Tensor | None = None,
        reload: bool = False,
    ) -> FluxModel:
        """tensors: by their names in an all-in-one file (``model.diffusion_model.…``, ``first_stage_model.…``,
        ``text_encoders.clip_l.transformer.…``, ``text_encoders.t5xxl.transformer.…``), in any mix of number formats.
        """
        self.check_complete(architecture, info.name)
        guided = architecture.transformer.guidance
        schedule = FlowSchedule("flux_shift", _SAMPLER_MU[guided], _GUIDANCE if guided else None)
        return FluxModel(
            self, tensors, architecture, tokenizer, info, torch.device(device), compute_dtype, schedule, reload
        )

    def default_resolution(self, info: ModelInfo) -> int:
        return 1024

    # Adapters -----------------------------------------------------------------------------------------------------

    def targets(
        self, transformer: nn.Module, clip: Sequence[nn.Module], architecture: FluxArchitecture
    ) -> list[LoraTarget]:
        return lora_targets(transformer, clip, architecture)

    def meta_model(self, architecture: FluxArchitecture) -> MetaModel:
        with torch.device("meta"):
            transformer = Flux(architecture.transformer)
            t5 = [] if architecture.t5 is None else [T5Encoder(architecture.t5)]
        clip = [] if architecture.clip is None else [build_text_encoder(architecture.clip)[0]]
        vae = [] if architecture.vae is None else [build_vae(architecture.vae)[0]]
        weights = sum(weight.numel() for part in (transformer, *vae, *clip, *t5) for weight in part.parameters())
        return MetaModel(architecture, weights, tuple(self.targets(transformer, clip, architecture)))

    def lora_metadata(self, prediction_type: str) -> dict[str, str]:
        return {
            "ss_base_model_version": "flux1",
            "ss_v2": "False",
            "modelspec.architecture": "flux-1-dev/lora",
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        }

    # Forecast -----------------------------------------------------------------------------------------------------

    def parts(self, architecture: FluxArchitecture, resolution: tuple[int, int], config: TrainConfig) -> Iterator[Part]:
        return parts(architecture, self.latents, resolution, config)

    def encoding_numbers(self, architecture: FluxArchitecture, resolution: tuple[int, int]) -> int:
        return _ENCODER_COPIES * architecture.own_vae.channels[0] * prod(resolution)

    def trial(
        self, architecture: FluxArchitecture, resolution: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Trial:
        return trial(architecture.transformer, self.latents, resolution, device, dtype)
