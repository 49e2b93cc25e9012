"""A LoRA made part of a language model's folder: the same shards with other weights."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_trainer.adapters.lora_file import LoraFile, read_lora
from lora_trainer.adapters.merge import check_place
from lora_trainer.adapters.tensor_file import open_tensors, specs_of, write_tensors
from lora_trainer.errors import UserError

_WEIGHTS = ".safetensors"
_LEFT = (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")
"""The same weights in other forms, which would be those of the base."""


@dataclass(frozen=True)
class FolderMerge:
    """merged: how many layers were changed."""

    path: Path
    merged: int


def merge_folder(base: Path, lora: Path | LoraFile, weight: float, output: Path) -> FolderMerge:
    """Write the model in ``base`` with ``weight`` × the LoRA's change to the new folder ``output``, shard by shard:
    same files, keys, number formats and metadata. One tensor is in memory at a time.

    Raises:
        UserError: ``output`` exists, the base has no .safetensors, or a layer of the LoRA is not in it.
    """
    check_folders(base, output)
    lora = lora if isinstance(lora, LoraFile) else read_lora(lora)
    changes = {f"{name}.weight": weights for name, weights in lora.modules.items()}
    left = set(changes)
    unfinished = output.with_name(f".{output.name[:40]}.{secrets.token_hex(6)}.tmp")
    try:
        unfinished.mkdir(parents=True)
        for file in sorted(base.iterdir()):
            if file.suffix == _WEIGHTS:
                left -= _merge_file(file, lora, weight, unfinished / file.name)
            elif file.is_file() and file.suffix.lower() not in _LEFT:
                shutil.copyfile(file, unfinished / file.name)
        if left:
            raise UserError(
                f"{base.name} has no layer {sorted(left)[0].removesuffix('.weight')}, which the LoRA changes.",
                remedy="They are of different models.",
            )
        os.rename(unfinished, output)
    except OSError as error:
        raise UserError(f"{output.name} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return FolderMerge(output, len(changes))


def _merge_file(file: Path, lora: LoraFile, weight: float, output: Path) -> set[str]:
    """Returns the names of the tensors that were changed."""
    changed: set[str] = set()
    with open_tensors(file) as handle:
        specs = specs_of(handle, file)

        def load(name: str) -> Tensor:
            stored = handle.get_tensor(name)
            weights = lora.modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if weights is None:
                return stored
            if not weights.is_finite():
                raise UserError(f"{lora.path.name}: {weights.name} holds values that are not numbers.")
            try:
                merged = stored.float().add_(weights.change(stored.float()), alpha=weight)
            except (ValueError, RuntimeError) as error:
                message = f"{lora.path.name} does not fit the base: {weights.name}: {error}."
                raise UserError(message, remedy="It was made for another model.") from error
            changed.add(name)
            return merged.to(stored.dtype)

        with open(output, "wb") as target:
            write_tensors(target, specs, load, handle.metadata())
    return changed


def check_folders(base: Path, output: Path) -> None:
    """Raises UserError when a merge could not write ``output``."""
    if not base.is_dir() or not any(file.suffix == _WEIGHTS for file in base.iterdir()):
        raise UserError(f"{base.name} is no folder with .safetensors.", remedy="Merge into such a folder.")
    if output.exists():
        raise UserError(f"{output.name} exists already.", remedy="Choose another name for the folder.")
    check_place(output)
