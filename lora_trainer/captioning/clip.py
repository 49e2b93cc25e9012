"""CLIP (Radford et al., 2021) ranks phrases: which medium, light, weather … fits a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_trainer.captioning.base import Description, Settings, Tag, Weights
from lora_trainer.captioning.phrases import GROUPS, Group
from lora_trainer.captioning.torch_tools import load_pretrained
from lora_trainer.out_of_memory import release_memory

WEIGHTS = Weights(
    repository="openai/clip-vit-large-patch14",
    files=(
        ("config.json",),
        ("preprocessor_config.json", "processor_config.json"),
        ("tokenizer.json", "vocab.json"),
        ("model.safetensors", "pytorch_model.bin"),
    ),
    size="1.7 GB",
)
_PHRASES_AT_ONCE = 64


class ClipRanking:
    """For each group of phrases a softmax over its scores; told are those above the threshold, so that a group of
    which nothing fits clearly is silent."""

    def __init__(self, folder: Path, settings: Settings, groups: Sequence[Group] = GROUPS):
        from transformers import CLIPModel, CLIPProcessor

        self._processor = load_pretrained(CLIPProcessor, folder)
        self._model = load_pretrained(CLIPModel, folder).eval().requires_grad_(False).to(settings.device)
        self._device, self._threshold, self._groups = settings.device, settings.threshold, tuple(groups)
        texts = [group.prompt.format(phrase) for group in self._groups for phrase in group.phrases]
        self._texts = self._encode_texts(texts)  # (phrases, D), unit length

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        import torch

        pixels = self._processor.image_processor(list(images), return_tensors="pt")["pixel_values"].to(self._device)
        with torch.no_grad():
            features = _unit(self._model.get_image_features(pixel_values=pixels))  # (B, D)
            scores = (self._model.logit_scale.exp() * features @ self._texts.T).float().cpu()  # (B, phrases)
        return [Description(tags=tuple(self._told(row))) for row in scores]

    def _told(self, scores: Any) -> list[Tag]:
        tags, start = [], 0
        for group in self._groups:
            shares = scores[start : start + len(group.phrases)].softmax(0)
            start += len(group.phrases)
            best = shares.topk(min(group.most, len(group.phrases)))
            tags += [
                Tag(group.phrases[index], score, group.name)
                for score, index in zip(best.values.tolist(), best.indices.tolist())
                if score >= self._threshold
            ]
        return tags

    def _encode_texts(self, texts: Sequence[str]) -> Any:
        import torch

        rows = []
        for start in range(0, len(texts), _PHRASES_AT_ONCE):
            some = list(texts[start : start + _PHRASES_AT_ONCE])
            tokens = self._processor.tokenizer(some, padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                rows.append(
                    self._model.get_text_features(
                        input_ids=tokens["input_ids"].to(self._device),
                        attention_mask=tokens["attention_mask"].to(self._device),
                    )
                )
        return torch.cat([_unit(row) for row in rows])

    def close(self) -> None:
        self._model = self._texts = None
        release_memory()


def _unit(features: Any) -> Any:
    """Rows of length 1. From version 5 on transformers wraps the projected features in an output object."""
    features = getattr(features, "pooler_output", features)
    return features / features.norm(dim=-1, keepdim=True)
