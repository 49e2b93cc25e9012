"""Tiny Stable Diffusion checkpoints with random weights, in the layouts that real single files have.

The tensor names and shapes are generated from the structure of the original implementations (CompVis ldm,
Stability sgm, open_clip), independently of the package's own tables, so that tests can compare the two. With the
default sizes the number of attention layers is that of the real UNets; ``sizes`` scales everything down or up to
the real widths.

    path = tiny_sd1(tmp_path / "base.safetensors")
    path = tiny_sdxl(tmp_path / "xl.safetensors", dtype=torch.float16)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]
VOCABULARY = 49408

SD1 = {
    "channels": 32,
    "mult": (1, 1, 2, 2),
    "depths": (1, 1, 1, 0),  # transformer blocks per attention, 0: a level without attention
    "layers": 2,  # resnets per level
    "text": ((32, 2),),  # (width, layers) of each text encoder
    "vae_channels": 32,
}
SD2 = dict(SD1)
SDXL = {**SD1, "mult": (1, 2, 2), "depths": (0, 2, 10), "text": ((32, 2), (32, 3))}
SD1_FULL = {**SD1, "channels": 320, "mult": (1, 2, 4, 4), "text": ((768, 12),), "vae_channels": 128}
SD2_FULL = {**SD1_FULL, "text": ((1024, 24),)}
SDXL_FULL = {
    **SD1_FULL,
    "mult": (1, 2, 4),
    "depths": (0, 2, 10),
    "text": ((768, 12), (1280, 32)),
}


def tiny_sd1(
    path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, metadata=None, device="cpu", **sizes
) -> Path:
    """Write an SD 1.x checkpoint (20 MB in fp32, 0.2 s) and return its path.

    device: where the weights are drawn; a GPU draws those of a full-size model in seconds, and draws others.
    sizes: any of the keys of ``SD1``: channels, mult, depths, layers, text ((width, layers),), vae_channels.
    """
    return _write(path, sd1_shapes(**{**SD1, **sizes}), seed, dtype, metadata, device)


def tiny_sd2(
    path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, metadata=None, device="cpu", **sizes
) -> Path:
    """The same for SD 2.x: an open_clip text encoder, linear projections in the UNet's transformers."""
    return _write(path, sd2_shapes(**{**SD2, **sizes}), seed, dtype, metadata, device)


def tiny_sdxl(
    path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, metadata=None, device="cpu", **sizes
) -> Path:
    """The same for SDXL (48 MB in fp32; 722 UNet layers as the real one)."""
    return _write(path, sdxl_shapes(**{**SDXL, **sizes}), seed, dtype, metadata, device)


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Weights that keep activations of order one; each tensor depends on (seed, its name) only."""
    tensors = {}
    for name, shape in shapes.items():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
        value = torch.randn(shape, generator=generator, device=device)
        if "embedding" in name:
            value *= 0.5
        elif len(shape) > 1:
            value *= (shape[0] if name.endswith("text_projection") else value[0].numel()) ** -0.5
        elif name.endswith("weight"):
            value = 1 + 0.1 * value
        elif name.endswith(("final_layer_norm.bias", "ln_final.bias")):
            value = 0.3 + 0.1 * value  # Forge's emphasis divides by the mean of a prompt's encoding
        else:
            value *= 0.05
        tensors[name] = value.to(dtype).contiguous()
    return tensors


def sd1_shapes(*, channels, mult, depths, layers, text, vae_channels, in_channels: int = 4) -> Shapes:
    ((width, text_layers),) = text
    return {
        **unet_shapes(channels, mult, depths, layers, width, linear=False, in_channels=in_channels),
        **vae_shapes(vae_channels),
        **clip_shapes("cond_stage_model.transformer.", width, text_layers),
    }


def sd2_shapes(*, channels, mult, depths, layers, text, vae_channels, in_channels: int = 4) -> Shapes:
    ((width, text_layers),) = text
    return {
        **unet_shapes(channels, mult, depths, layers, width, linear=True, in_channels=in_channels),
        **vae_shapes(vae_channels),
        **open_clip_shapes("cond_stage_model.model.", width, text_layers),
    }


def sdxl_shapes(*, channels, mult, depths, layers, text, vae_channels, in_channels: int = 4) -> Shapes:
    (width1, layers1), (width2, layers2) = text
    context, added = width1 + width2, width2 + 6 * 256
    return {
        **unet_shapes(channels, mult, depths, layers, context, linear=True, added=added, in_channels=in_channels),
        **vae_shapes(vae_channels),
        **clip_shapes("conditioner.embedders.0.transformer.", width1, layers1),
        **open_clip_shapes("conditioner.embedders.1.model.", width2, layers2),
    }


def unet_shapes(channels, mult, depths, layers, context, *, linear, added=None, in_channels=4) -> Shapes:
    """ldm.modules.diffusionmodules.openaimodel.UNetModel, walked as its constructor does."""
    shapes: Shapes = {}
    time = 4 * channels

    def layer(name: str, *shape: int) -> None:
        shapes[f"model.diffusion_model.{name}.weight"] = shape
        shapes[f"model.diffusion_model.{name}.bias"] = (shape[0],)

    def resnet(name: str, n_in: int, n_out: int) -> None:
        layer(f"{name}.in_layers.0", n_in)
        layer(f"{name}.in_layers.2", n_out, n_in, 3, 3)
        layer(f"{name}.emb_layers.1", n_out, time)
        layer(f"{name}.out_layers.0", n_out)
        layer(f"{name}.out_layers.3", n_out, n_out, 3, 3)
        if n_in != n_out:
            layer(f"{name}.skip_connection", n_out, n_in, 1, 1)

    def transformer(name: str, n: int, depth: int) -> None:
        one = (n, n) if linear else (n, n, 1, 1)
        layer(f"{name}.norm", n)
        layer(f"{name}.proj_in", *one)
        for d in range(depth):
            block = f"{name}.transformer_blocks.{d}"
            for attention, source in (("attn1", n), ("attn2", context)):
                for projection, size in (("to_q", n), ("to_k", source), ("to_v", source)):
                    shapes[f"model.diffusion_model.{block}.{attention}.{projection}.weight"] = (n, size)
                layer(f"{block}.{attention}.to_out.0", n, n)
            layer(f"{block}.ff.net.0.proj", 8 * n, n)
            layer(f"{block}.ff.net.2", n, 4 * n)
            for norm in ("norm1", "norm2", "norm3"):
                layer(f"{block}.{norm}", n)
        layer(f"{name}.proj_out", *one)

    layer("time_embed.0", time, channels)
    layer("time_embed.2", time, time)
    if added is not None:
        layer("label_emb.0.0", time, added)
        layer("label_emb.0.2", time, time)
    layer("input_blocks.0.0", channels, in_channels, 3, 3)
    skips, current, index = [channels], channels, 1
    for level, factor in enumerate(mult):
        for _ in range(layers):
            resnet(f"input_blocks.{index}.0", current, factor * channels)
            current = factor * channels
            if depths[level]:
                transformer(f"input_blocks.{index}.1", current, depths[level])
            skips.append(current)
            index += 1
        if level < len(mult) - 1:
            layer(f"input_blocks.{index}.0.op", current, current, 3, 3)
            skips.append(current)
            index += 1
    resnet("middle_block.0", current, current)
    transformer("middle_block.1", current, depths[-1] or 1)
    resnet("middle_block.2", current, current)
    index = 0
    for level, factor in reversed(list(enumerate(mult))):
        for i in range(layers + 1):
            resnet(f"output_blocks.{index}.0", current + skips.pop(), factor * channels)
            current, place = factor * channels, 1
            if depths[level]:
                transformer(f"output_blocks.{index}.1", current, depths[level])
                place = 2
            if level and i == layers:
                layer(f"output_blocks.{index}.{place}.conv", current, current, 3, 3)
            index += 1
    layer("out.0", channels)
    layer("out.2", 4, channels, 3, 3)
    return shapes


def vae_shapes(channels: int, mult=(1, 1, 2, 2), layers: int = 1, prefix: str = "first_stage_model.") -> Shapes:
    """ldm.models.autoencoder.AutoencoderKL (the real one: channels 128, mult (1, 2, 4, 4), layers 2)."""
    if channels >= 128:
        mult, layers = (1, 2, 4, 4), 2
    shapes: Shapes = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{prefix}{name}.weight"] = shape
        shapes[f"{prefix}{name}.bias"] = (shape[0],)

    def resnet(name: str, n_in: int, n_out: int) -> None:
        layer(f"{name}.norm1", n_in)
        layer(f"{name}.conv1", n_out, n_in, 3, 3)
        layer(f"{name}.norm2", n_out)
        layer(f"{name}.conv2", n_out, n_out, 3, 3)
        if n_in != n_out:
            layer(f"{name}.nin_shortcut", n_out, n_in, 1, 1)

    def middle(name: str, n: int) -> None:
        resnet(f"{name}.mid.block_1", n, n)
        layer(f"{name}.mid.attn_1.norm", n)
        for projection in ("q", "k", "v", "proj_out"):
            layer(f"{name}.mid.attn_1.{projection}", n, n, 1, 1)
        resnet(f"{name}.mid.block_2", n, n)

    layer("encoder.conv_in", channels, 3, 3, 3)
    current = channels
    for level, factor in enumerate(mult):
        for i in range(layers):
            resnet(f"encoder.down.{level}.block.{i}", current, factor * channels)
            current = factor * channels
        if level < len(mult) - 1:
            layer(f"encoder.down.{level}.downsample.conv", current, current, 3, 3)
    middle("encoder", current)
    layer("encoder.norm_out", current)
    layer("encoder.conv_out", 8, current, 3, 3)
    layer("decoder.conv_in", current, 4, 3, 3)
    middle("decoder", current)
    for level, factor in reversed(list(enumerate(mult))):
        for i in range(layers + 1):
            resnet(f"decoder.up.{level}.block.{i}", current, factor * channels)
            current = factor * channels
        if level:
            layer(f"decoder.up.{level}.upsample.conv", current, current, 3, 3)
    layer("decoder.norm_out", current)
    layer("decoder.conv_out", 3, current, 3, 3)
    layer("quant_conv", 8, 8, 1, 1)
    layer("post_quant_conv", 4, 4, 1, 1)
    return shapes


def clip_shapes(prefix: str, width: int, layers: int) -> Shapes:
    """transformers' CLIPTextModel as checkpoints name it."""
    shapes: Shapes = {
        f"{prefix}text_model.embeddings.token_embedding.weight": (VOCABULARY, width),
        f"{prefix}text_model.embeddings.position_embedding.weight": (77, width),
    }

    def layer(name: str, *shape: int) -> None:
        shapes[f"{prefix}text_model.{name}.weight"] = shape
        shapes[f"{prefix}text_model.{name}.bias"] = (shape[0],)

    for i in range(layers):
        block = f"encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer(f"{block}.self_attn.{projection}", width, width)
        layer(f"{block}.mlp.fc1", 4 * width, width)
        layer(f"{block}.mlp.fc2", width, 4 * width)
        layer(f"{block}.layer_norm1", width)
        layer(f"{block}.layer_norm2", width)
    layer("final_layer_norm", width)
    return shapes


def open_clip_shapes(prefix: str, width: int, layers: int) -> Shapes:
    """The text half of open_clip's CLIP."""
    shapes: Shapes = {
        f"{prefix}token_embedding.weight": (VOCABULARY, width),
        f"{prefix}positional_embedding": (77, width),
        f"{prefix}text_projection": (width, width),
        f"{prefix}logit_scale": (),
    }

    def layer(name: str, *shape: int) -> None:
        shapes[f"{prefix}{name}.weight"] = shape
        shapes[f"{prefix}{name}.bias"] = (shape[0],)

    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        shapes[f"{prefix}{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{prefix}{block}.attn.in_proj_bias"] = (3 * width,)
        layer(f"{block}.attn.out_proj", width, width)
        layer(f"{block}.mlp.c_fc", 4 * width, width)
        layer(f"{block}.mlp.c_proj", width, 4 * width)
        layer(f"{block}.ln_1", width)
        layer(f"{block}.ln_2", width)
    layer("ln_final", width)
    return shapes


def _write(path: Path, shapes: Shapes, seed: int, dtype: torch.dtype, metadata, device: torch.device | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(random_tensors(shapes, seed, dtype, device), str(path), metadata=metadata)
    return path
