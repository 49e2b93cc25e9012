"""What every host offers, whether it is AUTOMATIC1111, Forge or nothing but files.

A host lends models, draws previews, publishes finished LoRAs and says what may be touched. It holds no training
logic; nothing here names one host's habits.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from lora_trainer.captioning.base import HostCaptioner
from lora_trainer.models.base import Lender
from lora_trainer.models.families.causal_lm.folder import language_models_in
from lora_trainer.models.families.causal_lm.lender import LanguageModelLender


@dataclass(frozen=True)
class Checkpoint:
    """One base model of the host's list.

    title: what the user sees and what ``Host.lender`` takes.
    selected: what "" means to ``Host.lender``, and what the host draws its next picture with.
    loaded: it is in memory now. A host that loads late has another one there, or none, until the next picture.
    """

    title: str
    path: Path | None
    selected: bool = False
    loaded: bool = False


@dataclass(frozen=True)
class ModelFiles:
    """What another process reads a base model from. vae, text_encoders: files of those that the host adds to it."""

    model: Path
    vae: Path | None = None
    text_encoders: tuple[Path, ...] = ()


class DeviceLeft(Protocol):
    """The host's device while its model is not on it."""

    @property
    def somebody_waits(self) -> bool:
        """Whether somebody wants to use the host."""
        ...

    def rest(self) -> AbstractContextManager[None]:
        """Inside, the host works, with its model on the device."""
        ...


@dataclass(frozen=True)
class Folders:
    """Where things live.

    data: the trainer's own folder (datasets, jobs, states, logs); never under ``lora``.
    lora: where the host looks for LoRAs; None when it has no such folder.
    language_models: where ``Host.language_models`` are looked for.
    """

    data: Path
    lora: Path | None
    language_models: tuple[Path, ...] = ()


@dataclass(frozen=True)
class AccessPolicy:
    """What the host lets remote callers do.

    api_credentials: user -> password that API calls must present; None when the API is open.
    roots: folders (resolved) that paths given by a caller must lie in; None when any folder may be read, as for a
        WebUI that listens to its own machine alone.
    hide_paths: server folders must not be offered or accepted at all (the host's --hide-ui-dir-config).
    names: under which a WebUI that listens to its own machine alone may be called, besides localhost and addresses:
        those of a proxy in front of it.
    """

    api_credentials: dict[str, str] | None = None
    roots: tuple[Path, ...] | None = None
    hide_paths: bool = False
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class LenderOptions:
    """How a run wants its model: the fields of the configuration that decide on the weights' form.

    compute_dtype: number format of the computation; None for what suits the weights and the device. The weights that a
        WebUI lends keep theirs; those of a file are converted to it.
    device: where to compute; None for where the host does. A WebUI computes nowhere else.
    vae: file of another VAE; None for the one that the host uses. text_encoders: files of those that a base model's
        file does not hold; a WebUI chooses them itself.
    base_precision, offload_blocks: the settings, auto as 0; a WebUI lends the weights as and where it holds them.
    hold: keep the host to ourselves for the whole run instead of step by step.
    wait_for_model: a checkpoint switch by the user waits until the run is over, instead of pausing the run.
    """

    clip_skip: int = 1
    v_prediction: bool | None = None
    zero_terminal_snr: bool | None = None
    compute_dtype: torch.dtype | None = torch.float32
    device: torch.device | None = None
    vae: str | None = None
    text_encoders: tuple[str, ...] = ()
    base_precision: str = "stored"
    offload_blocks: int = 0
    hold: bool = False
    wait_for_model: bool = False


@dataclass(frozen=True)
class Card:
    """What a host's picker shows of a LoRA."""

    activation_text: str = ""
    preferred_weight: float = 0.8
    description: str = ""
    notes: str = ""
    negative_text: str = ""
    sd_version: str = ""  # "SD1", "SD2", "SDXL"
    thumbnail: Image.Image | None = None


HIGHEST_WEIGHT = 10.0


def is_lora_weight(weight: float) -> bool:
    """Whether a LoRA can be used at this weight: a number other than 0, of at most ``HIGHEST_WEIGHT`` in size."""
    return math.isfinite(weight) and 0 < abs(weight) <= HIGHEST_WEIGHT


@dataclass(frozen=True)
class PreviewRequest:
    """One picture to draw. Sizes in pixels.

    checkpoint: title, path or stem of the base model; "" for the loaded one. lora: path of the weights to draw with,
    wherever it lies; None draws with the base alone.
    """

    prompt: str
    checkpoint: str = ""
    negative_prompt: str = ""
    seed: int = 1
    width: int = 512
    height: int = 512
    steps: int = 20
    cfg_scale: float | None = None  # None: what is usual for the model
    lora: Path | None = None
    lora_weight: float = 1.0


class Host(Protocol):
    """A place where the trainer runs. Hosts derive from it; what has a body here is the usual answer."""

    name: str  # "a1111", "forge", "standalone"

    def folders(self) -> Folders: ...

    def access(self) -> AccessPolicy: ...

    def option(self, key: str, default: object) -> object:
        """A setting the user made on the host's settings page; ``default`` where there is none."""
        ...

    def checkpoints(self) -> list[Checkpoint]:
        """Every base model in the host's list, the selected one and the loaded one marked."""
        ...

    def selected(self) -> Checkpoint | None:
        """The selected one of ``checkpoints``, if any. Cheap: it is asked for with every look of a page."""
        return next((one for one in self.checkpoints() if one.selected), None)

    def device(self) -> torch.device:
        """Where lent models compute."""
        ...

    def weight_dtype(self) -> torch.dtype | None:
        """Number format of the weights that are lent; None where they are converted to that of the run, or none are
        there yet."""
        return None

    def lender(self, checkpoint: str, options: LenderOptions) -> Lender:
        """The lender of a checkpoint by title, path or stem; "" is the loaded one.

        Raises UserError naming ``base_model`` when there is none or it cannot be trained.
        """
        ...

    def language_models(self) -> dict[str, Path]:
        """The folders of the language models that may be trained by these names."""
        return language_models_in(self.folders().language_models)

    def cleared(self, lender: LanguageModelLender) -> Lender:
        """The same lender; while it lends, the host's own model is not on the device, and afterwards as it was."""
        return lender

    def model_files(self, checkpoint: str) -> ModelFiles:
        """The files of a checkpoint that is named as for ``lender``. Raises UserError naming ``base_model`` when there
        is none."""
        ...

    def device_left(self) -> AbstractContextManager[DeviceLeft | None]:
        """Inside, the host's own model is not on the device, and is afterwards as it was; None for a host that has
        none there."""
        return nullcontext()

    def captioners(self) -> Mapping[str, HostCaptioner]:
        """The host's own captioners by name, "host-blip" and "host-deepbooru"; also those whose files are missing."""
        return {}

    def model_bytes(self) -> int:
        """What the host's own model takes of the device now; a lent one is that model, or takes its place."""
        return 0

    def device_turn(self) -> AbstractContextManager[Any]:
        """Inside, the host's device is ours for something else than a training, such as a batch of captions; outside,
        the host may work. Modules are built inside, too."""
        return nullcontext()

    def spare_turn(self) -> AbstractContextManager[bool]:
        """The host's device for a moment; False, at once, and not ours, when somebody computes on it now."""
        ...

    def draw(self, request: PreviewRequest) -> Image.Image:
        """One picture by the host's own sampler. Called outside a turn; takes one itself.

        Raises UserError when the checkpoint is not in the list, or somebody interrupted the drawing.
        """
        ...

    def draw_all(
        self, requests: Sequence[PreviewRequest], options: LenderOptions | None = None
    ) -> Generator[Image.Image, None, None]:
        """Pictures of one base model, in the order of ``requests``; it is loaded once, where it is not loaded. Others
        have their turns in between. Close the iterator early and what was loaded before comes back as well.

        options: for a host that has no sampler of its own.
        """
        yield from map(self.draw, requests)

    def publish(self, lora: Path, name: str, card: Card, *, overwrite: bool = False) -> Path:
        """Copy a finished LoRA into the host's LoRA folder with its card, and make the picker show it.

        Returns the path there. Raises UserError naming ``output_name`` when the name is taken and not ``overwrite``.
        """
        ...

    def verify(self, lora: Path, prompt: str) -> str | None:
        """Load a published LoRA through the host's own loader and draw a fixed picture with and without it.

        Returns None when every key found its layer and the picture changed, else a sentence that says what did not.
        """
        ...

    def forget(self, name: str) -> None:
        """Drop what the host remembers of a LoRA's earlier weights, also where they are merged into its model."""
        return None
