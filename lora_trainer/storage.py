"""The one door to frozen weights: from how a lender stores them to what is computed with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

TensorT = TypeVar("TensorT", bound=Tensor)


class Packing(Protocol):
    """How a weight is stored whose numbers are not simply those of its tensor."""

    def shape_of(self, stored: Tensor) -> tuple[int, ...]:
        """Of the weight."""
        ...

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight, in its shape and in ``dtype``, on the device of ``stored``."""
        ...

    def to(self, device: torch.device) -> Packing:
        """The same, for a tensor there."""
        ...


@dataclass(frozen=True)
class Scaled:
    """fp8 whose numbers are to be multiplied by ``scale``: one number (ComfyUI's scaled fp8), or (out, 1), one for each
    row. They may be kept in a wider format."""

    scale: Tensor

    def shape_of(self, stored: Tensor) -> tuple[int, ...]:
        return tuple(stored.shape)

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        return stored.to(dtype) * self.scale.to(dtype)

    def to(self, device: torch.device) -> Scaled:
        return Scaled(self.scale.to(device))


def pack(stored: TensorT, packing: Packing) -> TensorT:
    """The same tensor, of which ``dense_weight`` knows how it is stored."""
    stored.packing = packing  # type: ignore[attr-defined]
    return stored


def packing_of(stored: Tensor) -> Packing | None:
    return getattr(stored, "packing", None)


def same_weight(stored: TensorT, mark: object) -> TensorT:
    """The same tensor, marked as a copy of a weight of which all copies have this mark."""
    stored.weight_mark = mark  # type: ignore[attr-defined]
    return stored


def mark_of(stored: Tensor) -> object:
    """Is the same object for every copy of a weight that ``same_weight`` has marked; else the tensor itself."""
    return getattr(stored, "weight_mark", stored)


def form_of(stored: Tensor) -> tuple[object, object]:
    """How a weight is stored. Autograd may hand a saved tensor back as another object: whoever saves one keeps this
    beside it, for ``as_stored``."""
    return packing_of(stored), getattr(stored, "quant_state", None)


def as_stored(saved: Tensor, form: tuple[object, object]) -> Tensor:
    """A tensor that was saved for the backward pass, as ``dense_weight`` takes it."""
    for name, value in zip(("packing", "quant_state"), form):
        if value is not None:
            setattr(saved, name, value)
    return saved


def dense_weight(
    stored: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """A frozen weight in the format of the computation, without a gradient; the stored tensor itself where it is so.

    Whoever computes with it asks for it again in the backward pass instead of keeping it. All code that reads a frozen
    weight calls this, so a further number format is a further ``Packing``.

    stored: in any floating-point format, packed (see ``pack``), or in bitsandbytes' 4 bits. shape: of the layer's
        weight, which the stored tensor need not have. device: where it is needed, if not where it lies.
    """
    if (state := getattr(stored, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        stored = dequantize_4bit(stored.detach(), state)
    elif (packing := packing_of(stored)) is not None:
        stored = packing.unpack(stored.detach(), dtype)
    value = stored.detach().to(device=device, dtype=dtype)
    return value if shape is None else value.view(tuple(shape))


def main_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The number format that most of these weights' values are stored in; None of none."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0] if numbers else None
