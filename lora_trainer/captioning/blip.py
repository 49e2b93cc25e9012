"""BLIP: a sentence for a picture (Li et al., 2022), by transformers from 4.30 on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lora_trainer.captioning.base import Description, Settings, Weights
from lora_trainer.captioning.torch_tools import load_pretrained
from lora_trainer.out_of_memory import release_memory

WEIGHTS = Weights(
    repository="Salesforce/blip-image-captioning-base",
    files=(
        ("config.json",),
        ("preprocessor_config.json", "processor_config.json"),
        ("tokenizer.json", "vocab.txt"),
        ("tokenizer_config.json",),
        ("model.safetensors", "pytorch_model.bin"),
    ),
    size="1 GB",
)
_BEAMS = 3


class Blip:
    """Beam search without sampling, so that the same picture gets the same sentence."""

    def __init__(self, folder: Path, settings: Settings):
        from transformers import BlipForConditionalGeneration, BlipProcessor

        self._processor = load_pretrained(BlipProcessor, folder)
        model = load_pretrained(BlipForConditionalGeneration, folder).eval().requires_grad_(False)
        self._device = settings.device
        self._model = model.to(self._device)
        if self._device.startswith("cuda"):
            self._model = self._model.half()
        self._max_length = settings.max_length

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        import torch

        pixels = self._processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self._device, next(self._model.parameters()).dtype)
        with torch.no_grad():
            tokens = self._model.generate(pixel_values=pixels, num_beams=_BEAMS, max_new_tokens=self._max_length)
        sentences = self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [Description(sentence=sentence.strip()) for sentence in sentences]

    def close(self) -> None:
        self._model = None
        release_memory()
