"""Tiny FLUX.1 models with random weights, in the layouts that real files have; names as in the original's modules."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny import Shapes, clip_shapes, random_tensors, vae_shapes

WIDTH, HEADS, HIDDEN, TEXT, POOLED = 64, 4, 256, 48, 32
WORDS = ("a", "red", "blue", "circle", "square", "picture", "of", "the", "photo")


def transformer_shapes(double: int = 2, single: int = 2, guidance: bool = True) -> Shapes:
    """flux.model.Flux, walked as its constructor does; heads of 16 channels."""
    shapes: Shapes = {}

    def linear(name: str, inside: int, outside: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outside, inside), (outside,)

    def norms(prefix: str) -> None:
        for name in ("query_norm", "key_norm"):
            shapes[f"{prefix}.{name}.scale"] = (WIDTH // HEADS,)

    linear("img_in", 64, WIDTH)
    linear("txt_in", TEXT, WIDTH)
    for name, inside in {"time_in": 256, "vector_in": POOLED, **({"guidance_in": 256} if guidance else {})}.items():
        linear(f"{name}.in_layer", inside, WIDTH)
        linear(f"{name}.out_layer", WIDTH, WIDTH)
    for i in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            linear(f"{block}_mod.lin", WIDTH, 6 * WIDTH)
            linear(f"{block}_attn.qkv", WIDTH, 3 * WIDTH)
            norms(f"{block}_attn.norm")
            linear(f"{block}_attn.proj", WIDTH, WIDTH)
            linear(f"{block}_mlp.0", WIDTH, HIDDEN)
            linear(f"{block}_mlp.2", HIDDEN, WIDTH)
    for i in range(single):
        block = f"single_blocks.{i}"
        linear(f"{block}.linear1", WIDTH, 3 * WIDTH + HIDDEN)
        linear(f"{block}.linear2", WIDTH + HIDDEN, WIDTH)
        norms(f"{block}.norm")
        linear(f"{block}.modulation.lin", WIDTH, 3 * WIDTH)
    linear("final_layer.linear", WIDTH, 64)
    linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    return shapes


def t5_shapes(layers: int = 2, inner: int = 32, heads: int = 4, hidden: int = 64) -> Shapes:
    """transformers' T5EncoderModel of a T5 v1.1."""
    shapes: Shapes = {"shared.weight": (32, TEXT), "encoder.final_layer_norm.weight": (TEXT,)}
    for i in range(layers):
        layer = f"encoder.block.{i}.layer"
        for name in "qkv":
            shapes[f"{layer}.0.SelfAttention.{name}.weight"] = (inner, TEXT)
        shapes[f"{layer}.0.SelfAttention.o.weight"] = (TEXT, inner)
        if i == 0:
            shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"] = (32, heads)
        shapes[f"{layer}.0.layer_norm.weight"] = shapes[f"{layer}.1.layer_norm.weight"] = (TEXT,)
        for name in ("wi_0", "wi_1"):
            shapes[f"{layer}.1.DenseReluDense.{name}.weight"] = (hidden, TEXT)
        shapes[f"{layer}.1.DenseReluDense.wo.weight"] = (TEXT, hidden)
    return shapes


def flux_vae_shapes(channels: int = 32) -> Shapes:
    """A VAE with 16 latent channels and no convolutions around them. channels: 128 in real ones."""
    shapes = {name: shape for name, shape in vae_shapes(channels, prefix="").items() if "quant_conv" not in name}
    wide = shapes["encoder.conv_out.weight"][1]
    shapes |= {"encoder.conv_out.weight": (32, wide, 3, 3), "encoder.conv_out.bias": (32,)}
    shapes["decoder.conv_in.weight"] = (shapes["decoder.conv_in.weight"][0], 16, 3, 3)
    return shapes


def transformer(seed: int = 0, **sizes) -> dict[str, torch.Tensor]:
    return random_tensors(transformer_shapes(**sizes), seed, torch.float32)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json of T5's kind that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((f"▁{word}", -2.0) for word in WORDS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def tiny_flux(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes) -> dict[str, object]:
    """Write flux.safetensors, ae, clip_l, t5xxl and T5's tokenizer.json; returns the settings that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "flux": {name: tensor.to(dtype) for name, tensor in transformer(seed, **sizes).items()},
        "ae": random_tensors(flux_vae_shapes(), seed, torch.float32),
        "clip_l": random_tensors(clip_shapes("", POOLED, 2), seed, torch.float32),
        "t5xxl": random_tensors(t5_shapes(), seed, torch.float32),
    }
    for name, tensors in files.items():
        save_file(tensors, str(folder / f"{name}.safetensors"))
    write_tokenizer(folder)
    paths = {name: str(folder / f"{name}.safetensors") for name in files}
    return {"base_model": paths["flux"], "vae": paths["ae"], "text_encoders": [paths["clip_l"], paths["t5xxl"]]}


def write_folder(folder: Path, their_transformer, seed: int = 0) -> Path:
    """The same model as ``tiny_flux`` of this seed as a diffusers folder, with diffusers' own transformer."""
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    weights = {name: tensor.contiguous() for name, tensor in their_transformer.state_dict().items()}
    names = sorted(weights)
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for index, shard in enumerate(shards):
        save_file({name: weights[name] for name in names[index::2]}, str(folder / "transformer" / shard))
    table = {name: shards[at % 2] for at, name in enumerate(names)}
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    vae = random_tensors(flux_vae_shapes(), seed, torch.float32)
    save_file(vae, str(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    clip = random_tensors(clip_shapes("", POOLED, 2), seed, torch.float32)
    save_file(clip, str(folder / "text_encoder" / "model.safetensors"))
    save_file(random_tensors(t5_shapes(), seed, torch.float32), str(folder / "text_encoder_2" / "model.safetensors"))
    write_tokenizer(folder / "tokenizer_2")
    return folder
