"""A LoRA made part of a checkpoint: the same file with other weights."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.adapters.base import Target, weight_shape
from lora_trainer.adapters.lora_file import LoraFile, ModuleWeights, read_lora
from lora_trainer.adapters.tensor_file import open_tensors, specs_of, write_tensors
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_path

_FUSED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class MergeResult:
    """merged: how many layers were changed. unmatched: names in the LoRA that the base has no layer for.
    notes: what else of the LoRA is not in the result."""

    path: Path
    merged: int
    unmatched: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """A LoRA module and the rows of the stored weight that it changes; shape is that of those rows."""

    weights: ModuleWeights
    shape: tuple[int, ...]
    rows: slice


def merge(
    base: str | Path,
    lora: str | Path | LoraFile,
    weight: float,
    output: str | Path,
    *,
    targets: Sequence[Target],
    overwrite: bool = False,
) -> MergeResult:
    """Write ``base`` with ``weight`` × the LoRA's change to ``output``: same keys, number formats and metadata.

    targets: the layers of the base model (``lora_targets()``), which say where the file keeps them. A layer without
        ``checkpoint_name`` is a third of open_clip's fused ``in_proj_weight`` (q, k, v from top to bottom).

    Raises:
        UserError: not a single .safetensors file, nothing of the LoRA fits, weights are not finite, or
            ``output`` exists and ``overwrite`` was not given, or is one of the inputs.
    """
    base, output = Path(base), Path(output)
    lora = lora if isinstance(lora, LoraFile) else read_lora(lora)
    check_paths(base, lora.path, output, overwrite)
    if not math.isfinite(weight):
        raise UserError(f"A strength of {weight} is no number.", field="weight", remedy="Use one such as 0.7.")
    matched, unmatched = lora.match(targets)
    plan = _plan(matched, targets)
    with open_tensors(base) as handle:
        specs = {spec.name: spec for spec in specs_of(handle, base)}
        plan = {_name_in(key, specs): parts for key, parts in plan.items()}
        if scaled := [key for key in plan if key.removesuffix("weight") + "scale_weight" in specs]:
            raise UserError(
                f"{base.name} holds scaled fp8 ({scaled[0]}), which nothing is merged into.",
                remedy="Merge into its bf16 or fp16 version.",
            )
        absent = [part.weights.name for key, parts in plan.items() if key not in specs for part in parts]
        plan = {key: parts for key, parts in plan.items() if key in specs}
        if not plan:
            raise UserError(
                f"{lora.path.name} holds no layer of {base}.",
                remedy="They are of different kinds of model, or not a base.",
            )

        def load(name: str) -> Tensor:
            stored = handle.get_tensor(name)
            return _changed(stored, plan[name], weight, lora.path) if name in plan else stored

        with atomic_path(output) as temporary, open(temporary, "wb") as file:
            write_tensors(file, specs.values(), load, handle.metadata())
    return MergeResult(output, sum(map(len, plan.values())), (*unmatched, *absent), tuple(lora.left_out()))


def _name_in(key: str, names: Container[str]) -> str:
    """The name of a tensor in a file that holds a whole model, or its denoiser alone under bare names."""
    bare = key.removeprefix("model.diffusion_model.")
    return bare if key not in names and bare in names else key


def check_paths(base: Path, lora: Path, output: Path, overwrite: bool) -> None:
    """Raises UserError when a merge could not write ``output``; ``lora`` need not be there yet."""
    if base.is_dir() or (base.is_file() and base.suffix.lower() != ".safetensors"):
        raise UserError(f"{base.name} is not a single .safetensors file.", remedy="Merge into such a file.")
    if not base.is_file():
        raise UserError(f"{base.name} does not exist.")
    check_output(output, (base, lora), overwrite)


def check_output(output: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Raises UserError when ``output`` cannot be written as a .safetensors file beside what is read."""
    if output.suffix.lower() != ".safetensors":
        raise UserError(f"{output.name} does not end in .safetensors.", remedy="Choose such a name.")
    if output.is_dir():
        raise UserError(f"{output.name} is a folder.", remedy="Choose another name.")
    check_place(output)
    if any(output.resolve() == source.resolve() or _same_file(output, source) for source in sources):
        raise UserError(f"{output.name} would replace what is read.", remedy="Choose another name.")
    if output.exists() and not overwrite:
        remedy = "Choose another name or set overwrite."
        raise UserError(f"{output.name} exists already.", field="overwrite", remedy=remedy)


def check_place(output: Path) -> None:
    """Raises UserError when the folder that ``output`` is to lie in cannot be written."""
    place = next(folder for folder in output.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            f"{output.name} cannot be written: {place} is no folder to write to.", remedy="Choose another one."
        )


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _plan(matched: dict[str, ModuleWeights], targets: Sequence[Target]) -> dict[str, list[_Part]]:
    """What happens to which tensor of the base's file."""
    places = stored_places(targets)
    plan: dict[str, list[_Part]] = {}
    for target in targets:
        weights = matched.get(target.kohya_name)
        if weights is not None:
            key, rows = places[target.kohya_name]
            plan.setdefault(key, []).append(_Part(weights, weight_shape(target.module), rows))
    return plan


def stored_places(targets: Sequence[Target]) -> dict[str, tuple[str, slice]]:
    """Where the base's file keeps each layer's weight: the tensor's name and its rows, by the target's kohya name."""
    outer = {target.diffusers_name: target.checkpoint_name for target in targets}
    places = {}
    for target in targets:
        height = weight_shape(target.module)[0]
        key, rows = f"{target.checkpoint_name}.weight", slice(0, height)
        if target.checkpoint_name is None:
            stem, _, name = target.diffusers_name.rpartition(".")
            sibling = outer.get(f"{stem}.out_proj")
            if name not in _FUSED or sibling is None:
                raise ValueError(f"{target.diffusers_name}: where the base's file keeps it is not known.")
            start = _FUSED.index(name) * height
            key, rows = f"{sibling.removesuffix('.out_proj')}.in_proj_weight", slice(start, start + height)
        places[target.kohya_name] = key, rows
    return places


def _changed(stored: Tensor, parts: list[_Part], weight: float, lora: Path) -> Tensor:
    result = stored.clone()
    for part in parts:
        if not part.weights.is_finite():
            raise UserError(f"{lora.name}: {part.weights.name} holds values that are not numbers.")
        rows = stored[part.rows].float()
        try:
            change = part.weights.change(rows.reshape(part.shape))
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{lora.name} does not fit the base: {part.weights.name}: {error}.",
                remedy="It was made for another kind of model.",
            ) from error
        merged = torch.add(rows, change.reshape(rows.shape), alpha=weight)
        result[part.rows] = merged.to(stored.dtype)
    return result
