"""What each kind of network adds to a weight matrix, as pure functions of the stored tensors.

Shapes: W is (out, in) for a Linear and (out, in, kh, kw) for a convolution; r is the rank. The formulas are those by
which A1111, Forge, ComfyUI and LyCORIS read the files, so a change here is a change of the file format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def low_rank_delta(down: Tensor, up: Tensor) -> Tensor:
    """LoRA and LoCon: ``up · down``. down (r, in[, kh, kw]), up (out, r[, 1, 1]) -> (out, in[, kh, kw])."""
    return (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


def low_rank_squared_norm(down: Tensor, up: Tensor) -> Tensor:
    """‖up · down‖² (Frobenius) as the sum over a product of two r × r matrices: the change itself is not formed."""
    down, up = down.flatten(1), up.flatten(1)
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0)


def tucker_delta(down: Tensor, mid: Tensor, up: Tensor) -> Tensor:
    """LoCon with a core: down (r, in, 1, 1), mid (r, r, kh, kw), up (out, r, 1, 1) -> (out, in, kh, kw)."""
    return torch.einsum("n m k l, i n, m j -> i j k l", mid, up.flatten(1), down.flatten(1))


def tucker_core_delta(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """LoHa's and LoKr's form of the same: core (r, r, kh, kw), a (r, out), b (r, in) -> (out, in, kh, kw)."""
    return torch.einsum("i j k l, i p, j q -> p q k l", core, a, b)


def hadamard_delta(w1: Tensor, w2: Tensor, shape: Sequence[int]) -> Tensor:
    """LoHa (FedPara, arXiv:2108.06098): the element-wise product of two low-rank matrices, seen as ``shape``."""
    return (w1 * w2).view(*shape)


def kronecker_delta(w1: Tensor, w2: Tensor, shape: Sequence[int]) -> Tensor:
    """LoKr: ``w1 ⊗ w2``. w1 (a, c); w2 (b, d), (b, d, kh, kw) or (b, d·kh·kw) -> (a·b, c·d[, kh, kw])."""
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    return torch.kron(w1, w2.contiguous()).view(*shape)


def factorize(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Split ``dimension`` into (smaller, larger), as evenly as possible; a positive ``factor`` bounds the smaller.

    The same choice as LyCORIS makes, so that its files and ours have the same shapes.
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = math.isqrt(dimension) if factor <= 0 else min(factor, math.isqrt(dimension))
    smaller = next(divisor for divisor in range(limit, 0, -1) if dimension % divisor == 0)
    return smaller, dimension // smaller


def column_norm(weight: Tensor, axis: int = 1) -> Tensor:
    """Length of W's columns: (out, in[, kh, kw]) -> (1, in[, 1, 1]); one number for each *input*.

    axis 0: length of its rows, (out, 1[, 1, 1]); one number for each output.
    """
    return torch.linalg.vector_norm(weight, dim=(1 - axis, *range(2, weight.dim())), keepdim=True)


def changed_norm_squared(
    norm_squared: Tensor, weight: Tensor, down: Tensor, up: Tensor, low_up: Tensor, scale: float
) -> Tensor:
    """‖W + ΔW‖² per column for ``ΔW = scale · up · down``, without either of the two: (1, in[, 1, 1]) fp32.

    ‖w + δ‖² = ‖w‖² + 2 w·δ + ‖δ‖², and with δ = scale · up d the last two need only upᵀ W (r, in) and upᵀ up (r, r).
    norm_squared: ‖W‖² per column, as ``column_norm`` has it. down and up are fp32. weight may be in a lower format,
    that of ``low_up``; upᵀ W is then as exact as that format. Where w and δ almost cancel, the sum is rounding: it may
    be of either sign.
    """
    columns, matrix = down.flatten(1), up.flatten(1)  # (r, in·k), (out, r)
    cross = low_up.flatten(1).t().mm(weight.flatten(1)).to(columns.dtype)  # (r, in·k)
    mixed = torch.addmm(cross, matrix.t().mm(matrix), columns, beta=2 * scale, alpha=scale**2)
    change = mixed.mul_(columns).view(len(down), down.shape[1], -1).sum((0, 2))
    return change.view_as(norm_squared).add_(norm_squared)


def dora_gain(weight: Tensor, delta: Tensor, dora_scale: Tensor, axis: int = 1) -> Tensor:
    """DoRA (arXiv:2402.09353) per input column: ``dora_scale / ‖W + ΔW‖``, (1, in[, 1, 1]); per row with axis 0.

    The smallest float keeps a column of zeros (a layer that starts at zero) from becoming NaN.
    """
    norm = column_norm(weight + delta, axis)
    return dora_scale / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def decompose(weight: Tensor, delta: Tensor, dora_scale: Tensor, axis: int = 1) -> Tensor:
    """W with the change and DoRA's magnitudes: ``(W + ΔW) · dora_scale / ‖W + ΔW‖``, what A1111 puts in W's place.

    axis: of the magnitudes, 1 for the inputs (A1111), 0 for the outputs (PEFT).
    """
    return (weight + delta) * dora_gain(weight, delta, dora_scale, axis)


def truncated_factors(delta: Tensor, rank: int, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """The best approximation of ``delta`` (out, in) of this rank (Eckart–Young), as (down (r, in), up (out, r)).

    r is at most ``rank``, at most the number of singular values that are not zero, and no more than it takes for
    ``share`` of the squared Frobenius norm. Both factors get the square root of the singular values.
    """
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return _split(u, s, vh, rank, share)


def truncated_product(down: Tensor, up: Tensor, rank: int, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """``truncated_factors(up @ down, …)`` without ever forming the product: QR of the factors, SVD of r × r."""
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    return _split(q_up @ u, s, vh @ q_down.T, rank, share)


def _split(u: Tensor, s: Tensor, vh: Tensor, rank: int, share: float) -> tuple[Tensor, Tensor]:
    threshold = s[:1].sum() * torch.finfo(s.dtype).eps * max(len(u), vh.shape[1])
    keep = min(rank, int((s > threshold).sum()))
    if share < 1 and keep:
        energy = s.double().square().cumsum(0)
        keep = min(keep, int((energy < share * energy[-1]).sum()) + 1)
    root = s[:keep].sqrt()
    return root[:, None] * vh[:keep], u[:, :keep] * root
