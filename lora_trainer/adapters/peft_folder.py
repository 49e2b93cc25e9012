"""A LoRA of a language model as PEFT, vLLM and llama.cpp read it: a folder with its weights and adapter_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_trainer.adapters.export import write_peft_tensors
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.files import atomic_write

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def save_peft(
    adapters: AdapterSet,
    folder: Path,
    *,
    layers: Sequence[str],
    base_model: str,
    dropout: float,
    metadata: Mapping[str, str],
    dtype: str,
) -> Path:
    """Write the folder; returns the path of its weights, which are written last. Equal content gives equal bytes.

    adapters: LoRAs of one rank and alpha. layers: names of all the model's layers that adapters could attach to.
    base_model: as PEFT is to find it. dropout: what was trained with. metadata: entries beside PEFT's own.

    Raises:
        UserError: a weight is not finite in that number format, or the folder cannot be written.
    """
    factors, ranks = {}, set()
    for target, adapter in adapters.items():
        named = adapter.factors()
        factors[target.diffusers_name] = named["lora_down.weight"], named["lora_up.weight"]
        ranks.add((adapter.rank, adapter.alpha))
    ((rank, alpha),) = ranks
    settings = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "target_modules": _target_modules([target.diffusers_name for target in adapters.targets], layers),
    }
    return write_folder(folder, factors, settings, metadata, dtype)


def write_folder(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    settings: Mapping[str, Any],
    metadata: Mapping[str, str],
    dtype: str,
) -> Path:
    """Write one PEFT folder; returns the path of its weights, which are written last.

    factors: down and up by the layer's name in the model. settings: of adapter_config.json, without those that are
    the same for every LoRA. Raises UserError as ``save_peft``.
    """
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    always = {
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    atomic_write(folder / SETTINGS, json.dumps({"peft_type": "LORA", **settings, **always}, indent=2) + "\n")
    write_peft_tensors(tensors, folder / WEIGHTS, metadata, dtype)
    return folder / WEIGHTS


def _target_modules(chosen: Sequence[str], layers: Sequence[str]) -> list[str]:
    """The layers as PEFT is told of them: by their last name, or whole where others of that name do not learn."""
    partly = {_last(name) for name in set(layers) - set(chosen)}
    return sorted({name if _last(name) in partly else _last(name) for name in chosen})


def _last(name: str) -> str:
    return name.rpartition(".")[2]
