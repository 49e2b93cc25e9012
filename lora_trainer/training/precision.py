"""Which device, and which number formats on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_trainer.devices import indexed, torch_version
from lora_trainer.errors import UserError


@dataclass(frozen=True)
class Precision:
    """weight_dtype: of the frozen base. mixed_dtype: of the computation where it is lower than fp32, else None."""

    device: torch.device
    weight_dtype: torch.dtype
    mixed_dtype: torch.dtype | None

    @property
    def name(self) -> str:
        """As in ``mixed_precision``: "no", "fp16" or "bf16"."""
        return {None: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.mixed_dtype]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations; what learns stays fp32."""
        return self.mixed_dtype or torch.float32

    def create_scaler(self) -> Any | None:
        """A GradScaler for fp16, else None. torch < 2.3 has it under torch.cuda.amp only."""
        if self.mixed_dtype != torch.float16:
            return None
        if hasattr(torch.amp, "GradScaler"):
            return torch.amp.GradScaler(self.device.type)
        return torch.cuda.amp.GradScaler()


def resolve(device: str | torch.device, mixed_precision: str, lent: torch.dtype | None = None) -> Precision:
    """Settle "auto": the GPU if there is one; bf16 where it computes in it, else fp16; fp32 elsewhere.

    lent: number format of weights that stay as they are. On a GPU "auto" follows it, fp16 and bf16 at least: in another
        format every layer would cast its weight, forwards and backwards.

    The device gets its index ("cuda" becomes "cuda:0").

    Raises:
        UserError: the device does not exist, or cannot compute in the format asked for.
    """
    device = indexed(_device(device))
    if mixed_precision == "auto":
        follows = device.type == "cuda" and lent != torch.float16 and _has_bf16(device)
        mixed_precision = ("bf16" if follows else "fp16") if device.type == "cuda" else "no"
    if mixed_precision == "fp16" and device.type != "cuda":
        raise UserError(
            f"fp16 training needs an NVIDIA or AMD GPU; this run is on {device.type}.",
            field="mixed_precision",
            remedy="Use auto or no.",
        )
    if mixed_precision == "bf16" and device.type == "cpu" and torch_version() < (2, 2):
        # Its attention writes past its buffers on the way back: https://github.com/pytorch/pytorch/issues/115253
        message = f"training in bf16 on the CPU crashes torch {torch.__version__}, and the program with it."
        raise UserError(message, field="mixed_precision", remedy="Use auto or no (fp32).")
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    return Precision(device, dtype or torch.float32, dtype)


def other_precision(name: str) -> list[str]:
    """What else may be tried where no loss is finite in this precision, as sentences: none, or one."""
    return [] if name == "no" else [f"Or set mixed_precision to {'bf16' if name == 'fp16' else 'no'}."]


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        remedy = "Use auto, cpu, cuda, cuda:1 or mps."
        raise UserError(f"{name!r} is no device.", field="device", remedy=remedy) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA GPU here.", field="device", remedy="Use auto or cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            last = torch.cuda.device_count() - 1
            raise UserError(f"there is no GPU {device.index}.", field="device", remedy=f"The last one is cuda:{last}.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("there is no Apple GPU here.", field="device", remedy="Use auto or cpu.")
    if device.type not in ("cpu", "cuda", "mps"):
        try:
            torch.zeros(1, device=device).cpu()
        # Each kind of device says in its own way that this torch was built without it, or that it holds no data.
        except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
            message = f"{name!r} does not work here ({(str(error) or type(error).__name__).splitlines()[0]})."
            raise UserError(message, field="device", remedy="Use auto, cpu, cuda, cuda:1 or mps.") from error
    return device


def _has_bf16(device: torch.device) -> bool:
    # torch.cuda.is_bf16_supported() says yes to emulation as well, which is slower than fp16.
    return torch.cuda.get_device_capability(device)[0] >= 8
