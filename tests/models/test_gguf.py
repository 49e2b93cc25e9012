"""GGUF: every block format against its definition in ggml, number by number; files; what is kept for backward."""

from __future__ import annotations

import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.errors import UserError
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.gguf import GgufSource
from lora_trainer.models.gguf_blocks import FORMATS, GgufPacking
from lora_trainer.storage import dense_weight, pack
from tests import flux as tiny
from tests.gguf import F32, Q8_0, quantized, random_blocks, write, write_t5


def half(data: bytes, at: int) -> float:
    return struct.unpack_from("<e", data, at)[0]


def k_scale(data: bytes, j: int) -> tuple[int, int]:
    """ggml's get_scale_min_k4."""
    q = data[4:16]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 0xF) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4)


def by_definition(kind: str, data: bytes) -> list[float]:
    """ggml-quants.c's dequantize_row_…, written down as loops."""
    d = half(data, 0)
    out = [0.0] * FORMATS[kind].numbers
    if kind == "Q8_0":
        return [d * value for value in struct.unpack("<32b", data[2:])]
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        one, five = kind.endswith("1"), kind.startswith("Q5")
        m = half(data, 2) if one else 0.0
        at = 4 if one else 2
        high = struct.unpack_from("<I", data, at)[0] if five else 0
        qs = data[at + (4 if five else 0) :]
        for j in range(16):
            for place, value in ((j, qs[j] & 15), (j + 16, qs[j] >> 4)):
                value |= ((high >> place) & 1) << 4
                out[place] = d * value + m if one else d * (value - (16 if five else 8))
        return out
    if kind in ("Q4_K", "Q5_K"):
        dmin, high, qs = half(data, 2), data[16:48], data[16 if kind == "Q4_K" else 48 :]
        for group in range(8):
            scale, minimum = k_scale(data, group)
            for i in range(32):
                byte = qs[32 * (group // 2) + i]
                value = byte >> 4 if group % 2 else byte & 15
                if kind == "Q5_K":
                    value |= (high[i] >> group & 1) << 4
                out[32 * group + i] = d * scale * value - dmin * minimum
        return out
    ql, qh, scales, d = data[:128], data[128:192], struct.unpack("<16b", data[192:208]), half(data, 208)
    for n in range(2):
        for i in range(32):
            low, next_low, high = ql[64 * n + i], ql[64 * n + 32 + i], qh[32 * n + i]
            values = (low & 15 | (high & 3) << 4, next_low & 15 | (high >> 2 & 3) << 4,
                      low >> 4 | (high >> 4 & 3) << 4, next_low >> 4 | (high >> 6 & 3) << 4)  # fmt: skip
            for part, value in enumerate(values):
                out[128 * n + 32 * part + i] = d * scales[8 * n + 2 * part + i // 16] * (value - 32)
    return out


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_blocks_are_decoded_as_ggml_defines_them(kind):
    blocks = random_blocks(kind, 3)
    expected = torch.tensor([by_definition(kind, bytes(block.tolist())) for block in blocks])
    shape = (3, FORMATS[kind].numbers)
    stored = pack(blocks.flatten(), GgufPacking(kind, shape))
    torch.testing.assert_close(dense_weight(stored, torch.float32), expected, atol=1e-6, rtol=1e-5)
    assert dense_weight(stored, torch.bfloat16).dtype == torch.bfloat16


def test_a_layer_has_the_gradient_of_its_dense_weight_and_keeps_no_copy():
    kind = "Q4_K"
    layer = torch.nn.Linear(256, 8, bias=False)
    packing = GgufPacking(kind, (8, 256))
    parameter = torch.nn.Parameter(random_blocks(kind, 8).flatten(), requires_grad=False)
    layer._parameters["weight"] = pack(parameter, packing)
    cast_layers(layer, torch.float32)
    x = torch.randn(4, 256, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert [tensor.dtype for tensor in kept] == [torch.uint8]
    weight = dense_weight(parameter, torch.float32)
    assert torch.equal(y, x @ weight.t())
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x @ weight.t()).detach() @ weight)


@torch.no_grad()
def test_a_flux_in_q8_0_computes_with_what_is_stored(tmp_path):
    base = tiny.tiny_flux(tmp_path / "base")
    weights = load_file(base["base_model"])
    tensors, dense = {}, {}
    for name, tensor in weights.items():
        if tensor.dim() == 2 and "blocks" in name:
            stored = quantized(tensor)
            tensors[name] = (Q8_0, tuple(tensor.shape), stored)
            raw = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
            dense[name] = dense_weight(pack(raw, GgufPacking("Q8_0", tuple(tensor.shape))), torch.float32)
        else:
            tensors[name] = (F32, tuple(tensor.shape), tensor.numpy().tobytes())
            dense[name] = tensor
    path = write(tmp_path / "flux.gguf", tensors)
    options = {"vae": base["vae"], "text_encoders": base["text_encoders"]}
    latents, sigmas = torch.randn(1, 16, 4, 4), torch.tensor([0.4])
    predictions = []
    save_file(dense, str(tmp_path / "dense.safetensors"))
    for file in (path, tmp_path / "dense.safetensors", base["base_model"]):
        with FileLender(file, **options).borrow() as model:
            predictions.append(model.predict(latents, sigmas, model.encode_prompts(["a red circle"]), None))
    assert torch.equal(predictions[0], predictions[1])
    assert 0 < (predictions[0] - predictions[2]).norm() < 0.05 * predictions[2].norm()

    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(UserError, match="cannot be read as"):
        source = GgufSource(cut)
        for name in source.shapes:
            source.read(name, torch.device("cpu"), None)


@torch.no_grad()
def test_a_t5_in_gguf_reads_as_the_weights_that_are_meant(tmp_path):
    base = tiny.tiny_flux(tmp_path / "base")
    clip, t5 = base["text_encoders"]
    gguf_file, dense_file = tmp_path / "base" / "t5.gguf", tmp_path / "base" / "dense.safetensors"
    save_file(write_t5(gguf_file, load_file(t5)), str(dense_file))
    encoded = []
    for file in (gguf_file, dense_file, t5):
        lender = FileLender(base["base_model"], vae=base["vae"], text_encoders=[clip, file])
        with lender.borrow() as model:
            encoded.append(model.encode_prompts(["a red circle"]).context)
    assert torch.equal(encoded[0], encoded[1]) and not torch.equal(encoded[0], encoded[2])


def test_a_t5_in_a_format_that_is_not_read_is_refused(tmp_path):
    base, file = tiny.tiny_flux(tmp_path / "base"), tmp_path / "t5-Q3_K_S.gguf"
    q3_k = 11
    write(file, {"enc.blk.0.attn_q.weight": (q3_k, (1, 256), bytes(110))}, architecture="t5encoder")
    lender = FileLender(base["base_model"], vae=base["vae"], text_encoders=[base["text_encoders"][0], file])
    with pytest.raises(UserError, match="weights in GGUF Q3_K") as refused:
        lender.describe()
    assert refused.value.field == "text_encoders" and "Q4_" in refused.value.remedy
    with pytest.raises(UserError, match="is a text encoder alone"):
        FileLender(file).describe()


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_words_in_blocks_are_looked_up_in_the_dense_table(kind):
    shape = (5, 256)
    blocks = random_blocks(kind, 5 * 256 // FORMATS[kind].numbers)
    layer = torch.nn.Embedding(*shape)
    layer._parameters["weight"] = pack(
        torch.nn.Parameter(blocks.flatten(), requires_grad=False), GgufPacking(kind, shape)
    )
    cast_layers(layer, torch.float32)
    ids = torch.tensor([[3, 0, 3]])
    assert torch.equal(layer(ids), dense_weight(layer.weight, torch.float32)[ids])
