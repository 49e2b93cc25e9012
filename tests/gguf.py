"""GGUF files of tests."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from lora_trainer.models.gguf_blocks import FORMATS

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
KINDS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": Q8_0, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
"""Numbers of ggml's types."""


def write(
    path: Path,
    tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]],
    alignment: int = 32,
    architecture: str = "flux",
) -> Path:
    """tensors: name -> (number of ggml's type, shape, bytes)."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1) + text("general.architecture") + struct.pack("<I", 8)
    content += text(architecture)
    data = b""
    for name, (kind, shape, stored) in tensors.items():
        data += bytes(-len(data) % alignment)
        content += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        content += struct.pack("<IQ", kind, len(data))
        data += stored
    path.write_bytes(content + bytes(-len(content) % alignment) + data)
    return path


def quantized(weight: torch.Tensor) -> bytes:
    """Q8_0 of a matrix."""
    blocks = weight.reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    numbers = (blocks / scale.float()).round().to(torch.int8)
    return torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], dim=1).numpy().tobytes()


def random_blocks(kind: str, count: int, seed: int = 0, scale: float = 0.013) -> torch.Tensor:
    """(count, bytes) of any numbers. scale: of the blocks; their minima have another."""
    form = FORMATS[kind]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, form.bytes), generator=generator, dtype=torch.uint8)
    scales = torch.tensor([scale, -1.6 * scale], dtype=torch.float16).view(torch.uint8)
    if kind == "Q6_K":
        blocks[:, 208:210] = scales[:2]
    else:
        blocks[:, :4] = scales if form.bytes in (20, 24, 144, 176) else torch.cat([scales[:2], blocks[0, 2:4]])
    return blocks


def stored_as_published(name: str, weight: torch.Tensor) -> tuple[int, tuple[int, ...], bytes]:
    """What published files keep of a flow model in Q8_0: matrices of the blocks in it, vectors in fp32."""
    shape, weight = tuple(weight.shape), weight.float()
    if weight.dim() == 2 and "blocks" in name:
        return Q8_0, shape, quantized(weight)
    if weight.dim() == 1:
        return F32, shape, weight.numpy().tobytes()
    return F16, shape, weight.half().numpy().tobytes()


def stored_in_all_formats(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Matrices of the blocks with random numbers in one format after the other, those with long rows in K formats."""
    stored, counts = {}, Counter[int]()
    for name, weight in weights.items():
        stored[name] = stored_as_published(name, weight)
        if stored[name][0] == Q8_0:
            shape = tuple(weight.shape)
            numbers = max(FORMATS[kind].numbers for kind in KINDS if shape[-1] % FORMATS[kind].numbers == 0)
            fit = [kind for kind in KINDS if FORMATS[kind].numbers == numbers]
            kind = fit[counts[numbers] % len(fit)]
            counts[numbers] += 1
            blocks = random_blocks(kind, weight.numel() // numbers, len(stored), 0.013 if numbers == 32 else 2e-4)
            stored[name] = (KINDS[kind], shape, blocks.numpy().tobytes())
    return stored


_T5_NAMES = {
    "encoder.block": "enc.blk", "encoder.final_layer_norm": "enc.output_norm", "shared": "token_embd",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b", "layer.0.SelfAttention.": "attn_",
    "layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm", "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up", "layer.1.DenseReluDense.wo": "ffn_down",
}  # fmt: skip


def write_t5(
    path: Path, t5: Mapping[str, torch.Tensor], scales: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A T5 as published ones are named: matrices whose rows are whole blocks in Q8_0, words in bf16.

    Returns the weights that are meant. scales: the format in which a block's scale is multiplied with its numbers.
    """
    stored, dense = {}, dict(t5)
    for name, tensor in t5.items():
        published = name
        for ours, theirs in _T5_NAMES.items():
            published = published.replace(ours, theirs)
        fits = tensor.dim() == 2 and tensor.shape[1] % 32 == 0 and "block" in name
        stored[published] = stored_as_published("blocks" if fits else "", tensor)
        if fits:
            blocks = torch.frombuffer(bytearray(stored[published][2]), dtype=torch.uint8).view(-1, 34)
            numbers = blocks[:, :2].contiguous().view(torch.float16).to(scales) * blocks[:, 2:].view(torch.int8)
            dense[name] = numbers.view(tensor.shape)
        elif tensor.dim() == 2:
            dense[name] = tensor.half()
    words = t5["shared.weight"].bfloat16()
    dense["shared.weight"] = words.float()
    stored["token_embd.weight"] = (BF16, tuple(words.shape), words.view(torch.int16).numpy().tobytes())
    write(path, stored)
    return dense
