"""WD14-type taggers: an ONNX network that scores some ten thousand tags, and their list ``selected_tags.csv``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_trainer.captioning.base import Description, Settings, Tag, UnavailableError, Weights
from lora_trainer.errors import UserError

WEIGHTS = Weights(
    repository="SmilingWolf/wd-vit-tagger-v3",
    files=(("model.onnx",), ("selected_tags.csv",)),
    size="380 MB",
)
CATEGORIES = {"9": "rating", "0": "general", "4": "character"}
"""Danbooru's numbers in ``selected_tags.csv``; every other one is general."""


class Tagger:
    """The network's input is (B, side, side, 3) float32, BGR, 0…255; its output (B, tags) probabilities."""

    def __init__(self, folder: Path, settings: Settings):
        self._tags = read_tags(folder / "selected_tags.csv")
        self._session = _open_session(folder / "model.onnx", settings.device)
        source = self._session.get_inputs()[0]
        self._input = source.name
        batch, height, width, channels = source.shape
        if channels != 3 or not isinstance(height, int) or height != width:
            raise UserError(
                f"model.onnx takes {source.shape}, not square RGB pictures.", field="weights",
                remedy=f"Use a tagger such as {WEIGHTS.repository}.",
            )  # fmt: skip
        self._side = height
        self._one_by_one = batch == 1
        self._settings = settings

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        pixels = np.stack([prepare(image, self._side) for image in images])
        chunks = np.split(pixels, len(pixels)) if self._one_by_one else [pixels]
        scores = np.concatenate([self._session.run(None, {self._input: chunk})[0] for chunk in chunks])
        if scores.shape[1] != len(self._tags):
            raise UserError(
                f"The tagger scores {scores.shape[1]} tags, selected_tags.csv lists {len(self._tags)}.",
                field="weights", remedy="Take both files from the same model.",
            )  # fmt: skip
        return [self._description(row) for row in scores]

    def _description(self, scores: np.ndarray) -> Description:
        tags = []
        for (text, category), score in zip(self._tags, scores.tolist()):
            least = self._settings.character_threshold if category == "character" else self._settings.threshold
            if category != "rating" and score >= least:
                tags.append(Tag(text, score, category))
        ratings = [Tag(text, score, category) for (text, category), score in zip(self._tags, scores.tolist())
                   if category == "rating"]  # fmt: skip
        best = max(ratings, key=lambda tag: tag.score, default=None)
        tags.sort(key=lambda tag: (tag.category != "character", -tag.score))
        return Description(tags=(*tags, *([best] if best else [])))

    def close(self) -> None:
        self._session = None


def prepare(image: Image.Image, side: int) -> np.ndarray:
    """A picture as the taggers were trained: padded with white to a square, ``side`` pixels, BGR: (side, side, 3)
    float32 in 0…255."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(square, dtype=np.float32)[:, :, ::-1])


def read_tags(path: Path) -> list[tuple[str, str]]:
    """(tag, category) in the order of the network's output. Raises UserError for another kind of file."""
    try:
        with open(path, encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
        return [(row["name"], CATEGORIES.get(row["category"].strip(), "general")) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError) as error:
        raise UserError(
            f"{path.name} is no list of tags (columns name and category).", field="weights",
            remedy=f"Take selected_tags.csv from the tagger's repository, such as {WEIGHTS.repository}.",
        ) from error  # fmt: skip


def _open_session(path: Path, device: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(
            "Taggers need the package onnxruntime, which is not installed.", field="captioner",
            remedy="Install it with: pip install onnxruntime (onnxruntime-gpu for an NVIDIA card).",
        ) from error  # fmt: skip
    available = onnxruntime.get_available_providers()
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    providers = [name for name in (*wanted, "CPUExecutionProvider") if name in available]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; a card without its libraries falls back to the CPU
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own exceptions have no common base that it exports
        raise UserError(
            f"{path.name} cannot be loaded: {' '.join(str(error).split())[:300]}", field="weights",
            remedy="Fetch the file again; a download may have been cut off.",
        ) from error  # fmt: skip
