"""Parts of flow models in diffusers folders and in files of their own, under the names of an all-in-one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lora_trainer.errors import UserError
from lora_trainer.models import gguf
from lora_trainer.models.families.flow.names import TRANSFORMER, Layer, text_names
from lora_trainer.models.families.unet.folder import add_vae, component
from lora_trainer.models.family import Shapes
from lora_trainer.models.hints import Hints, read_json
from lora_trainer.models.tensors import Source, Tensors, open_source

Shape = TypeVar("Shape")


def read_pipeline(
    folder: Path,
    pipeline: str,
    title: str,
    shape_of: Callable[[Shapes], Shape],
    layers: Callable[[Shape], Iterable[Layer]],
    others: Callable[[Shape], Iterable[tuple[str, str]]],
    encoders: Sequence[str],
) -> tuple[Tensors, Hints] | None:
    """A diffusers folder. None when it is not one of ``pipeline``.

    shape_of: enough of the transformer's shape, by diffusers' names, to name the layers; raises KeyError or ValueError
    where layers are missing. layers, others: see ``add_fused``. encoders: the sub-folders of the text encoders.

    Raises:
        UserError: a part of it is missing.
    """
    if read_json(folder / "model_index.json").get("_class_name") != pipeline:
        return None
    tensors = Tensors()
    where = {name: source for source in component(folder / "transformer") for name in source.shapes}
    try:
        shape = shape_of({name: source.shapes[name] for name, source in where.items()})
    except (KeyError, ValueError) as error:
        raise UserError(
            f"The transformer of this {title} folder lacks layers ({error}).",
            field="base_model",
            remedy="The folder is incomplete; download the model again.",
        ) from error
    add_fused(tensors, where, layers(shape), others(shape))
    for source in component(folder / "vae"):
        add_vae(tensors, source)
    for part in encoders:
        for source in component(folder / part):
            add_text(tensors, source)
    return tensors, Hints()


def add_text_encoders(tensors: Tensors, path: Path, kinds: Mapping[str, tuple[str, str]]) -> None:
    """Replace text encoders in ``tensors`` by the one in ``path``: a file, or a folder.

    kinds: those that the family has, by what their names start with: what each is called, and its usual file.

    Raises:
        UserError: it is none of these, or in a format that is not read.
    """
    found: set[str] = set()
    for source in component(path) if path.is_dir() else [open_source(path)]:
        named = text_names(source.shapes)
        for name in named:
            if (form := source.dtypes[name]).startswith(gguf.PREFIX) and not gguf.can_be_read(form):
                raise UserError(
                    f"{path.name} has weights in {form}, which cannot be read.",
                    field="text_encoders",
                    remedy=gguf.USE_READABLE,
                )
        prefixes = {prefix for name in named.values() for prefix in kinds if name.startswith(prefix)}
        for prefix in prefixes - found:
            tensors.discard(prefix)
        found |= prefixes
        add_text(tensors, source, tuple(kinds))
    if not found:
        titles = ", ".join(title for title, _ in kinds.values())
        raise UserError(
            f"{path.name} holds no text encoder of this model ({titles}).",
            field="text_encoders",
            remedy=f"Choose {' or '.join(file for _, file in kinds.values())}.",
        )


def add_text(tensors: Tensors, source: Source, prefixes: tuple[str, ...] = ("",)) -> None:
    """Add what of a text encoder's file is needed, where its name then starts with one of ``prefixes``."""
    for name, usual in text_names(source.shapes).items():
        if usual.startswith(prefixes):
            tensors.add(usual, source, name)


def add_fused(
    tensors: Tensors, where: dict[str, Source], layers: Iterable[Layer], others: Iterable[tuple[str, str]]
) -> None:
    """Add diffusers' transformer. where: the source of each of its tensors. others: the names of what is no layer, in
    single files and in diffusers'."""
    fused = Fused(where, layers, others)
    for name in fused.shapes:
        tensors.add(name, fused, name)


@dataclass
class Fused:
    """A ``Source`` of diffusers' transformer: layers that are one in single files are put together as they are read.
    See ``add_fused``."""

    where: dict[str, Source]
    layers: InitVar[Iterable[Layer]]
    others: InitVar[Iterable[tuple[str, str]]]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self, layers: Iterable[Layer], others: Iterable[tuple[str, str]]) -> None:
        self._made_of: dict[str, tuple[list[str], bool]] = {}
        for layer in layers:
            for kind in ("weight", "bias"):
                self._add(f"{layer.name}.{kind}", [f"{part}.{kind}" for part, _ in layer.parts], layer)
        for ours, theirs in others:
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
