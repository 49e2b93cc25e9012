"""DoRA's column lengths of all layers at once, once a step, instead of one by one in every pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_trainer.adapters.lora import LoraAdapter
from lora_trainer.storage import dense_weight


def groups(adapters: Sequence[LoraAdapter]) -> list[list[LoraAdapter]]:
    """Those with DoRA among ``adapters``, layers of one shape and one scale together."""
    found: dict[tuple, list[LoraAdapter]] = {}
    for adapter in adapters:
        if adapter.dora_scale is not None:
            found.setdefault((adapter.shape, adapter.rank, adapter.scale), []).append(adapter)
    return list(found.values())


@torch.no_grad()
def inverse_norms(group: Sequence[LoraAdapter], downs: Tensor, ups: Tensor, low_ups: Tensor) -> Tensor:
    """1 / ‖W + ΔW‖ per column of every layer of a group, (n · in) fp32; see ``algebra.changed_norm_squared``.

    downs (n, r, in·k) and ups (n, out, r), fp32; low_ups: ups in the format of the computation. Each weight is read
    once, on its own, and the rest is computed for all layers together.
    """
    first, count = group[0], len(group)
    cross = low_ups.new_empty(downs.shape)  # upᵀ W
    for adapter, up, product in zip(group, low_ups, cross):
        weight = dense_weight(adapter.layer.weight, up.dtype, adapter.shape)
        torch.mm(up.t(), weight.flatten(1), out=product)
    mixed = cross.to(downs.dtype, copy=True).baddbmm_(
        ups.transpose(1, 2).bmm(ups), downs, beta=2 * first.scale, alpha=first.scale**2
    )
    squared = mixed.mul_(downs).view(count, first.rank, first.shape[1], -1).sum((1, 3)).flatten()
    base, least = zip(*(adapter.base_norm_squared() for adapter in group))
    squared.add_(torch.cat([norms.flatten() for norms in base]))
    return torch.maximum(squared, torch.cat([norms.flatten() for norms in least])).rsqrt_()
