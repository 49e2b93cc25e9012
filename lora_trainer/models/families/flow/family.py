"""What flow-matching transformers have in common as families: their files, their text encoders, their numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.errors import UserError
from lora_trainer.models.base import FlowSchedule, LoraTarget, ModelInfo
from lora_trainer.models.families.flow.architecture import FlowArchitecture, T5Shape
from lora_trainer.models.families.flow.folder import add_text_encoders
from lora_trainer.models.families.flow.model import FlowModel, blocks_of
from lora_trainer.models.families.flow.names import T5, TRANSFORMER, Layer
from lora_trainer.models.families.flow.shapes import clip_shape, refuse_storage, t5_shape, vae_shape
from lora_trainer.models.families.flow.t5 import T5Encoder
from lora_trainer.models.families.flow.targets import transformer_targets
from lora_trainer.models.families.flow.tokenizer import FlowTokenizer, load_tokenizers
from lora_trainer.models.families.unet.binding import build_text_encoder, build_vae
from lora_trainer.models.families.unet.folder import add_vae_file
from lora_trainer.models.families.unet.names import VAE
from lora_trainer.models.family import Family, MetaModel, Shapes, count_weights
from lora_trainer.models.hints import Hints
from lora_trainer.models.sharding import Peers
from lora_trainer.models.tensors import Tensors, stored_size

T5_XXL = T5Shape(T5, 4096, 24, 4096, 64, 10240, 32128, 32)
_ENCODER_COPIES = 5  # as of Stable Diffusion's VAE, whose encoder this one's is
_KINDS = ("style", "character", "scene", "object")
_IDLE = ("v_prediction", "zero_terminal_snr", "min_snr_gamma", "debiased_estimation")


def idle(**more: str) -> dict[str, str]:
    """``Family.unused`` of a flow model. more: further settings, each with its reason."""
    return {
        **dict.fromkeys(_IDLE, "the model learns by flow matching"),
        "weighted_captions": "the model's text encoders know no emphasis",
        "conv_rank": "the model has no convolutions",
        "block_ranks": "the model has other blocks than a UNet",
        "block_lr_weights": "the model has other blocks than a UNet",
        **more,
    }


class FlowFamily(Family):
    """encoders: the text encoders by what the names of their tensors start with: what each is called, and its usual
    file. needs_t5: it cannot do without T5. vae_file: the usual file of the VAE. alpha: see ``LoraTarget``."""

    as_stored = ""  # every tensor: billions of numbers are not converted, each layer casts its own
    quantized = offloads = True
    assume_roomy = False
    presets: Mapping[str, Mapping[str, Any]] = {
        kind: {"learning_rate": 1e-4, "lora_rank": 16, "alpha": 16, "batch_size": 1, "gradient_checkpointing": True,
               "preserve": 0.0}
        for kind in _KINDS
    }  # fmt: skip
    encoders: Mapping[str, tuple[str, str]]
    needs_t5 = True
    vae_file: str
    alpha = True

    # What families differ in ---------------------------------------------------------------------------------------

    @abstractmethod
    def transformer_shape(self, shapes: Shapes) -> Any:
        """Raises KeyError, IndexError or ValueError where layers are missing."""

    @abstractmethod
    def input_channels(self, transformer: Any) -> int:
        """Of the latents that it reads."""

    @abstractmethod
    def network(self, transformer: Any) -> nn.Module: ...

    @abstractmethod
    def layers(self, transformer: Any) -> Iterable[Layer]: ...

    @abstractmethod
    def text_widths(self, transformer: Any) -> dict[str, int]:
        """What the transformer reads of text, by a word for it; see ``given_widths``."""

    @abstractmethod
    def given_widths(self, architecture: FlowArchitecture) -> dict[str, int]:
        """What the text encoders that are there give, by the same words."""

    @abstractmethod
    def schedule(self, transformer: Any) -> FlowSchedule: ...

    def takes_negative(self, architecture: FlowArchitecture) -> bool:
        return self.schedule(architecture.transformer).takes_negative()

    @property
    @abstractmethod
    def model(self) -> type[FlowModel]: ...

    # Files --------------------------------------------------------------------------------------------------------

    def add_vae(self, tensors: Tensors, path: Path) -> None:
        add_vae_file(tensors, path)

    def add_text_encoders(self, tensors: Tensors, path: Path) -> None:
        add_text_encoders(tensors, path, self.encoders)

    def architecture(
        self, shapes: Shapes, *, dtypes: Mapping[str, str], source: str | Path, hints: Hints
    ) -> FlowArchitecture:
        refuse_storage(shapes, dtypes, source, self.title)
        remedy = f"Choose a complete, unmodified {self.title}."
        try:
            transformer = self.transformer_shape(shapes)
            clips = [clip_shape(shapes, prefix) for prefix in self.encoders if prefix != T5]
            t5 = t5_shape(shapes)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"{source} is {self.title}, but lacks layers or has others ({error}).",
                field="base_model",
                remedy=remedy,
            ) from error
        if (channels := self.input_channels(transformer)) != self.latents.channels:
            raise UserError(
                f"{source} is a {self.title} that also reads another picture ({channels} channels), which cannot be "
                "trained here.",
                field="base_model",
                remedy=remedy,
            )
        vae = vae_shape(shapes, self.latents, self.title)
        return FlowArchitecture(self.name, transformer, vae, tuple(clip for clip in clips if clip is not None), t5)

    def check_complete(self, architecture: FlowArchitecture, source: str | Path) -> None:
        """Raises UserError for the first part that no file holds."""
        if architecture.vae is None:
            raise UserError(
                f"{source} has no VAE.", field="vae", remedy=f"Name {self.title}'s VAE ({self.vae_file}) with vae: …"
            )
        there = {clip.prefix for clip in architecture.clips} | ({T5} if architecture.t5 is not None else set())
        for prefix, (title, file) in self.encoders.items():
            if prefix not in there and (prefix != T5 or self.needs_t5):
                raise UserError(
                    f"{source} has no text encoder {title}.",
                    field="text_encoders",
                    remedy=f"Name the file of {title} ({file}) with text_encoders: …",
                )
        given, read = self.given_widths(architecture), self.text_widths(architecture.transformer)
        if wrong := [kind for kind, width in given.items() if width != read[kind]]:
            raise UserError(
                f"{source}: the text encoders give {' and '.join(str(given[kind]) for kind in wrong)} values and the "
                f"transformer reads {' and '.join(str(read[kind]) for kind in wrong)}; they do not belong together.",
                field="text_encoders",
            )

    def in_blocks(self, name: str) -> bool:
        return name.startswith(TRANSFORMER) and "_blocks." in name

    def stored_bytes(self, shapes: Shapes, dtypes: Mapping[str, str]) -> dict[str, int]:
        found = dict.fromkeys(("unet", "vae", "text_encoders"), 0)
        for name, shape in shapes.items():
            part = "unet" if name.startswith(TRANSFORMER) else "vae" if name.startswith(VAE) else "text_encoders"
            found[part] += stored_size(dtypes[name], shape)
        return found

    def a1111_loads(self, architecture: FlowArchitecture) -> bool:
        return False

    def prediction_type(self, tensors: Mapping[str, Tensor], architecture: FlowArchitecture) -> str:
        return "flow"

    # Computation --------------------------------------------------------------------------------------------------

    def tokenizer(self, folders: Sequence[Path]) -> FlowTokenizer:
        return load_tokenizers(folders)

    def build(
        self,
        tensors: Mapping[str, Tensor],
        architecture: FlowArchitecture,
        tokenizer: FlowTokenizer,
        *,
        info: ModelInfo,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        clip_skip: int = 1,
        alphas_cumprod: Tensor | None = None,
        reload: bool = False,
        offload_blocks: int = 0,
        peers: Peers | None = None,
    ) -> FlowModel:
        """tensors: by their names in an all-in-one file (``model.diffusion_model.…``, ``first_stage_model.…``,
        ``text_encoders.clip_l.transformer.…``, ``text_encoders.t5xxl.transformer.…``), in any mix of number formats.
        """
        self.check_complete(architecture, info.name)
        device = torch.device(device)
        return self.model(
            self, tensors, architecture, tokenizer, info, device, compute_dtype, reload, offload_blocks, peers
        )  # fmt: skip

    def default_resolution(self, info: ModelInfo) -> int:
        return 1024

    # Adapters -----------------------------------------------------------------------------------------------------

    def targets(
        self, transformer: nn.Module, clips: Sequence[nn.Module], architecture: FlowArchitecture
    ) -> list[LoraTarget]:
        """Every layer that an adapter can attach to. clips: those of the CLIPs that may learn and are there."""
        return transformer_targets(transformer, self.layers(architecture.transformer), self.alpha)

    def meta_model(self, architecture: FlowArchitecture) -> MetaModel:
        with torch.device("meta"):
            transformer = self.network(architecture.transformer)
            t5 = [] if architecture.t5 is None else [T5Encoder(architecture.t5)]
        clips = [build_text_encoder(shape)[0] for shape in architecture.clips]
        vae = 0 if architecture.vae is None else count_weights(build_vae(architecture.vae)[0])
        text_encoders = count_weights(*clips, *t5)
        return MetaModel(
            architecture,
            count_weights(transformer) + vae + text_encoders,
            tuple(self.targets(transformer, clips, architecture)),
            tuple(count_weights(block) for block in blocks_of(transformer)),
            text_encoders,
            vae,
        )

    # Forecast -----------------------------------------------------------------------------------------------------

    def encoding_numbers(self, architecture: FlowArchitecture, resolution: tuple[int, int]) -> int:
        return _ENCODER_COPIES * architecture.own_vae.channels[0] * prod(resolution)
