"""Continuing from an existing LoRA: its change becomes the adapters' first state."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_trainer.adapters.algebra import column_norm, truncated_factors, truncated_product
from lora_trainer.adapters.base import Adapter
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora import LoraAdapter
from lora_trainer.adapters.lora_file import LoraFile, ModuleWeights
from lora_trainer.errors import UserError

# Of each kind, the factor that takes up a difference between the file's alpha/rank and the adapter's.
_SCALED = {"lora": "lora_up.weight", "loha": "hada_w2_a", "lokr": "lokr_w1"}


@torch.no_grad()
def init_from(adapters: AdapterSet, lora: LoraFile) -> list[str]:
    """Give ``adapters`` the change that ``lora`` makes; returns warnings about what did not fit.

    Same kind, rank and alpha: an exact copy. Another alpha: the same change, told by other numbers. A higher rank:
    the same change, and the new ranks start as in a new LoRA. A lower one, or a LoHa, LoKr or DoRA file for a LoRA:
    the best approximation of that rank. Layers that the file lacks start new.

    Raises:
        UserError: no layer fits, shapes differ (another model family), a weight is not finite, or the file's kind
            cannot become the adapters'.
    """
    targets = [target for target, _ in adapters.items()]
    matched, unmatched = lora.match(targets)
    if not matched:
        raise UserError(
            f"{lora.path.name} holds no layer that this run trains.",
            field="init_lora",
            remedy="Is it for another kind of model, or does target_modules leave its layers out?",
        )
    reduced = 0
    for target, adapter in adapters.items():
        weights = matched.get(target.kohya_name)
        if weights is None:
            continue
        if not weights.is_finite():
            raise UserError(f"{lora.path.name}: {weights.name} holds values that are not numbers.", field="init_lora")
        try:
            reduced += _initialize(adapter, weights)
        except ValueError as error:
            base = lora.metadata.get("ss_base_model_version")
            raise UserError(
                f"{lora.path.name} does not fit this model: {weights.name}: {error}.",
                field="init_lora",
                remedy=f"It was made for {base}." if base else "It was made for another model.",
            ) from error
    warnings = []
    if unmatched:
        warnings.append(
            f"{lora.path.name}: {len(unmatched)} of its layers are not trained in this run and were left out."
        )
    warnings += [f"{lora.path.name}: {sentence}" for sentence in lora.left_out()]
    if missing := len(targets) - len(matched):
        warnings.append(f"{lora.path.name} lacks {missing} of the {len(targets)} layers; those start new.")
    if reduced:
        warnings.append(f"{lora.path.name}: {reduced} layers were brought to this run's rank, as nearly as it can.")
    return warnings


def _initialize(adapter: Adapter, weights: ModuleWeights) -> bool:
    """Returns whether the change had to be approximated. Raises ValueError when the shapes differ."""
    weight = adapter.base_weight()
    change = weights.change(weight.cpu())  # checks every shape, DoRA's as well
    approximated = False
    if not isinstance(adapter, LoraAdapter):
        _copy_same_kind(adapter, weights)
    elif (
        weights.kind == "lora"
        and "lora_mid.weight" not in weights.tensors
        and (weights.dora_scale is None or adapter.dora_scale is not None)
        and not weights.is_per_output
    ):
        approximated = _copy_low_rank(adapter, weights)
    else:
        whole = adapter.dora_scale is None or weights.is_per_output
        delta = change if whole else weights.delta(adapter.shape)
        down, up = truncated_factors(delta.flatten(1) / adapter.scale, adapter.rank)
        _place(adapter, down, up)
        approximated = True
    if adapter.dora_scale is not None:
        if weights.dora_scale is not None and not weights.is_per_output:
            adapter.dora_scale.copy_(weights.dora_scale.view_as(adapter.dora_scale))
        else:  # magnitudes at which the file's change is what it was
            adapter.dora_scale.copy_(column_norm(weight + change.to(weight)))
    elif weights.dora_scale is not None and not isinstance(adapter, LoraAdapter):
        raise UserError("the file is a DoRA.", field="init_lora", remedy="Set adapter: lora and dora: true.")
    return approximated


def _copy_low_rank(adapter: LoraAdapter, weights: ModuleWeights) -> bool:
    down, up = (weights.tensors[f"lora_{name}.weight"].float() for name in ("down", "up"))
    down, up = down.flatten(1), up.flatten(1)
    if (ratio := weights.scale / adapter.scale) != 1:
        up = up * ratio
    if len(down) > adapter.rank:  # some may be empty: the diffusers layout is filled up
        used = down.any(1) & up.any(0)
        down, up = down[used], up[:, used]
    too_high = len(down) > adapter.rank
    if too_high:
        down, up = truncated_product(down, up, adapter.rank)
    _place(adapter, down, up)
    return too_high


def _place(adapter: LoraAdapter, down: Tensor, up: Tensor) -> None:
    """Put factors of rank r ≤ the adapter's into its first r ranks; the others keep their start and change nothing."""
    rank = len(down)
    adapter.lora_down[:rank] = down.reshape(rank, *adapter.lora_down.shape[1:]).to(adapter.lora_down)
    adapter.lora_up[:, :rank] = up.reshape(-1, rank, *adapter.lora_up.shape[2:]).to(adapter.lora_up)


def _copy_same_kind(adapter: Adapter, weights: ModuleWeights) -> None:
    factors = adapter.factors()
    given = {name: tensor for name, tensor in weights.tensors.items() if name != "dora_scale"}
    if {name: tensor.shape for name, tensor in factors.items()} != {name: t.shape for name, t in given.items()}:
        raise UserError(
            f"{weights.name} is a {weights.kind} of other sizes than this run's {adapter.kind}.",
            field="init_lora",
            remedy=f"Only adapter: lora can continue from any file; for {weights.kind} set its own kind and rank.",
        )
    for name, parameter in factors.items():
        parameter.copy_(given[name].float())
    if (ratio := weights.scale / adapter.scale) != 1:
        factors[_SCALED[adapter.kind]].mul_(ratio)
