"""What cannot be trained: each kind of file is refused with a message that says what it is."""

from __future__ import annotations

import struct
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora_trainer.errors import UserError
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.detect import detect
from tests.tiny import (
    SD1,
    open_clip_shapes,
    sd1_shapes,
    unet_shapes,
    vae_shapes,
)

UNET = "model.diffusion_model."


def without(prefix):
    return {name: shape for name, shape in sd1_shapes(**SD1).items() if not name.startswith(prefix)}


def in_channels(number):
    return {**sd1_shapes(**SD1), f"{UNET}input_blocks.0.0.weight": (32, number, 3, 3)}


@cache
def refiner():
    shapes = unet_shapes(32, (1, 2, 4), (0, 2, 2), 2, 64, linear=True, added=2560)
    return {**shapes, **vae_shapes(32), **open_clip_shapes("conditioner.embedders.0.model.", 64, 2)}


OTHERS = {
    "inpainting": in_channels(9),
    "InstructPix2Pix": in_channels(8),
    "upscaling": in_channels(7),
    "depth": in_channels(5),
    "refiner": refiner(),
    "Stable Diffusion 3, but lacks layers": {"joint_blocks.0.x_block.attn.qkv.weight": (64, 64)},
    "FLUX.1, but lacks layers": {"double_blocks.0.img_attn.qkv.weight": (64, 64)},
    "bitsandbytes": {**sd1_shapes(**SD1), f"{UNET}middle_block.1.proj_in.weight.quant_state.bitsandbytes__nf4": (8,)},
    "is a LoRA": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 64)},
    "is a LoRA,": {"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 64)},
    "a VAE alone": vae_shapes(32, prefix=""),
    "VAE alone": vae_shapes(32),
    "textual inversion": {"emb_params": (4, 768)},
    "inversion": {"clip_l": (4, 768), "clip_g": (4, 1280)},
    "ControlNet": {"control_model.input_blocks.0.0.weight": (32, 4, 3, 3)},
    "UNet alone": {"down_blocks.0.resnets.0.conv1.weight": (32, 32, 3, 3)},
    "text encoder alone": {"text_model.encoder.layers.0.mlp.fc1.weight": (4, 4)},
    "not the text encoders": without("cond_stage_model."),
    "Cascade": {"clip_txt_pooled_mapper.weight": (4, 4)},
    "transformer": {"model.diffusion_model.x_embedder.proj.weight": (4, 4)},
    "not a Stable Diffusion": {"fc.weight": (10, 10)},
    "order": without(f"{UNET}middle_block.1."),
    "lacks the tensor": without(f"{UNET}out.2.bias"),
    "no VAE": without("first_stage_model."),
    "latent channels": {**sd1_shapes(**SD1), "first_stage_model.decoder.conv_in.weight": (64, 16, 3, 3)},
    "belong together": {**sd1_shapes(**SD1), **sd1_shapes(**{**SD1, "text": ((64, 2),)}),
                        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 99)},
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(OTHERS))
def test_a_refusal_says_what_the_file_is(what, tmp_path):
    path = tmp_path / "file.safetensors"
    shapes = OTHERS[what]
    if f"{UNET}input_blocks.0.0.weight" not in shapes or what in ("lacks the tensor", "no VAE"):
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, str(path))
        with pytest.raises(UserError, match=what) as caught, FileLender(path).borrow():
            pass
    else:
        with pytest.raises(UserError, match=what) as caught:
            detect(shapes, source=path)
    assert caught.value.remedy or what in ("belong together", "latent channels")


def test_fp8_is_refused(tmp_path):
    path = tmp_path / "fp8.safetensors"
    tensors = {name: torch.zeros(shape).to(torch.float8_e4m3fn) for name, shape in sd1_shapes(**SD1).items()}
    save_file(tensors, str(path))
    with pytest.raises(UserError, match=r"Stable Diffusion 1\.x, quantized \(fp8") as caught:
        FileLender(path).describe()
    assert "fp16" in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04" + bytes(100), "ckpt"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "picture"),
        (b"abc", "not a sound"),
        (struct.pack("<Q", 1 << 60) + b"{}", "not a sound"),
        (struct.pack("<Q", 500) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"[]", "not a table"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not JSON"),
        (struct.pack("<Q", 60_000) + b"[" * 60_000, "not JSON"),
    ],
)
def test_other_bytes_are_named(tmp_path, content, what):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=what) as caught:
        FileLender(path).describe()
    assert caught.value.message.startswith("file.safetensors ")


CHROMA = {"double_blocks.0.img_attn.qkv.weight": (64, 64), "distilled_guidance_layer.in_proj.weight": (4, 4)}
BLOCK = {"double_blocks.0.img_attn.qkv.weight": (64, 64)}
# Names by which Forge and ComfyUI tell them.
FAMILIES = {
    "FLUX.2": {**BLOCK, "double_stream_modulation_img.lin.weight": (4, 4)},
    "a Hunyuan model": {**BLOCK, "txt_in.individual_token_refiner.blocks.0.norm1.weight": (4,)},
    "Qwen-Image": {"transformer_blocks.0.img_mod.1.weight": (4, 4), "txt_norm.weight": (4,)},
    "AuraFlow": {"double_layers.0.attn.w1q.weight": (4, 4)},
    "Wan": {"head.modulation": (1, 2, 4), "patch_embedding.weight": (4, 4)},
    "PixArt": {"t_block.1.weight": (4, 4), "x_embedder.proj.weight": (4, 4)},
    "Lumina or Z-Image": {"noise_refiner.0.attention.qkv.weight": (4, 4), "x_embedder.weight": (4, 4)},
}
FORMS = {
    "fp16": (torch.float16, "", ""),
    "fp8": (torch.float8_e4m3fn, "", ", quantized (fp8 weights)"),
    "nf4": (torch.uint8, ".quant_state.bitsandbytes__nf4", ", quantized (bitsandbytes nf4)"),
    "scaled fp8": (torch.float8_e4m3fn, ".scale_weight", ", quantized (scaled fp8)"),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_of_another_family_is_named_before_its_number_format(tmp_path, family, form, prefix):
    """nf4 FLUX was to come as fp16, which is 24 GB, and was then refused."""
    path, (dtype, mark, words) = tmp_path / "base.safetensors", FORMS[form]
    shapes = {prefix + name: shape for name, shape in FAMILIES[family].items()}
    shapes |= {name + mark: (2,) for name in shapes if mark}
    save_file({name: torch.zeros(shape).to(dtype) for name, shape in shapes.items()}, str(path))
    with pytest.raises(UserError) as caught:
        FileLender(path).describe()
    assert caught.value.message == f"base.safetensors is {family}{words}, which cannot be trained here."
    assert "fp16" not in caught.value.remedy and "SDXL" in caught.value.remedy


def gguf(path, shapes, kind, **metadata):
    """A GGUF file's table of contents, of tensors of one number format."""

    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    content = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata) + 1)
    content += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    for name, value in metadata.items():
        content += text(name.replace("_", ".", 1)) + struct.pack("<I", 8) + text(value)
    for name, shape in shapes.items():
        content += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        content += struct.pack("<IQ", kind, 0)
    path.write_bytes(content)
    return path


Q2_K, Q4_K, F16 = 10, 12, 1


@pytest.mark.parametrize(("shapes", "kind", "architecture", "message", "remedy"), [
    (BLOCK, Q2_K, "flux", "is FLUX.1, in a GGUF file (Q2_K weights)", "Q8_0"),
    (CHROMA, Q2_K, "flux", "is Chroma, in a GGUF file (Q2_K weights)", "Q8_0"),
    (FAMILIES["FLUX.2"], Q4_K, "flux", "is FLUX.2, in a GGUF file (Q4_K weights)", "SDXL"),
    ({"blk.0.attn_q.weight": (4, 4)}, Q4_K, "llama",
     "is a language model. It is in a GGUF file (Q4_K weights)", "SDXL"),
    ({"transformer.a.weight": (4, 4)}, Q4_K, "sd3", "is Stable Diffusion 3, in a GGUF file (Q4_K weights)", "fp16"),
    ({"input_blocks.0.0.weight": (4, 4)}, Q4_K, "sdxl", "is SDXL, in a GGUF file (Q4_K weights)", "fp16"),
    (sd1_shapes(**SD1), Q4_K, "", "is Stable Diffusion 1.x, in a GGUF file (Q4_K weights)", "fp16"),
    (sd1_shapes(**SD1), F16, "", "is Stable Diffusion 1.x, in a GGUF file (F16 weights)", "fp16"),
])  # fmt: skip
def test_a_gguf_file_is_called_what_is_in_it(tmp_path, shapes, kind, architecture, message, remedy):
    """It was told about --unet-in-fp8."""
    named = {"general_architecture": architecture} if architecture else {}
    path = gguf(tmp_path / "base.gguf", shapes, kind, **named)
    with pytest.raises(UserError) as caught:
        FileLender(path).describe()
    assert caught.value.message.startswith(f"base.gguf {message}") and remedy in caught.value.remedy


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_gguf_file_leads_to_a_message(scratch, data):
    gguf(scratch, {**BLOCK, "another.weight": (3, 4, 5)}, Q4_K, general_architecture="flux")
    damaged = bytearray(scratch.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    scratch.write_bytes(bytes(damaged[: data.draw(st.integers(4, len(damaged)))]))
    with pytest.raises(UserError) as caught:
        FileLender(scratch).describe()
    assert scratch.name in str(caught.value)
