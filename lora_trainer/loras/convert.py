"""The same LoRA under the names of another program."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.adapters.base import without_alpha
from lora_trainer.adapters.export import diffusers_parts, diffusers_tensors, save_lora, write_peft_tensors
from lora_trainer.adapters.merge import check_output
from lora_trainer.adapters.peft_folder import write_folder
from lora_trainer.errors import UserError
from lora_trainer.loras.layers import Factors, Layers, Turn, open_layers
from lora_trainer.loras.writing import check_precision, precision_of
from lora_trainer.run.outputs import RUN_ENTRY

LAYOUTS = ("kohya", "diffusers", "peft")


def convert(
    lora: str | Path,
    output: str | Path,
    layout: str,
    *,
    base: str | Path | None = None,
    precision: str | None = None,
    overwrite: bool = False,
    turn: Turn = nullcontext,
) -> tuple[int, list[str]]:
    """Write a LoRA in another layout; returns the number of its layers, and what of the file has no place in it.

    layout: "kohya", which the WebUIs and ComfyUI read; "diffusers", for ``load_lora_weights``; "peft", a folder with
        one folder for each part (unet, text_encoder, text_encoder_2), for ``PeftModel.from_pretrained``.
    output: a .safetensors file, or for "peft" a new folder.
    base: the LoRA's base model, needed where it is not a usual one.

    kohya's layout keeps every kind of network as it is. The others hold products of two factors, so a LoHa or LoKr is
    decomposed, and a DoRA is refused: they store its magnitudes per output, not per input.

    Raises:
        UserError: an unknown layout, as ``open_layers`` and ``Layers.factors``, or ``output`` cannot be written.
    """
    if layout not in LAYOUTS:
        raise UserError(f"{layout!r} is no layout.", field="layout", remedy=f"Use {', '.join(LAYOUTS)}.")
    check_precision(precision)
    output = Path(output)
    layers = open_layers(lora, base, turn)
    precision = precision or precision_of(layers.file)
    if layout == "peft":
        _check_folder(output, overwrite)
        _write_peft(layers, output, precision)
    else:
        check_output(output, (layers.file.path,), overwrite)
        if layout == "kohya":
            _write_kohya(layers, output, precision)
        else:
            factors = layers.factors()
            named = [
                (target, *_pair(factors[target.kohya_name]))
                for target in layers.targets
                if target.kohya_name in factors
            ]
            write_peft_tensors(diffusers_tensors(named), output, _kept(layers), precision)
    left_out = [f"{name} fits no layer" for name in layers.unmatched] + layers.file.left_out()
    return len(layers.matched), left_out


def _kept(layers: Layers) -> dict[str, str]:
    """The metadata, except that a run wrote the file, and PEFT's settings, which are in the tensors now."""
    gone = (RUN_ENTRY, "lora_adapter_metadata")
    return {name: value for name, value in layers.file.metadata.items() if name not in gone}


def _write_kohya(layers: Layers, output: Path, precision: str) -> None:
    """Every module's own tensors; alpha is written out where another layout had it in its settings."""
    tensors = {}
    for name, module in layers.matched.items():
        layer = {suffix: tensor.float() for suffix, tensor in module.tensors.items()}
        if module.rank is not None:
            layer["alpha"] = torch.tensor(float(module.rank if module.alpha is None else module.alpha))
        if name in layers.without_alpha:
            layer = without_alpha(name, layer)
        tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in layer.items()})
    metadata = {name: value for name, value in _kept(layers).items() if name != "format"}
    save_lora(tensors, output, metadata, precision)


def _write_peft(layers: Layers, output: Path, precision: str) -> None:
    parts: dict[str, dict[str, Factors]] = {}
    factors = layers.factors()
    for target in layers.targets:
        if target.kohya_name in factors:
            whole = factors[target.kohya_name]
            for name, up in diffusers_parts(target, whole.up):
                part, _, path = name.partition(".")
                parts.setdefault(part, {})[path] = Factors(whole.down, up)
    for part, modules in parts.items():
        rank = max(one.rank for one in modules.values())
        lower = {path: one.rank for path, one in modules.items() if one.rank != rank}
        settings = {
            "base_model_name_or_path": layers.file.metadata.get("ss_sd_model_name"),
            "r": rank,
            "lora_alpha": rank,  # alpha / rank is in lora_B
            "rank_pattern": lower,
            "alpha_pattern": lower,
            "target_modules": sorted(modules),
            "lora_dropout": 0.0,
        }
        pairs = {path: _pair(one) for path, one in modules.items()}
        write_folder(output / part, pairs, settings, _kept(layers), precision)


def _pair(factors: Factors) -> tuple[Tensor, Tensor]:
    return factors.down.contiguous(), factors.up.contiguous()


def _check_folder(output: Path, overwrite: bool) -> None:
    """Raises UserError when ``output`` is a file, or a folder with something in it and ``overwrite`` is not set."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output.name} is a file.", remedy="Name a folder for PEFT's layout.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(
            f"{output.name} is not empty.", field="overwrite", remedy="Choose another folder or set overwrite."
        )
