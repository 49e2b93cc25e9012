"""A pretended GPU for machines without one: tensors that say they lie on ``cuda:0`` and refuse to meet CPU tensors.

``DeviceTensor`` is a wrapper subclass (as torch's own FakeTensor) whose C++ device is ``meta`` and whose Python device
is the pretended one; it holds a real CPU tensor, with which every operation is computed. So code that branches on
``device.type == "cuda"`` takes the branch, results are real numbers, and what was left on the wrong device raises
"Expected all tensors to be on the same device", as CUDA does.

Imitated: copies between the devices (only a pinned source and ``non_blocking`` do not make the CPU wait; ``waits``
records those that do), generators, factories, CUDA's autocast, memory that runs out, and the functions of
``torch.cuda`` with the argument rules of torch 2.1 to 2.3. Works with torch 2.1 to 2.13. Not imitated: streams, other
threads than the one that entered, ``Module.to`` that keeps Parameter objects, foreach optimizers (torch takes its loop
for subclasses).
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._utils import _get_device_index
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.kernels import compute, tensors, tree_map

CPU = torch.device("cpu")
aten = torch.ops.aten

_LOWER = {
    "linear", "conv1d", "conv2d", "conv3d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm",
    "einsum", "scaled_dot_product_attention",
}  # fmt: skip
"""What CUDA's autocast computes in its own format, of what these models use."""
_FP32 = {
    "layer_norm", "group_norm", "softmax", "log_softmax", "exp", "log", "pow", "__pow__", "rsqrt", "norm", "mse_loss",
    "smooth_l1_loss", "cumsum", "cumprod", "prod", "sum", "cosine_similarity",
}  # fmt: skip
_READ = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_consecutive"}
"""Operations whose result the CPU has to wait for."""


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended device. ``held``: the CPU tensor that it computes with."""

    held: Tensor
    gpu: PretendedGpu
    account: list[int]  # the address of the storage that is counted as allocated

    @staticmethod
    def __new__(cls, held: Tensor, gpu: PretendedGpu) -> DeviceTensor:
        if gpu.device.type == "mps" and held.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the framework has none.")
        gpu.allocate(held)
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device("meta"),
        )  # fmt: skip
        tensor.held, tensor.gpu, tensor.account = held, gpu, [held.untyped_storage().data_ptr()]
        weakref.finalize(tensor, gpu.free, tensor.account)
        return tensor

    def __init__(self, held: Tensor, gpu: PretendedGpu):
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl

    device = property(lambda self: self.gpu.device)
    is_cuda = property(lambda self: self.gpu.device.type == "cuda")
    is_meta = property(lambda self: False)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, DeviceTensor):
            raise RuntimeError("a tensor's data stays on its device")
        torch.Tensor.data.__set__(self, value)
        self.gpu.allocate(value.held)
        self.gpu.free(self.account)
        self.held, self.account[0] = value.held, value.account[0]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def set_(self, storage: Any, *where: Any) -> Tensor:
        """On a new, empty tensor only: another object is returned."""
        return DeviceTensor(torch.empty(0, dtype=self.dtype).set_(storage, *where), self.gpu)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")

    def __repr__(self, **options: Any) -> str:
        return f"DeviceTensor({self.held!r}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        flat, spec = tree_flatten((args, kwargs))
        ours = [item for item in flat if isinstance(item, DeviceTensor)]
        gpu, packet = ours[0].gpu, func.overloadpacket
        if any(tensor.gpu is not gpu for tensor in ours):
            raise _mixed(func, flat)
        if packet is aten._to_copy and _is_cpu(kwargs.get("device")):
            gpu.note(not kwargs.pop("non_blocking", False), func)
            return func(args[0].held, **kwargs)
        if packet is aten.copy_:
            return _copied(func, *args, **kwargs)
        if packet is aten.where:  # its gradient takes a 0 that C++ makes where it takes the tensors to be
            flat = [torch.zeros((), dtype=item.dtype) if _is_meta_number(item) else item for item in flat]
            args, kwargs = tree_unflatten(flat, spec)
        _refuse_mixed(func, flat, packet, args)
        gpu.note(packet.__name__ in _READ, func)
        held = {id(tensor.held): tensor for tensor in ours}
        flat = [item.held if isinstance(item, DeviceTensor) else item for item in flat]
        flat = [CPU if isinstance(item, torch.device) else item for item in flat]
        args, kwargs = tree_unflatten(flat, spec)
        found = compute(func, args, kwargs)
        return tree_map(lambda value: _output(value, held, gpu), found)


class PretendedGpu:
    """One pretended device. See ``pretended_gpu``."""

    def __init__(self, device: torch.device, memory: int, capability: tuple[int, int]):
        self.device, self.memory, self.capability = device, memory, capability
        self.allocated = self.peak = 0
        self.waits: list[str] = []
        self._living: dict[int, tuple[int, int]] = {}  # address of a storage -> (tensors on it, bytes)

    def tensor(self, held: Tensor) -> Tensor:
        return DeviceTensor(held, self)

    def is_here(self, device: Any) -> bool:
        """Whether ``device`` means this one: by its type, by its index as well, or by the index alone."""
        if device is None or isinstance(device, bool):
            return False
        device = torch.device(self.device.type, device) if isinstance(device, int) else torch.device(device)
        if device.type == self.device.type and device.index not in (None, self.device.index):
            raise RuntimeError(f"there is no {device}")
        return device.type == self.device.type

    def note(self, waits: bool, func: Any) -> None:
        if waits:
            ours = [line for line in traceback.extract_stack() if "lora_trainer" in line.filename]
            self.waits.append(f"{func} at {ours[-1].name if ours else '?'}")

    # Memory -----------------------------------------------------------------------------------------------------

    def allocate(self, held: Tensor) -> None:
        storage = held.untyped_storage()
        tensors, size = self._living.get(storage.data_ptr(), (0, 0))
        if not tensors:
            size = storage.nbytes()
            if self.allocated + size > self.memory:
                raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        self._living[storage.data_ptr()] = tensors + 1, size

    def free(self, account: list[int]) -> None:
        tensors, size = self._living.pop(account[0])
        if tensors > 1:
            self._living[account[0]] = tensors - 1, size
        else:
            self.allocated -= size


class _Mode(TorchFunctionMode):
    """What happens before a function of torch reads its arguments: devices, generators, autocast."""

    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._C._nn._parse_to:  # Module.to, which only reads its arguments with it
            return func(*args, **kwargs)
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return self._to(args[0], self.gpu.device)
        if func is torch.Tensor.pin_memory:
            if isinstance(args[0], DeviceTensor):
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if func in (torch.Tensor.backward, torch.autograd.backward):
            with self:  # torch leaves the mode for what it is asked to do
                return _backward(*args, **kwargs)
        here = self.gpu.is_here(kwargs.get("device"))
        generator = kwargs.get("generator")
        if here:
            del kwargs["device"]
        if generator is not None:
            wanted = self.gpu.device.type if here else args[0].device.type if tensors(args) else "cpu"
            if generator.device.type != wanted:
                raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{generator.device}'")
        self.gpu.note(here and func in (torch.tensor, torch.as_tensor), func)
        args, kwargs = self._autocast(func, args, kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], DeviceTensor):
            func = _attention  # torch's own makes its causal mask where C++ takes the tensors to be
        found = func(*args, **kwargs)
        if func is torch.Tensor.narrow and getattr(args[0], "is_pinned_here", False):
            found.is_pinned_here = True
        if here and type(found) in (torch.Tensor, torch.nn.Parameter):
            wraps = DeviceTensor(found.detach(), self.gpu)
            return wraps.requires_grad_() if found.requires_grad else wraps
        return found

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, flags = kwargs.get("device"), kwargs.get("dtype"), []
        other = kwargs.get("other")
        for value in (*args, *([] if other is None else [other])):
            if isinstance(value, Tensor):
                device, dtype = value.device, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, bool):
                flags.append(value)
            elif value is not None:
                device = value
        non_blocking = kwargs.get("non_blocking", flags[0] if flags else False)
        copy = kwargs.get("copy", flags[1] if len(flags) > 1 else False)
        layout = {} if kwargs.get("memory_format") is None else {"memory_format": kwargs["memory_format"]}
        target = tensor.device
        if device is not None:
            target = self.gpu.device if self.gpu.is_here(device) else torch.device(device)
        if isinstance(tensor, DeviceTensor) and target.type == "meta":
            target = tensor.device  # which torch's own C++ takes it for
        if target == tensor.device:
            return tensor.to(dtype=dtype or tensor.dtype, copy=copy, **layout)
        if target == self.gpu.device and tensor.device == CPU:
            if target.type == "mps" and non_blocking:
                raise RuntimeError("the copy may read the memory when it is somebody else's: nothing keeps it")
            self.gpu.note(not (non_blocking and getattr(tensor, "is_pinned_here", False)), "copy to the device")
            with _Arrival(self.gpu):
                return aten._to_copy.default(tensor, dtype=dtype, **layout)
        if isinstance(tensor, DeviceTensor) and target == CPU:
            return aten._to_copy.default(tensor, dtype=dtype, device=CPU, non_blocking=non_blocking, **layout)
        return tensor.to(target, dtype or tensor.dtype, copy=copy, **layout)

    def _autocast(self, func: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        dtype, name = _autocast_dtype(self.gpu.device.type), getattr(func, "__name__", "")
        if dtype is None or name not in _LOWER | _FP32:
            return args, kwargs
        wanted = dtype if name in _LOWER else torch.float32

        def cast(value: Any) -> Any:
            if not isinstance(value, DeviceTensor) or not value.is_floating_point() or value.dtype == torch.float64:
                return value
            return value.to(wanted)

        return tree_map(cast, args), tree_map(cast, kwargs)


class _Arrival(TorchDispatchMode):
    """Inside, a copy of a CPU tensor arrives on the device; what is recorded for gradients is what torch records."""

    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return DeviceTensor(found, self.gpu) if func.overloadpacket is aten._to_copy else found


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(DeviceTensor(above, query.gpu), float("-inf"))
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if masked else scores + attn_mask
    return scores.softmax(-1) @ value


def _backward(tensors: Any, gradient: Tensor | None = None, retain_graph: bool | None = None, **options: Any) -> None:
    (tensor,) = (tensors,) if isinstance(tensors, Tensor) else tensors
    inputs = tuple(options.get("inputs") or ())
    torch.autograd.Variable._execution_engine.run_backward(
        (tensor,), (torch.ones_like(tensor) if gradient is None else gradient,), bool(retain_graph), False, inputs,
        allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip


def _autocast_dtype(kind: str) -> torch.dtype | None:
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def _is_cpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cpu"


def _is_meta_number(item: Any) -> bool:
    return isinstance(item, Tensor) and not isinstance(item, DeviceTensor) and item.is_meta and item.dim() == 0


def _mixed(func: Any, flat: Any) -> RuntimeError:
    places = " and ".join(sorted({str(tensor.device) for tensor in tensors(flat)}))
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {places}! ({func})"
    )


def _refuse_mixed(func: Any, flat: list, packet: Any, args: tuple) -> None:
    """CUDA's rule: numbers (0-dimensional CPU tensors) may come from the CPU, and so may indices."""
    strangers = [item for item in flat if isinstance(item, Tensor) and not isinstance(item, DeviceTensor)]
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        strangers = [item for item in strangers if not any(item is index for index in args[1])]
    writes = func._schema.name.endswith("_") and any(item is args[0] for item in strangers)
    if writes or any(item.dim() > 0 for item in strangers):
        raise _mixed(func, flat)


def _copied(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    here, there = isinstance(target, DeviceTensor), isinstance(source, DeviceTensor)
    gpu = target.gpu if here else source.gpu
    pinned = getattr(source if here else target, "is_pinned_here", False)
    gpu.note(here != there and not (non_blocking and pinned), func)
    func(target.held if here else target, source.held if there else source)
    return target


def _output(value: Any, held: dict[int, DeviceTensor], gpu: PretendedGpu) -> Any:
    if not isinstance(value, Tensor):
        return value
    known = held.get(id(value))
    if known is not None:  # an operation in place
        if known.shape != value.shape or known.dtype != value.dtype:
            raise NotImplementedError("the shape of a tensor on the pretended device cannot be changed in place")
        return known
    return DeviceTensor(value, gpu)


class Generator(torch.Generator):
    """A generator that says where it is."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        generator = super().__new__(cls, "cpu")
        generator.place = torch.device(device)
        return generator

    device = property(lambda self: self.place)


def assert_alike(lora: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Two LoRAs are the same but for rounding, which AdamW's first steps blow up where a gradient is nearly 0."""
    assert lora.keys() == other.keys()
    one, two = (torch.cat([tensors[key].flatten().float() for key in other]) for tensors in (lora, other))
    assert (one - two).norm() < 0.01 * two.norm()


@contextmanager
def pretended_gpu(
    device: str = "cuda:0", memory: int = 8 << 30, capability: tuple[int, int] = (8, 6)
) -> Iterator[PretendedGpu]:
    """Inside, in this thread, there is one device more. memory: its bytes. capability: that of CUDA."""
    gpu = PretendedGpu(torch.device(device), memory, capability)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        if gpu.device.type == "cuda":
            for name, function in _cuda(gpu).items():
                stack.enter_context(mock.patch.object(torch.cuda, name, function))
            if hasattr(torch, "accelerator"):  # whose C++ asks CUDA; AdamW asks it from torch 2.14 on
                stream = SimpleNamespace(is_capturing=lambda: False)
                stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", lambda device=None: stream))
        if gpu.device.type == "mps":
            stack.enter_context(mock.patch.object(torch.backends.mps, "is_available", lambda: True))
        stack.enter_context(_Mode(gpu))
        yield gpu


def _cuda(gpu: PretendedGpu) -> dict[str, Any]:
    """Functions of ``torch.cuda``. How each reads its ``device`` is taken from torch 2.1's ``torch/cuda/*.py``."""

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        _get_device_index(0 if device is None else device)  # no ``optional``: torch.device("cuda") raises ValueError
        return gpu.memory - gpu.allocated, gpu.memory

    def optional(value: Callable[[], Any]) -> Callable[..., Any]:
        def function(device: Any = None) -> Any:
            if _get_device_index(device, optional=True) != 0:
                raise AssertionError("Invalid device id")
            return value()

        return function

    def reset_peak() -> None:
        gpu.peak = gpu.allocated

    def no_graph(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the pretended device records no graphs")

    properties = SimpleNamespace(name="pretended", major=gpu.capability[0], minor=gpu.capability[1],
                                 total_memory=gpu.memory)  # fmt: skip
    states = torch.get_rng_state()
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "default_generators": (torch._C.Generator(),),
        "mem_get_info": mem_get_info,
        "memory_allocated": optional(lambda: gpu.allocated),
        "memory_reserved": optional(lambda: gpu.allocated),
        "max_memory_allocated": optional(lambda: gpu.peak),
        "reset_peak_memory_stats": optional(reset_peak),
        "get_device_properties": optional(lambda: properties),
        "get_device_capability": optional(lambda: gpu.capability),
        "get_device_name": optional(lambda: "pretended"),
        "is_current_stream_capturing": lambda: False,
        "CUDAGraph": SimpleNamespace,
        "graph": no_graph,
        "synchronize": optional(lambda: None),
        "is_bf16_supported": lambda *args, **kwargs: gpu.capability[0] >= 8,
        "empty_cache": lambda: None,
        "get_rng_state_all": lambda: [states],
        "set_rng_state_all": lambda states: None,
    }
