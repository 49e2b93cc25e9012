"""Tiny Chroma models with random weights; names as in the original's modules."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests import flux
from tests.tiny import Shapes, random_tensors

MAKER, MAKER_LAYERS = 32, 2
_NOT_THERE = ("_mod.", ".modulation.", "time_in", "vector_in", "guidance_in", "adaLN")


def transformer_shapes() -> Shapes:
    """FLUX.1's blocks without their modulations, and the network that makes these."""
    shapes = {
        name: shape for name, shape in flux.transformer_shapes().items() if not any(part in name for part in _NOT_THERE)
    }

    def linear(name: str, inside: int, outside: int) -> None:
        name = f"distilled_guidance_layer.{name}"
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outside, inside), (outside,)

    linear("in_proj", 64, MAKER)
    linear("out_proj", MAKER, flux.WIDTH)
    for i in range(MAKER_LAYERS):
        linear(f"layers.{i}.in_layer", MAKER, MAKER)
        linear(f"layers.{i}.out_layer", MAKER, MAKER)
        shapes[f"distilled_guidance_layer.norms.{i}.scale"] = (MAKER,)
    return shapes


def parts(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    shapes = {"chroma": transformer_shapes(), "ae": flux.flux_vae_shapes(), "t5xxl": flux.t5_shapes()}
    return {name: random_tensors(one, seed, torch.float32) for name, one in shapes.items()}


def tiny_chroma(folder: Path, seed: int = 0) -> dict[str, object]:
    """Write chroma.safetensors, ae, t5xxl and T5's tokenizer.json; returns the settings that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in parts(seed).items():
        save_file(tensors, str(folder / f"{name}.safetensors"))
    flux.write_tokenizer(folder)
    paths = {name: str(folder / f"{name}.safetensors") for name in ("chroma", "ae", "t5xxl")}
    return {"base_model": paths["chroma"], "vae": paths["ae"], "text_encoders": [paths["t5xxl"]]}


def write_folder(folder: Path, their_transformer, seed: int = 0) -> Path:
    """The same model as ``tiny_chroma`` of this seed as a diffusers folder, with diffusers' own transformer."""
    files = parts(seed)
    stored = {"transformer/diffusion_pytorch_model": their_transformer.state_dict(),
              "vae/diffusion_pytorch_model": files["ae"], "text_encoder/model": files["t5xxl"]}  # fmt: skip
    for name, tensors in stored.items():
        (folder / name).parent.mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(folder / f"{name}.safetensors"))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ChromaPipeline"}))
    flux.write_tokenizer(folder / "tokenizer")
    return folder
