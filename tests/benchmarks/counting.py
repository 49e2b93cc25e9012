"""Counts what a GPU would launch, read and write for a piece of code that runs on fake CPU tensors.

One call of an operator is one kernel, except where ``_rules`` say otherwise (a normalization, attention's backward
pass, a bias of a convolution, the foreach operators). The numbers are those of CUDA kernels of torch 2.1 to 2.13.
Random numbers are drawn on the host and cost nothing here. Not counted: layout changes inside of cuDNN.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GPUS = {"RTX 4090": (165e12, 1.0e12), "H100": (790e12, 3.0e12)}
"""FLOP/s of dense bf16 products and bytes/s of memory that are reached in practice."""
LAUNCH_SECONDS = 4e-6
"""What a kernel costs the CPU that launches it: none takes less."""

_NOTHING = {  # no kernel: views, and memory without content
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "split", "split_with_sizes", "unsqueeze"),
    *("squeeze", "select", "alias", "detach", "as_strided", "_reshape_alias", "unbind", "chunk", "lift_fresh"),
    *("detach_", "unsqueeze_", "squeeze_", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
}
_ON_THE_HOST = {"randn", "randint", "random_", "normal_"}
_ONCE = {"zeros", "zeros_like"}  # the optimizer's state, made in the first step
_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "baddbmm_": (1, 2)}
_COPIES = {"cat", "stack", "clone", "copy_", "contiguous"}
_CHUNK, _BLOCKS = 65536, 320  # of multi_tensor_apply.cuh
_TENSORS = (110, 64, 48, 36, 30)  # that one kernel takes, by how many lists it walks
_FOREACH_LISTS = {"_foreach_copy_": 2, "_foreach_lerp_": 2, "_foreach_addcmul_": 3, "_foreach_addcdiv_": 3}
_FOREACH_LISTS |= {"_fused_adam_": 4, "_fused_adamw_": 4}


@dataclass(frozen=True)
class Row:
    """One operator that ran. kind: what the report sums it under."""

    phase: str
    operator: str
    kind: str
    launches: int
    operations: float
    bytes: float


class Count(TorchDispatchMode):
    """A mode that keeps a ``Row`` of everything that runs inside while ``phase`` is set.

    rank: of the adapters, by which their products are told from those of the frozen layers.
    """

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank
        self.phase: str | None = None
        self.rows: list[Row] = []
        self.kept = 0  # bytes that autograd holds for the backward pass, weights aside
        self.waits = 0  # times that the CPU asks for a number
        self.peak = 0  # bytes at the fullest moment, of what came while a phase was set
        self._live = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":
            self.waits += 1
            return 1.0 if args[0].is_floating_point() else 1
        output = func(*args, **kwargs)
        if self.phase is not None:
            self._watch(output)
            once = self.phase == "optimizer" and name in _ONCE
            if func.namespace == "aten" and not once and name not in _NOTHING | _ON_THE_HOST:
                kind, launches, operations, size = _cost(name, args, kwargs, output, self.rank)
                kind = self.phase if self.phase in ("clip", "optimizer") else kind
                self.rows.append(Row(self.phase, name, kind, launches, operations, size))
        return output

    def _watch(self, output: Any) -> None:
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known[key] = storage.nbytes()
                self._live += storage.nbytes()
                self.peak = max(self.peak, self._live)
                weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._live -= self._known.pop(key)

    @contextmanager
    def keeping(self, weights: Iterator[Tensor]) -> Iterator[None]:
        """Inside, what autograd saves is added to ``kept``; ``weights`` are there anyway."""
        there = {weight.untyped_storage()._cdata for weight in weights}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in there:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.kept += sum(saved.values())

    # -- sums -----------------------------------------------------------------------------------------------------

    @property
    def launches(self) -> int:
        return sum(row.launches for row in self.rows)

    def launches_by(self, attribute: str) -> dict[str, int]:
        """Launches by "phase", "kind" or "operator", the most first."""
        found: Counter[str] = Counter()
        for row in self.rows:
            found[getattr(row, attribute)] += row.launches
        return dict(found.most_common())

    @property
    def elementwise_bytes(self) -> float:
        """Read and written by all that is no product, convolution or attention."""
        heavy = {"frozen product", "adapter product", "convolution", "attention"}
        return sum(row.bytes for row in self.rows if row.kind not in heavy)

    def floor(self, gpu: str) -> float:
        """Seconds below which the GPU cannot come: of each kernel what its operations, its bytes or its launch take."""
        speed, bandwidth = GPUS[gpu]
        return sum(
            max(row.operations / speed, row.bytes / bandwidth, LAUNCH_SECONDS * row.launches) for row in self.rows
        )

    def limit(self, gpu: str) -> float:
        """Seconds of the frozen sums alone at full speed."""
        frozen = {"frozen product", "convolution", "attention"}
        return sum(row.operations for row in self.rows if row.kind in frozen) / GPUS[gpu][0]

    def bytes_by_kind(self) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for row in self.rows:
            found[row.kind] += row.bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def _cost(name: str, args: tuple, kwargs: dict, output: Any, rank: int) -> tuple[str, int, float, float]:
    """(kind, launches, operations, bytes) of one call."""
    inputs, outputs = [*_tensors(args), *_tensors(kwargs)], list(_tensors(output))
    written = sum(map(_size, outputs))
    moved = written + sum(_size(tensor) for tensor in {_place(tensor): tensor for tensor in inputs}.values())
    if name in _PRODUCTS:
        a, b = (args[index] for index in _PRODUCTS[name])
        operations = 2 * math.prod(a.shape) * b.shape[-1]
        return _product(rank, *a.shape[-2:], *b.shape[-2:]), 1, operations, moved
    if name in ("convolution", "convolution_backward"):
        return _convolution(name, args, outputs, rank, moved)
    if "_flash_attention" in name:
        query, key = args[1:3] if "backward" in name else args[:2]
        operations = 4 * math.prod(query.shape) * key.shape[2]
        if "backward" not in name:
            return "attention", 1, operations, moved
        # The sum is emptied, the rows' products are made, the gradients, and that of the query is converted.
        return "attention", 4, 2.5 * operations, moved + 3 * 4 * query.numel()
    if name.startswith("native_"):
        return _normalization(name, args, outputs)
    if name in ("_to_copy", "to"):
        source, target = inputs[0], outputs[0]
        copies = source.dtype == target.dtype and source.stride() == target.stride()
        return "copy" if copies else "cast", 1, 0, moved
    if name.startswith(("_foreach", "_fused")):
        return _foreach(name, args, kwargs, moved)
    if name in _COPIES:
        return "copy", 1, 0, 2 * written if name == "cat" else moved
    return "elementwise", 1, 0, moved


def _product(rank: int, *sides: int) -> str:
    return "adapter product" if any(side in (rank, 2 * rank, 3 * rank) for side in sides) else "frozen product"


def _convolution(name: str, args: tuple, outputs: list, rank: int, moved: float) -> tuple[str, int, float, float]:
    backward = name == "convolution_backward"
    weight, result = (args[2], args[0]) if backward else (args[1], outputs[0])
    operations = 2 * result.numel() * math.prod(weight.shape[1:])
    kind = "adapter product" if rank in weight.shape[:2] else "convolution"
    if backward:
        wanted = args[10]
        return kind, sum(map(int, wanted)), operations * (int(wanted[0]) + int(wanted[1])), moved
    if isinstance(args[2], Tensor):  # cuDNN adds the bias by itself
        return kind, 2, operations, moved + 2 * _size(result)
    return kind, 1, operations, moved


def _normalization(name: str, args: tuple, outputs: list) -> tuple[str, int, float, float]:
    given = _size(args[1]) if "backward" in name else _size(args[0])
    if name == "native_group_norm":  # statistics, what they mean per channel, the output
        return "normalization", 3, 0, 2 * given + _size(outputs[0])
    if name == "native_group_norm_backward":
        return "normalization", 4, 0, 2 * (_size(args[0]) + given) + given
    if name == "native_layer_norm":
        return "normalization", 1, 0, given + _size(outputs[0])
    return "normalization", 1, 0, 3 * given


def _foreach(name: str, args: tuple, kwargs: dict, moved: float) -> tuple[str, int, float, float]:
    lists = [values for values in args if isinstance(values, (list, tuple)) and values and _is_tensor(values[0])]
    sizes = [tensor.numel() for tensor in lists[0]]
    launches = _multi_tensor_launches(sizes, _TENSORS[_FOREACH_LISTS.get(name, 1) - 1]) + (name == "_foreach_norm")
    return "foreach", launches, 0, moved + sum(map(_size, lists[0])) if name.endswith("_") else moved


def _multi_tensor_launches(sizes: list[int], most: int) -> int:
    launches = tensors = blocks = 0
    for size in filter(None, sizes):
        chunks = -(-size // _CHUNK)
        tensors += 1
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == most and last) or blocks == _BLOCKS:
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
    return launches + (blocks > 0)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _place(tensor: Tensor) -> tuple:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)


def _size(tensor: Tensor) -> int:
    """Bytes that are really touched: an expanded dimension counts once."""
    sides = (side for side, stride in zip(tensor.shape, tensor.stride()) if stride)
    return math.prod(sides) * tensor.element_size()


# -- CUDA's choices on the CPU ------------------------------------------------------------------------------------


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, attention is the flash kernel, and autocast computes normalizations in fp32, as CUDA has both."""
    with ExitStack() as stack:
        for name in ("group_norm", "layer_norm"):
            stack.enter_context(patch.object(functional, name, _in_fp32(getattr(functional, name))))
        stack.enter_context(patch.object(functional, "scaled_dot_product_attention", _flash_attention))
        for module in (torch.utils._foreach_utils, torch.nn.utils.clip_grad):
            stack.enter_context(patch.object(module, "_has_foreach_support", lambda tensors, device: True))
        yield


def _in_fp32(function: Any) -> Any:
    def normalize(
        x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        if not torch.is_autocast_cpu_enabled():
            return function(x, shape, weight, bias, eps)
        wide = [None if one is None else one.float() for one in (weight, bias)]
        with torch.autocast("cpu", enabled=False):
            return function(x.float(), shape, *wide, eps)

    return normalize


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, **options: Any
) -> Tensor:
    if torch.is_autocast_cpu_enabled():
        query, key, value = (part.to(torch.get_autocast_cpu_dtype()) for part in (query, key, value))
    assert attn_mask is None and query.dtype in (torch.bfloat16, torch.float16), "the flash kernel does not take it"
    return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
