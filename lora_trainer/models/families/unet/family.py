"""The methods that Stable Diffusion 1, 2 and XL have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_trainer.config.schema import TrainConfig
from lora_trainer.errors import UserError
from lora_trainer.models.base import LoraTarget, ModelInfo, NoiseSchedule
from lora_trainer.models.families.unet import folder as files
from lora_trainer.models.families.unet import shapes as reading
from lora_trainer.models.families.unet.architecture import Architecture
from lora_trainer.models.families.unet.binding import build_text_encoder, build_unet, build_vae
from lora_trainer.models.families.unet.names import VAE, block_of_diffusers_name
from lora_trainer.models.families.unet.targets import lora_targets
from lora_trainer.models.families.unet.work import parts
from lora_trainer.models.family import Family, LatentFormat, MetaModel, Shapes, Trial, count_weights
from lora_trainer.models.hints import Hints, file_hints
from lora_trainer.models.other_files import other_family, other_file
from lora_trainer.models.schedule import rescale_zero_terminal_snr, scaled_linear_alphas_cumprod
from lora_trainer.models.tensors import Tensors
from lora_trainer.models.tokenizer import Tokenizer, load_tokenizer
from lora_trainer.models.work import Part

if TYPE_CHECKING:
    from lora_trainer.models.families.unet.model import DiffusionModel

_ENCODER_COPIES = 5
"""Pictures of the VAE's first width that are there at once while one is encoded (measured)."""


NO_SIGMA = dict.fromkeys(("sigma_sampling", "sigma_shift"), "only flow models draw their noise levels so")


class UNetFamily(Family):
    """A UNet with cross-attention, CLIP text encoders and a KL autoencoder with 4 channels.

    text_encoders: in the order of the single file. heads: of every attention in the UNet, where nothing says it; None
    for heads of 64 channels.
    names_of_file: the UNet's layers have the names of the single file in LoRAs, instead of diffusers'.
    text_prefixes: what the names of the text encoders' layers start with there.
    """

    latents = LatentFormat(channels=reading.LATENT_CHANNELS, factor=8, multiple=8, scale=0.18215)
    as_stored = VAE
    unused: Mapping[str, str] = NO_SIGMA
    presets: Mapping[str, Mapping[str, Any]] = {"turn": {"target_modules": ["attn2"]}}  # which read the prompt
    text_encoders: tuple[reading.TextRules, ...]
    heads: int | None = None
    names_of_file = False
    text_prefixes: tuple[str, ...] = ("lora_te",)
    implementation = "diffusers"  # in ModelSpec: whose names the layers have
    is_v2 = False

    # Files --------------------------------------------------------------------------------------------------------

    def usual_name(self, name: str, names: Mapping[str, Any]) -> str:
        return files.usual_name(name, names)

    def read_folder(self, folder: Path) -> tuple[Tensors, Hints] | None:
        return files.read_folder(folder)

    def file_hints(self, path: Path, names: Iterable[str], metadata: Mapping[str, str]) -> Hints:
        return file_hints(path, names, metadata)

    def add_vae(self, tensors: Tensors, path: Path) -> None:
        files.add_vae_file(tensors, path)

    def claims(self, shapes: Shapes) -> bool:
        return (
            reading.has_unet(shapes)
            and reading.input_channels(shapes) == self.latents.channels
            and self._resembles(shapes)
            and other_file(shapes) is None
            and other_family(shapes) is None
        )

    def _resembles(self, shapes: Shapes) -> bool:
        """Whether a UNet that reads 4 channels is of this family."""
        raise NotImplementedError

    def refusal(self, shapes: Shapes, dtypes: Mapping[str, str], source: str | Path, remedy: str) -> UserError | None:
        return reading.refusal(shapes, source, remedy)

    def architecture(
        self, shapes: Shapes, *, dtypes: Mapping[str, str], source: str | Path, hints: Hints
    ) -> Architecture:
        reading.refuse_storage(shapes, dtypes, self.title, source)
        return reading.read_architecture(
            shapes,
            self.name,
            self.text_encoders,
            scale=self.latents.scale,
            heads=self.heads,
            source=source,
            hints=hints,
        )

    def check_complete(self, architecture: Architecture, source: str | Path) -> None:
        if architecture.vae is None:
            raise UserError(f"{source} has no VAE.", field="vae", remedy="Name a VAE file with vae: …")

    # Computation --------------------------------------------------------------------------------------------------

    def tokenizer(self, folders: Sequence[Path]) -> Tokenizer:
        return load_tokenizer(folders)

    def build(
        self,
        tensors: Mapping[str, Tensor],
        architecture: Architecture,
        tokenizer: Tokenizer,
        *,
        info: ModelInfo,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        clip_skip: int = 1,
        alphas_cumprod: Tensor | None = None,
        reload: bool = False,
    ) -> DiffusionModel:
        """tensors: by their single-file names (``model.diffusion_model.…``, ``first_stage_model.…``,
            ``cond_stage_model.…`` or ``conditioner.embedders.…``), in any mix of floating-point formats. Nothing writes
            to them.
        clip_skip: SD 1 reads the text encoder's layer this far from the end; SD 2 and XL are fixed to the last but one.
        """
        from lora_trainer.models.families.unet.model import DiffusionModel  # diffusers is slow to import

        self.check_complete(architecture, info.name)
        if alphas_cumprod is None:
            alphas_cumprod = scaled_linear_alphas_cumprod()
            if info.zero_terminal_snr:
                alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod)
        schedule = NoiseSchedule(alphas_cumprod.detach().float().cpu().clone(), info.prediction_type)
        return DiffusionModel(
            self,
            tensors,
            architecture,
            tokenizer,
            info,
            torch.device(device),
            compute_dtype,
            clip_skip,
            schedule,
            reload,
        )

    def hidden_state(self, encoder: nn.Module, output: Any, clip_skip: int) -> Tensor:
        """(B, 77, D): the layer of a text encoder that the UNet reads."""
        return output.last_hidden_state

    # Adapters -----------------------------------------------------------------------------------------------------

    def targets(
        self, unet: nn.Module, text_encoders: Sequence[nn.Module], architecture: Architecture
    ) -> list[LoraTarget]:
        """Every layer that an adapter can attach to: the UNet's, then those of the text encoders that are given."""
        return lora_targets(unet, text_encoders, architecture, self.names_of_file, self.block_of, self.text_prefixes)

    def block_of(self, diffusers_name: str, name_in_file: str) -> int | None:
        """kohya's number of the block that a layer of the UNet belongs to."""
        return block_of_diffusers_name(diffusers_name)

    def meta_model(self, architecture: Architecture) -> MetaModel:
        unet, _ = build_unet(architecture.unet)
        encoders = [build_text_encoder(shape)[0] for shape in architecture.text_encoders]
        vae = 0 if architecture.vae is None else count_weights(build_vae(architecture.vae)[0])
        targets, text = self.targets(unet, encoders, architecture), count_weights(*encoders)
        return MetaModel(architecture, count_weights(unet) + vae + text, tuple(targets), (), text, vae)

    def lora_metadata(self, prediction_type: str, architecture: Any) -> dict[str, str]:
        version, standard = self._versions(prediction_type == "v_prediction")
        return {
            "ss_base_model_version": version,
            "ss_v2": str(self.is_v2),
            "modelspec.architecture": f"{standard}/lora",
            "modelspec.implementation": self.implementation,
        }

    def _versions(self, predicts_v: bool) -> tuple[str, str]:
        """kohya's name of the base model (A1111 tells SDXL LoRAs by its ``sdxl_``), and ModelSpec's architecture."""
        raise NotImplementedError

    # Forecast -----------------------------------------------------------------------------------------------------

    def parts(self, architecture: Architecture, resolution: tuple[int, int], config: TrainConfig) -> Iterator[Part]:
        return parts(architecture, self.latents, resolution, config)

    def encoding_numbers(self, architecture: Architecture, resolution: tuple[int, int]) -> int:
        return _ENCODER_COPIES * architecture.own_vae.channels[0] * prod(resolution)

    def trial(
        self, architecture: Architecture, resolution: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Trial:
        from lora_trainer.models.families.unet.trial import trial  # diffusers is slow to import

        return trial(architecture.unet, self.latents, resolution, device, dtype)
