"""The WebUI's own captioners: the BLIP of its interrogator, and deepbooru, by its own code and its rules for memory.

Both would download what they miss, so their files are looked for first. Everything but that happens inside turns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lora_trainer.captioning.base import Description, HostCaptioner, Settings, Tag

_TOKENIZER = "bert-base-uncased"
_TOKENIZER_FILES = ("vocab.txt", "tokenizer_config.json")
_TAGGED_SIDE = 512  # pixels, the side of deepbooru's input


class OwnCaptioner(ABC):
    """One of the WebUI's captioners. Its network may be sent away by the WebUI between two batches, and comes back.

    somebody_waits: then the WebUI needs the device before the next batch. What was loaded before is left loaded.
    """

    def __init__(self, webui: Any, settings: Settings, somebody_waits: Callable[[], bool]):
        self._webui, self._settings, self._somebody_waits = webui, settings, somebody_waits
        self._was_loaded = self._is_loaded()
        self._to_device()

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        self._to_device()
        descriptions = self._describe(images)
        if self._somebody_waits():
            self._leave_device()
        return descriptions

    def close(self) -> None:
        self._leave_device()
        if not self._was_loaded and not self._webui.shared.opts.interrogate_keep_models_in_memory:
            self._drop()
        self._webui.devices.torch_gc()

    @abstractmethod
    def _describe(self, images: Sequence[Image.Image]) -> list[Description]: ...

    @abstractmethod
    def _is_loaded(self) -> bool: ...

    @abstractmethod
    def _to_device(self) -> None:
        """Load the network where that was not done yet, and bring it to the device."""

    @abstractmethod
    def _leave_device(self) -> None:
        """What the WebUI itself does after use; nothing where the user wants to keep it there."""

    @abstractmethod
    def _drop(self) -> None: ...


class OwnBlip(OwnCaptioner):
    """``generate_caption`` of the interrogator. Its ``load`` would bring CLIP along, which nobody needs here."""

    @property
    def _interrogator(self) -> Any:
        return self._webui.shared.interrogator

    def _describe(self, images: Sequence[Image.Image]) -> list[Description]:
        return [Description(sentence=self._interrogator.generate_caption(image).strip()) for image in images]

    def _is_loaded(self) -> bool:
        return self._interrogator.blip_model is not None

    def _leave_device(self) -> None:
        self._interrogator.send_blip_to_ram()

    def _drop(self) -> None:
        self._interrogator.blip_model = None


class OwnDeepbooru(OwnCaptioner):
    """Deepbooru's network, asked for its scores: the words that ``tag_multi`` makes of them have lost these, and
    follow the settings of another page."""

    @property
    def _deepbooru(self) -> Any:
        return self._webui.deepbooru.model

    def _describe(self, images: Sequence[Image.Image]) -> list[Description]:
        network = self._deepbooru.model
        place = next(network.parameters())
        resized = [self._webui.images.resize_image(2, image, _TAGGED_SIDE, _TAGGED_SIDE, "None") for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(one.convert("RGB"), np.float32) for one in resized]) / 255)
        with torch.no_grad(), self._webui.devices.autocast():
            scores = network(pixels.to(place.device, place.dtype)).float().cpu()  # (B, tags)
        unwanted = {tag.strip() for tag in self._webui.shared.opts.deepbooru_filter_tags.replace(" ", "_").split(",")}
        return [Description(tags=self._tags(network.tags, row.tolist(), unwanted)) for row in scores]

    def _tags(self, names: Sequence[str], scores: Sequence[float], unwanted: set[str]) -> tuple[Tag, ...]:
        found = [
            Tag(name, score)
            for name, score in zip(names, scores)
            if score >= self._settings.threshold and not name.startswith("rating:") and name not in unwanted
        ]
        return tuple(sorted(found, key=lambda tag: -tag.score))

    def _is_loaded(self) -> bool:
        return self._deepbooru.model is not None

    def _to_device(self) -> None:
        self._deepbooru.start()

    def _leave_device(self) -> None:
        self._deepbooru.stop()

    def _drop(self) -> None:
        self._deepbooru.model = None


def own_captioners(
    webui: Any, blip: type[OwnBlip], deepbooru: type[OwnDeepbooru], somebody_waits: Callable[[], bool]
) -> dict[str, HostCaptioner]:
    """Both by name, as this kind of WebUI runs them; for one whose files are missing, which, how large and where to."""
    models = Path(webui.paths.models_path)
    shown = Path("models") if getattr(webui.shared.cmd_opts, "hide_ui_dir_config", False) else models
    blip_problem, blip_remedy = _lacks_blip(models, shown, webui.paths.paths) or (None, None)
    tags_problem, tags_remedy = _lacks_deepbooru(models, shown) or (None, None)
    return {
        "host-blip": HostCaptioner(
            "The WebUI's BLIP, a sentence",
            lambda settings: blip(webui, settings, somebody_waits),
            blip_problem, blip_remedy,
        ),
        "host-deepbooru": HostCaptioner(
            "The WebUI's deepbooru, tags",
            lambda settings: deepbooru(webui, settings, somebody_waits),
            tags_problem, tags_remedy,
        ),
    }  # fmt: skip


def _lacks_blip(models: Path, shown: Path, places: dict[str, str]) -> tuple[str, str] | None:
    """(problem, remedy), or None when BLIP can be loaded without a download. shown: how a page may call ``models``."""
    if "BLIP" not in places:
        return (
            "The WebUI's BLIP lacks its program, repositories/BLIP.",
            "Start the WebUI once as it comes: it fetches it.",
        )
    if not _holds(models / "BLIP", ".pth"):
        return (
            "The weights of the WebUI's BLIP are not on this machine: model_base_caption_capfilt_large.pth, 0.9 GB.",
            f"Put the file into {shown / 'BLIP'}, or let the WebUI fetch it: Interrogate CLIP in img2img does.",
        )
    if not _has_tokenizer():
        return (
            f"The WebUI's BLIP lacks its tokenizer {_TOKENIZER}: {', '.join(_TOKENIZER_FILES)}, 0.3 MB.",
            f"Let the WebUI fetch it: Interrogate CLIP in img2img does. Or put the files of "
            f"huggingface.co/{_TOKENIZER} into Hugging Face's cache.",
        )
    return None


def _lacks_deepbooru(models: Path, shown: Path) -> tuple[str, str] | None:
    if _holds(models / "torch_deepdanbooru", ".pt"):
        return None
    return (
        "The weights of the WebUI's deepbooru are not on this machine: model-resnet_custom_v3.pt, 0.6 GB.",
        f"Put the file into {shown / 'torch_deepdanbooru'}, or let the WebUI fetch it: Interrogate DeepBooru in img2img"
        " does.",
    )


def _holds(folder: Path, suffix: str) -> bool:
    return any(path.suffix.casefold() == suffix and path.is_file() for path in folder.rglob("*"))


def _has_tokenizer() -> bool:
    """Whether transformers finds BLIP's tokenizer without asking the network."""
    from transformers.utils import cached_file

    try:
        for name in _TOKENIZER_FILES:
            cached_file(_TOKENIZER, name, local_files_only=True)
    except OSError:
        return False
    return True
