"""A model family: everything that the package asks of a kind of model stands in one object.

A family is a subclass of ``Family`` in a module under ``models.families``, and one row in the table there. Nothing
outside of that folder compares names of families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.config.schema import TrainConfig
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning, LentModel, LoraTarget, ModelArchitecture, ModelInfo
from lora_trainer.models.hints import Hints
from lora_trainer.models.tensors import Tensors
from lora_trainer.models.work import Part

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LatentFormat:
    """The space that the model works in: latents = (output of the VAE's encoder - shift) * scale.

    channels: of the latents. factor: pixels per side of one latent. multiple: a picture's sides are multiples of so
    many pixels.
    """

    channels: int
    factor: int
    multiple: int
    scale: float
    shift: float = 0.0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a picture's latents."""
        return width // self.factor, height // self.factor


@dataclass(frozen=True)
class MetaModel:
    """A model on the meta device: its layers that adapters can attach to, and its number of weights.

    blocks: the number of weights in each of those that ``offload_blocks`` counts. text_encoders, vae: the number of
    weights in these parts; 0 where they are never on the device without the others.
    """

    architecture: Any
    weights: int
    targets: tuple[LoraTarget, ...]
    blocks: tuple[int, ...] = ()
    text_encoders: int = 0
    vae: int = 0


def count_weights(*modules: nn.Module) -> int:
    return sum(weight.numel() for module in modules for weight in module.parameters())


@dataclass(frozen=True)
class Trial:
    """A piece of the model with random weights, on which a device's speed is measured.

    forward: input -> output, of any number of pictures. input: of one picture; requires a gradient. operations:
    floating-point operations of one forward and backward pass on it, as ``Family.parts`` counts them. pieces: how many
    such pieces have as many layers as the model.
    """

    forward: Callable[[Tensor], Tensor]
    input: Tensor
    operations: float
    pieces: float


class Family(ABC):
    """One model family. Methods are called with a family's own ``ModelArchitecture``.

    name: in jobs, the API and messages. title: for people. card_version: "sd version" of A1111's LoRA cards, "" where
    it has none.
    latents: of the family's usual VAE. as_stored: what the names of tensors start with that keep the number format of
    their file, whatever the others are converted to.
    lora_versions: what ``ss_base_model_version`` begins with in LoRAs for this family.
    roomy_bytes: free memory from which on presets suggest batches of several pictures; tight_bytes: below it they
    halve the rank as well. assume_roomy: which it is where the free memory is not known.
    presets: settings that differ for this family, by kind of preset.
    quantized: the weights may be in fp8, GGUF or nf4: the model computes with them as they are.
    offloads: ``build`` knows ``offload_blocks``, the setting, and ``peers`` (``models.sharding``).
    unused: settings that change nothing with this family, each with the reason.
    usual: what the models that people use are made of, without a VAE: it names the layers of a LoRA whose base is not
    at hand. None where there is no such model.
    """

    name: str
    title: str
    card_version: str = ""
    latents: LatentFormat
    as_stored: str | None = None
    lora_versions: tuple[str, ...] = ()
    roomy_bytes: int = 8 << 30
    tight_bytes: int = 4 << 30
    assume_roomy: bool = True
    quantized: bool = False
    offloads: bool = False
    presets: Mapping[str, Mapping[str, Any]] = {}
    unused: Mapping[str, str] = {}
    usual: ModelArchitecture | None = None

    # Files --------------------------------------------------------------------------------------------------------

    def usual_name(self, name: str, names: Mapping[str, Any]) -> str:
        """The name that ``architecture`` and ``build`` know a stored tensor by; ``names``: all of the file's."""
        return name

    def read_folder(self, folder: Path) -> tuple[Tensors, Hints] | None:
        """The tensors of a diffusers folder, and what its configuration says; None for another family's layout.

        Raises:
            UserError: a part of it is missing or cannot be read.
        """
        return None

    def file_hints(self, path: Path, names: Iterable[str], metadata: Mapping[str, str]) -> Hints:
        """What the metadata of a single file, and what lies beside it, say. names: of all tensors.

        Raises:
            UserError: the model is of a kind that cannot be trained.
        """
        return Hints()

    def add_vae(self, tensors: Tensors, path: Path) -> None:
        """Replace the VAE in ``tensors`` by the one in ``path``. Raises UserError when there is none in it."""
        raise UserError(f"{self.title} takes no VAE file.", field="vae", remedy="Leave it empty.")

    def add_text_encoders(self, tensors: Tensors, path: Path) -> None:
        """Replace text encoders in ``tensors`` by those in ``path``. Raises UserError when there are none in it."""
        raise UserError(
            f"{self.title} has its text encoders in the checkpoint.", field="text_encoders", remedy="Leave it empty."
        )

    @abstractmethod
    def claims(self, shapes: Shapes) -> bool:
        """Whether tensors of these names and shapes are a model of this family."""

    def refusal(self, shapes: Shapes, dtypes: Mapping[str, str], source: str | Path, remedy: str) -> UserError | None:
        """Why tensors that resemble this family's, and that nobody claims, cannot be trained; None for others.

        remedy: the usual one.
        """
        return None

    @abstractmethod
    def architecture(
        self, shapes: Shapes, *, dtypes: Mapping[str, str], source: str | Path, hints: Hints
    ) -> ModelArchitecture:
        """What a model that is claimed is made of. dtypes: safetensors names. source: its name in messages.

        Raises:
            UserError: it cannot be trained; says why.
        """

    def check_complete(self, architecture: Any, source: str | Path) -> None:
        """Raises UserError when a part that training needs is missing, such as the VAE."""
        return

    def stored_bytes(self, shapes: Shapes, dtypes: Mapping[str, str]) -> dict[str, int] | None:
        """``ModelInfo.stored`` of such tensors; None where a run converts them."""
        return None

    def a1111_loads(self, architecture: Any) -> bool:
        """Whether AUTOMATIC1111 1.10 loads such a model."""
        return True

    def kind(self, architecture: Any) -> str:
        """What such a model is called, where its family has several."""
        return self.title

    def usual_for(self, version: str, names: Collection[str]) -> Any:
        """Of ``usual`` the one that a LoRA is for; None where there is no such model.

        version: its ``ss_base_model_version``, or "". names: of its layers.
        """
        return self.usual

    def check_settings(self, config: TrainConfig) -> None:
        """Raises UserError for settings that no LoRA of this family can be trained with."""
        if config.shard_base and not self.offloads:
            raise UserError(
                f"{self.title} is not trained on a base of which each process keeps a part.",
                field="shard_base",
                remedy="Use false. FLUX.1, Chroma, SD 3 and language models can be.",
            )

    def prediction_type(self, tensors: Mapping[str, Tensor], architecture: Any) -> str:
        """What the model predicts, where neither the file nor the settings say it."""
        return "epsilon"

    def in_blocks(self, name: str) -> bool:
        """Whether a tensor of this name belongs to the blocks, whose layers ``base_precision`` quantizes; what is
        before and behind them is little."""
        return False

    # Computation --------------------------------------------------------------------------------------------------

    @abstractmethod
    def tokenizer(self, folders: Sequence[Path]) -> Any:
        """What ``build`` is given as tokenizer, for a model from a file. folders: where to look first."""

    @abstractmethod
    def build(
        self,
        tensors: Mapping[str, Tensor],
        architecture: Any,
        tokenizer: Any,
        *,
        info: ModelInfo,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        clip_skip: int = 1,
        alphas_cumprod: Tensor | None = None,
        reload: bool = False,
    ) -> LentModel:
        """The model that computes with ``tensors``, which are aliased on ``device`` and moved from elsewhere.

        compute_dtype: number format of the computation; a weight of another format is cast when its layer runs.
        alphas_cumprod: the lender's noise schedule; None for the family's own.
        reload: the tensors can be read again, so parts may leave the device where its memory does not hold them all.

        Raises:
            UserError: a tensor is missing or has an unexpected shape.
        """

    def collate(self, items: Sequence[Conditioning], empty: Conditioning) -> Conditioning:
        """One batch of encoded captions (each B = 1). ``empty``: the encoding of the empty caption."""
        return Conditioning.stack(items, empty)

    def time_ids(self, sizes: Sequence[Sequence[int]]) -> Tensor | None:
        """What ``predict`` is told of the pictures' sizes, (B, …), or None.

        sizes: of each picture original (h, w), crop (top, left), target (h, w), in pixels.
        """
        return None

    def default_resolution(self, info: ModelInfo) -> int:
        """Side in pixels that the model was trained at."""
        return 512

    # Adapters -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def meta_model(self, architecture: Any) -> MetaModel:
        """The model without weights. To be called in a turn of the lender's, as everything that builds modules."""

    @abstractmethod
    def lora_metadata(self, prediction_type: str, architecture: Any) -> dict[str, str]:
        """Metadata of LoRA files by which readers tell the base model: ``ss_base_model_version``, ``ss_v2``,
        ``modelspec.architecture`` and ``modelspec.implementation``."""

    # Forecast -----------------------------------------------------------------------------------------------------

    def takes_negative(self, architecture: Any) -> bool:
        """``takes_negative`` of the model's noise schedule, at its usual guidance."""
        return True

    @abstractmethod
    def parts(self, architecture: Any, resolution: tuple[int, int], config: TrainConfig) -> Iterator[Part]:
        """The work of a step on one batch of pictures of ``resolution`` (width, height), part by part in the order in
        which they compute."""

    @abstractmethod
    def encoding_numbers(self, architecture: Any, resolution: tuple[int, int]) -> int:
        """Numbers in memory at once while the VAE encodes one picture."""

    @abstractmethod
    def trial(self, architecture: Any, resolution: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Trial:
        """A typical piece of the model, to be tried on one picture. Raises RuntimeError when there is no memory."""
