"""Writing a LoRA: kohya's layout, which every WebUI reads, and diffusers'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.adapters.base import Target
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora import LoraAdapter
from lora_trainer.adapters.tensor_file import kohya_hashes, serialize
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_write

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DIFFUSERS_FILE_NAME = "pytorch_lora_weights.safetensors"


def save_lora(
    source: AdapterSet | Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str], dtype: str = "fp16"
) -> dict[str, str]:
    """Write a LoRA file in kohya's layout, in one step; the same content gives the same bytes.

    source: a set, or its ``export()`` (an average of it, say): kohya key -> fp32 tensor.
    metadata: from ``metadata.build_metadata``; the two hashes are added.
    Returns the metadata as written.

    Raises:
        UserError: a weight is not finite in that number format, or the file cannot be written.
    """
    tensors: Mapping[str, Tensor] = source.export() if isinstance(source, AdapterSet) else source
    stored = {name: _stored(name, tensor, DTYPES[dtype]) for name, tensor in tensors.items()}
    complete = {**metadata, **kohya_hashes(stored, metadata)}
    atomic_write(Path(path), serialize(stored, complete))
    return complete


def save_diffusers(adapters: AdapterSet, path: str | Path, metadata: Mapping[str, str], dtype: str = "fp16") -> None:
    """Write ``pytorch_lora_weights.safetensors`` for ``load_lora_weights``; ``path`` may be the folder or the file.

    The layout's names are PEFT's. Alpha has no place in it that all versions of diffusers read, so alpha/rank is
    multiplied into lora_B; PEFT's default (alpha = rank) then gives the same change. Where ranks differ within a UNet
    or text encoder, the lower ones are filled up with zeros: older versions of diffusers (0.31) take one alpha for all.

    Raises:
        UserError: these adapters cannot be said in that layout (see ``diffusers_problem``).
    """
    if problem := diffusers_problem(adapters):
        raise UserError(problem, field="export_diffusers", remedy="Switch it off, or use adapter: lora without dora.")
    factors = [
        (target, adapter.lora_down.detach(), adapter.lora_up.detach() * adapter.scale)
        for target, adapter in adapters.items()
    ]
    tensors = diffusers_tensors(factors)
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / DIFFUSERS_FILE_NAME
    write_peft_tensors(tensors, path, metadata, dtype)


def diffusers_tensors(layers: Iterable[tuple[Target, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Factors under diffusers' names. layers: target, down (r, in[, kh, kw]), and up (out, r[, 1, 1]) with alpha/rank
    in it. Lower ranks are filled up with zeros to the highest of their part. A layer that diffusers splits gives each
    of them the same down, and the rows of up that are theirs."""
    layers = list(layers)
    highest: dict[str, int] = {}
    for target, down, _ in layers:
        highest[target.part] = max(len(down), highest.get(target.part, 0))
    tensors = {}
    for target, down, up in layers:
        missing = highest[target.part] - len(down)
        down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        up = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], dim=1)
        for name, part in diffusers_parts(target, up):
            tensors[f"{name}.lora_A.weight"] = down.clone() if target.split else down
            tensors[f"{name}.lora_B.weight"] = part.contiguous()
    return tensors


def diffusers_parts(target: Target, up: Tensor) -> list[tuple[str, Tensor]]:
    """The layers that diffusers has for this one, and what of up (out, …) is theirs."""
    if target.swapped:
        return [(target.diffusers_name, torch.cat(up.chunk(2)[::-1]))]
    names, rows = zip(*(target.split or ((target.diffusers_name, len(up)),)))
    return list(zip(names, up.split(list(rows))))


def write_peft_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], dtype: str) -> None:
    """Write tensors with PEFT's names, in one step. Raises UserError as ``save_lora``."""
    stored = {name: _stored(name, tensor, DTYPES[dtype]) for name, tensor in tensors.items()}
    atomic_write(path, serialize(stored, {"format": "pt", **metadata}))


def diffusers_problem(adapters: AdapterSet) -> str | None:
    """Why a set cannot be written in diffusers' layout, None when it can."""
    for _, adapter in adapters.items():
        if not isinstance(adapter, LoraAdapter):
            return f"diffusers' layout knows no {adapter.kind}."
        if adapter.dora_scale is not None:
            return "diffusers' layout stores DoRA per output, not per input as the WebUIs read it."
    return None


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor.detach().to("cpu", dtype)
    if name.endswith(".alpha") and float(stored) != float(tensor):
        return tensor.detach().float().cpu()  # a strength is not to be rounded
    if not bool(torch.isfinite(stored).all()):
        if bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{name} holds values too large for {dtype}.", field="save_precision", remedy="Save as bf16 or fp32."
            )
        raise UserError(
            f"{name} holds values that are not numbers: the training went astray.",
            remedy="Lower the learning rate, or use mixed_precision bf16 or no.",
        )
    return stored
