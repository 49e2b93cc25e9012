"""What the pretended GPU computes with: the CPU's kernels, and in Python those that a CPU lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def tensors(flat: Any) -> list[Tensor]:
    return [item for item in tree_flatten(flat)[0] if isinstance(item, Tensor)]


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    flat, spec = tree_flatten(tree)
    return tree_unflatten([function(item) for item in flat], spec)


def compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """On the CPU, in fp32 where the CPU of this torch has no kernel for fp16 or bf16, which a GPU has."""
    missing = _MISSING.get(func.overloadpacket.__name__)
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        if missing is not None and isinstance(error, NotImplementedError):
            return missing(*args, **kwargs)
        if "not implemented for" not in str(error):
            raise
    dtypes = {tensor.dtype for tensor in tensors((args, kwargs))} & {torch.float16, torch.bfloat16}
    if len(dtypes) != 1:
        raise NotImplementedError(f"{func} with {dtypes}")
    (dtype,) = dtypes
    originals: dict[int, Tensor] = {}

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == dtype:
            wide = value.float()
            originals[id(wide)] = value
            return wide
        return torch.float32 if value is dtype else value

    wide_args, wide_kwargs = tree_map(widen, args), tree_map(widen, kwargs)
    found = func(*wide_args, **wide_kwargs)

    def narrow(value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) in originals:
            return originals[id(value)].copy_(value)
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

    return tree_map(narrow, found)


def _adamw(
    parameters: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor], maxima: list[Tensor],
    steps: list[Tensor], *, lr: float, beta1: float, beta2: float, weight_decay: float, eps: float, amsgrad: bool,
    maximize: bool, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    if found_inf is not None and found_inf.item():
        for step in steps:
            step.sub_(1)
        return
    for parameter, grad, mean, square, step in zip(parameters, grads, means, squares, steps):
        if grad_scale is not None:
            grad = grad / grad_scale
        parameter.mul_(1 - lr * weight_decay)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (square.sqrt() / (1 - beta2 ** step.item()) ** 0.5).add_(eps)
        parameter.addcdiv_(mean, denominator, value=-lr / (1 - beta1 ** step.item()))


def _unscale(grads: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    for grad in grads:
        if not grad.isfinite().all():
            found_inf.fill_(1.0)
        grad.mul_(inverse_scale)


def _update_scale(
    scale: Tensor, good: Tensor, found_inf: Tensor, growth: float, backoff: float, interval: int
) -> Tensor:
    if found_inf.item():
        scale.mul_(backoff)
        good.fill_(0)
    elif good.item() + 1 == interval:
        scale.mul_(growth)
        good.fill_(0)
    else:
        good.add_(1)
    return scale


_MISSING = {
    "_fused_adamw_": _adamw, "_amp_foreach_non_finite_check_and_unscale_": _unscale,
    "_amp_update_scale_": _update_scale,
}  # fmt: skip
"""Kernels that a GPU has and the CPU of torch 2.1 or 2.3 lacks."""
