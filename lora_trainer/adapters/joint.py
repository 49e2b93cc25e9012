"""Several LoRA layers of one input in one product: q, k and v of attention, or k and v of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor, nn

from lora_trainer.adapters.base import Adapter, Target
from lora_trainer.adapters.fused import LoraLinears
from lora_trainer.adapters.lora import LoraAdapter

_TOGETHER = {"attn1": ("to_q", "to_k", "to_v"), "attn2": ("to_k", "to_v")}
"""By diffusers' names: self-attention, and attention to the text."""


class Joint:
    """The adapters of ``layers``, for who has the input of all: attention's forward, which finds it as ``joint``.

    working: copies of all downs and of all ups in the format of the computation, as ``LoraAdapter`` has them.
    """

    def __init__(self, adapters: Sequence[LoraAdapter]):
        self.adapters = tuple(adapters)
        self.layers: tuple[nn.Module, ...] = tuple(adapter.layer for adapter in adapters)
        self.working: tuple[Tensor, ...] = ()

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """One output a layer: those of the layers' own forwards, within rounding."""
        if not all(map(_is_in_place, self.adapters)):
            return [layer(x) for layer in self.layers]
        first = self.adapters[0]
        dtype, count = first.compute_dtype(x), len(self.adapters)
        keep = first.keep_rows((*x.shape[:-1], count * first.rank), x.device, dtype) if first.drops else None
        weights = [layer.weight for layer in self.layers]
        return LoraLinears.apply(x, keep, first.scale * first.multiplier, dtype, count, *weights, *self.factors_now())

    def factors_now(self) -> Sequence[Tensor]:
        if self.working:
            return self.working
        return [adapter.lora_down for adapter in self.adapters] + [adapter.lora_up for adapter in self.adapters]

    @property
    def masters(self) -> list[tuple[tuple[int, ...], list[nn.Parameter]]]:
        """All downs and all ups, each with the shape that they have together."""
        downs, ups = [adapter.lora_down for adapter in self.adapters], [adapter.lora_up for adapter in self.adapters]
        count, (rank, width) = len(downs), downs[0].shape
        return [((count * rank, width), downs), ((count, *ups[0].shape), ups)]


def _is_in_place(adapter: LoraAdapter) -> bool:
    """Whether calling the layer would do nothing but what its adapter does."""
    layer = adapter.layer
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return adapter.active and not hooked and getattr(vars(layer).get("forward"), "__self__", None) is adapter


def joints(pairs: Sequence[tuple[Target, Adapter]]) -> list[Joint]:
    """The layers among ``pairs`` that one product can compute: of one attention, and with adapters all alike."""
    by_name = {target.diffusers_name: adapter for target, adapter in pairs}
    found = []
    for name in by_name:
        attention, _, part = name.rpartition(".")
        parts = _TOGETHER.get(attention.rpartition(".")[2], ())
        if not parts or part != parts[0]:
            continue
        candidates = [by_name.get(f"{attention}.{part}") for part in parts]
        members = [adapter for adapter in candidates if _can_join(adapter)]
        if len(members) == len(parts) and len({_likeness(adapter) for adapter in members}) == 1:
            found.append(Joint(members))
    return found


def _can_join(adapter: Adapter | None) -> TypeGuard[LoraAdapter]:
    return (
        isinstance(adapter, LoraAdapter)
        and adapter.base_is_plain
        and not adapter.is_conv
        and adapter.dora_scale is None
        and adapter.layer.bias is None
        and not adapter.module_dropout  # each of them is switched off by itself
    )


def _likeness(adapter: LoraAdapter) -> tuple:
    learns = adapter.lora_down.requires_grad
    settings = (adapter.rank, adapter.alpha, adapter.multiplier, adapter.dropout, adapter.rank_dropout)
    return (adapter.shape, *settings, learns, getattr(adapter.layer, "compute_dtype", None))
