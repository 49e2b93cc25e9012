"""Linear layers in 4 bits (nf4), by bitsandbytes."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.errors import UserError
from lora_trainer.models.families.causal_lm.network import as_it_is, decoder_layers


def load_bitsandbytes(device: torch.device) -> Any:
    """The package. Raises UserError when it is not there, or cannot quantize on this kind of device."""
    try:
        import bitsandbytes

        packed, state = bitsandbytes.functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        whole = bitsandbytes.functional.dequantize_4bit(packed, state)
        works = whole.shape == (64, 64) and bool(torch.isfinite(whole).all())
    except ImportError as error:
        raise UserError(
            "nf4 needs the package bitsandbytes.", field="quantize", remedy="pip install bitsandbytes, or use no."
        ) from error
    # Without a kernel for the device it fails in whatever it calls first, another one in each release.
    except Exception:  # noqa: BLE001
        works = False
    if not works:
        version = importlib.metadata.version("bitsandbytes")
        raise UserError(
            f"bitsandbytes {version} cannot quantize on {device.type} here.",
            field="quantize",
            remedy="Use no, or a newer bitsandbytes: on a CPU 0.49.2 can.",
        )
    return bitsandbytes


def use_nf4(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Exchange the Linear layers of all blocks for quantized ones without weights; those are quantized as they are
    bound. ``dtype``: of the computation. Embeddings and head stay as they are."""
    bitsandbytes = load_bitsandbytes(device)
    _, layers = decoder_layers(network)
    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                quantized = bitsandbytes.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=dtype,
                    quant_type="nf4",
                    device="meta",
                )
                setattr(parent, name, quantized.eval().requires_grad_(False))


def quantized(module: nn.Module, name: str, value: Tensor) -> nn.Parameter:
    """A frozen parameter of this value, which lies on its device; the weight of a quantized layer in 4 bits."""
    import bitsandbytes

    if name != "weight" or not isinstance(module, bitsandbytes.nn.Linear4bit):
        return as_it_is(module, name, value)
    return bitsandbytes.nn.Params4bit(value.contiguous(), requires_grad=False, quant_type="nf4").to(value.device)
