"""Tiny Stable Diffusion 3 models with random weights, in the layouts that real files have; names as in Stability's
modules."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.flux import TEXT, flux_vae_shapes, t5_shapes, write_tokenizer
from tests.tiny import Shapes, clip_shapes, random_tensors

WIDTH, HIDDEN, CLIP_L, CLIP_G, SIDE = 128, 512, 16, 24, 8
CLIP_G_LAYERS = 13  # by which its file is known


def transformer_shapes(blocks: int = 2, dual: int = 0, normalized: bool = False) -> Shapes:
    """MMDiT, walked as its constructor does; heads of 64 channels, as many as blocks."""
    shapes: Shapes = {"pos_embed": (1, SIDE * SIDE, WIDTH)}

    def layer(name: str, outside: int, *inside: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outside, *inside), (outside,)

    def attention(name: str, last: bool = False) -> None:
        layer(f"{name}.qkv", 3 * WIDTH, WIDTH)
        if normalized:
            shapes[f"{name}.ln_q.weight"] = shapes[f"{name}.ln_k.weight"] = (64,)
        if not last:
            layer(f"{name}.proj", WIDTH, WIDTH)

    layer("x_embedder.proj", WIDTH, 16, 2, 2)
    for name, inside in (("t_embedder", 256), ("y_embedder", CLIP_L + CLIP_G)):
        layer(f"{name}.mlp.0", WIDTH, inside)
        layer(f"{name}.mlp.2", WIDTH, WIDTH)
    layer("context_embedder", WIDTH, TEXT)
    for i in range(blocks):
        for side in ("context_block", "x_block"):
            name, last = f"joint_blocks.{i}.{side}", side == "context_block" and i == blocks - 1
            attention(f"{name}.attn", last)
            second = side == "x_block" and i < dual
            layer(f"{name}.adaLN_modulation.1", (2 if last else 9 if second else 6) * WIDTH, WIDTH)
            if second:
                attention(f"{name}.attn2")
            if not last:
                layer(f"{name}.mlp.fc1", HIDDEN, WIDTH)
                layer(f"{name}.mlp.fc2", WIDTH, HIDDEN)
    layer("final_layer.linear", 64, WIDTH)
    layer("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    return shapes


def clip_g_shapes() -> Shapes:
    return {**clip_shapes("", CLIP_G, CLIP_G_LAYERS), "text_projection.weight": (CLIP_G, CLIP_G)}


def parts(seed: int = 0, **sizes) -> dict[str, dict[str, torch.Tensor]]:
    shapes = {
        "sd3": transformer_shapes(**sizes), "vae": flux_vae_shapes(), "clip_l": clip_shapes("", CLIP_L, 2),
        "clip_g": clip_g_shapes(), "t5xxl": t5_shapes(),
    }  # fmt: skip
    return {name: random_tensors(one, seed, torch.float32) for name, one in shapes.items()}


PREFIXES = {"sd3": "model.diffusion_model.", "vae": "first_stage_model.", "clip_l": "text_encoders.clip_l.transformer.",
            "clip_g": "text_encoders.clip_g.transformer.", "t5xxl": "text_encoders.t5xxl.transformer."}  # fmt: skip


def tiny_sd3(folder: Path, *, t5: bool = True, whole: bool = False, seed: int = 0, **sizes) -> dict[str, object]:
    """Write the parts as files of their own, or all in one; returns the settings that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: tensors for name, tensors in parts(seed, **sizes).items() if t5 or name != "t5xxl"}
    if t5:
        write_tokenizer(folder)
    if whole:
        named = ((PREFIXES[part] + name, it) for part, tensors in files.items() for name, it in tensors.items())
        everything = dict(named)
        save_file(everything, str(folder / "sd3.safetensors"))
        return {"base_model": str(folder / "sd3.safetensors")}
    paths = {name: str(folder / f"{name}.safetensors") for name in files}
    for name, tensors in files.items():
        save_file(tensors, paths[name])
    encoders = [paths[name] for name in ("clip_g", "clip_l", "t5xxl") if name in paths]
    return {"base_model": paths["sd3"], "vae": paths["vae"], "text_encoders": encoders}


def write_folder(folder: Path, their_transformer, seed: int = 0) -> Path:
    """The same model as ``tiny_sd3`` of this seed as a diffusers folder, with diffusers' own transformer."""
    files = parts(seed)
    stored = {
        "transformer/diffusion_pytorch_model": their_transformer.state_dict(), "text_encoder/model": files["clip_l"],
        "vae/diffusion_pytorch_model": files["vae"], "text_encoder_2/model": files["clip_g"],
        "text_encoder_3/model": files["t5xxl"],
    }  # fmt: skip
    for name, tensors in stored.items():
        (folder / name).parent.mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(folder / f"{name}.safetensors"))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    write_tokenizer(folder / "tokenizer_3")
    return folder
