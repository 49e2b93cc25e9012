"""The one door to frozen weights: from how a lender stores them to what is computed with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def dense_weight(
    stored: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """A frozen weight in the format of the computation, without a gradient; the stored tensor itself where it is so.

    Whoever computes with it asks for it again in the backward pass instead of keeping it. All code that reads a frozen
    weight calls this, so a further number format (fp8 with a scale, GGUF) is added here alone.

    stored: in any floating-point format, or in bitsandbytes' 4 bits. shape: of the layer's weight, which the stored
        tensor need not have. device: where it is needed, if not where it lies.
    """
    if (state := getattr(stored, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        stored = dequantize_4bit(stored.detach(), state)
    value = stored.detach().to(device=device, dtype=dtype)
    return value if shape is None else value.view(tuple(shape))


def main_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The number format that most of these weights' values are stored in; None of none."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0] if numbers else None
