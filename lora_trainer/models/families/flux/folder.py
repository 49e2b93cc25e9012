"""Diffusers folders of FLUX.1, and the files of its text encoders, under the names of an all-in-one file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.errors import UserError
from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.families.flux.names import CLIP, T5, TRANSFORMER, Layer, layers, norms, text_name
from lora_trainer.models.families.flux.shapes import axes_of
from lora_trainer.models.families.unet.folder import add_vae, component
from lora_trainer.models.hints import Hints, read_json
from lora_trainer.models.tensors import Source, Tensors, open_source


def read_folder(folder: Path) -> tuple[Tensors, Hints] | None:
    """None when it is not one of FLUX.1. Raises UserError when a part of it is missing."""
    if read_json(folder / "model_index.json").get("_class_name") != "FluxPipeline":
        return None
    tensors = Tensors()
    where = {name: source for source in component(folder / "transformer") for name in source.shapes}
    fused = Fused(where)
    for name in fused.shapes:
        tensors.add(name, fused, name)
    for source in component(folder / "vae"):
        add_vae(tensors, source)
    for part in ("text_encoder", "text_encoder_2"):
        for source in component(folder / part):
            _add_text(tensors, source)
    return tensors, Hints()


def add_text_encoders(tensors: Tensors, path: Path) -> None:
    """Replace CLIP-L or T5 in ``tensors`` by the one in ``path``: a file, or a folder. Raises UserError."""
    found: set[str] = set()
    for source in component(path) if path.is_dir() else [open_source(path)]:
        usual = [text_name(name) or "" for name in source.shapes]
        prefixes = {prefix for name in usual for prefix in (CLIP, T5) if name.startswith(prefix)}
        for prefix in prefixes - found:
            tensors.discard(prefix)
        found |= prefixes
        _add_text(tensors, source)
    if not found:
        raise UserError(
            f"{path.name} is neither CLIP-L nor T5.",
            field="text_encoders",
            remedy="Choose clip_l.safetensors and t5xxl_fp16.safetensors (or fp8).",
        )


def _add_text(tensors: Tensors, source: Source) -> None:
    for name in source.shapes:
        if (usual := text_name(name)) is not None:
            tensors.add(usual, source, name)


@dataclass
class Fused:
    """A ``Source`` of diffusers' transformer: layers that are one in Black Forest Labs' layout are put together as they
    are read.

    where: the source of each of diffusers' tensors.
    """

    where: dict[str, Source]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._made_of: dict[str, tuple[list[str], bool]] = {}
        shape = _shape({name: source.shapes[name] for name, source in self.where.items()})
        for layer in layers(shape):
            for kind in ("weight", "bias"):
                self._add(f"{layer.name}.{kind}", [f"{part}.{kind}" for part, _ in layer.parts], layer)
        for ours, theirs in norms(shape):
            self._add(ours, [theirs], None)

    def _add(self, name: str, parts: list[str], layer: Layer | None) -> None:
        if any(part not in self.where for part in parts):
            return  # what is missing is said by who reads the architecture
        shapes = [self.where[part].shapes[part] for part in parts]
        name = TRANSFORMER + name
        self.shapes[name] = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        self.dtypes[name] = self.where[parts[0]].dtypes[parts[0]]
        self._made_of[name] = parts, layer is not None and layer.swapped

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        parts, swapped = self._made_of[name]
        tensors = [self.where[part].read(part, device, dtype) for part in parts]
        if swapped:
            scale, shift = tensors[0].chunk(2)
            return torch.cat([shift, scale])
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _shape(shapes: dict[str, tuple[int, ...]]) -> FluxShape:
    """Enough of the shape to name the layers."""

    def count(name: str) -> int:
        number = 0
        while name.format(number) in shapes:
            number += 1
        return number

    try:
        width, channels = shapes["x_embedder.weight"]
        head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
        return FluxShape(
            double=count("transformer_blocks.{}.attn.to_q.weight"),
            single=count("single_transformer_blocks.{}.attn.to_q.weight"),
            width=width,
            heads=width // head_dim,
            hidden=shapes["transformer_blocks.0.ff.net.0.proj.weight"][0],
            channels=channels,
            context_dim=shapes["context_embedder.weight"][1],
            pooled_dim=shapes["time_text_embed.text_embedder.linear_1.weight"][1],
            axes=axes_of(head_dim),
            guidance="time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"The transformer of this FLUX.1 folder lacks layers ({error}).",
            field="base_model",
            remedy="The folder is incomplete; download the model again.",
        ) from error
