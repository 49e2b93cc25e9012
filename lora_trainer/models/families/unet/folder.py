"""Diffusers folders and VAE files, under the names of single files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError
from lora_trainer.models.families.unet.names import UNET, VAE, Table, rename, unet_table, vae_table
from lora_trainer.models.hints import Hints, folder_hints, read_json
from lora_trainer.models.tensors import Source, Tensors, open_source

_SD1_TEXT = "cond_stage_model.transformer."
_TURBO_TEXT = "conditioner.embedders.0.model."
_CLIP_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
_SUPPORTED = re.compile(r"^(Stable|Latent).*Diffusion(XL)?(Img2Img|Inpaint|InstructPix2Pix)?Pipeline$")
# The VAE's attention in folders that diffusers before 0.15 wrote.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_folder(folder: Path) -> tuple[Tensors, Hints] | None:
    """The tensors of a diffusers folder under single-file names, and what its configuration says; None when it is not
    one of Stable Diffusion 1, 2 or XL.

    Raises:
        UserError: a part is missing.
    """
    kind = read_json(folder / "model_index.json").get("_class_name")
    if isinstance(kind, str) and not _SUPPORTED.match(kind):
        return None
    if not (folder / "unet").is_dir():
        if kind is None:
            return None
        raise UserError(
            f"{folder.name} is a {kind} folder without a UNet.",
            field="base_model",
            remedy="The folder is incomplete; download the model again.",
        )
    tensors = Tensors()
    for source in component(folder / "unet"):
        _add(tensors, source, _unet_table(source.shapes), UNET)
    for source in component(folder / "vae"):
        add_vae(tensors, source)
    second = folder / "text_encoder_2"
    if second.is_dir():
        encoders = {"conditioner.embedders.0.": folder / "text_encoder", "conditioner.embedders.1.": second}
    else:
        encoders = {"cond_stage_model.": folder / "text_encoder"}
    for stage, part in encoders.items():
        for source in component(part):
            for name in source.shapes:
                # transformers 5.6 and later may leave the first level out.
                bare = name.startswith(_CLIP_PARTS)
                tensors.add(f"{stage}transformer.{'text_model.' if bare else ''}{name}", source, name)
    return tensors, folder_hints(folder)


def usual_name(name: str, names: Mapping[str, Any]) -> str:
    """The usual name of a tensor in a single file; some files deviate from these. names: all of the file's."""
    if name.startswith(_SD1_TEXT) and name[len(_SD1_TEXT) :].startswith(_CLIP_PARTS):
        return f"{_SD1_TEXT}text_model.{name[len(_SD1_TEXT) :]}"  # saved by transformers before 4.0
    if name.startswith(_TURBO_TEXT) and f"{UNET}label_emb.0.0.weight" not in names:
        return f"cond_stage_model.model.{name[len(_TURBO_TEXT) :]}"  # SD-Turbo: SD 2 in sgm's names
    return name


def add_vae_file(tensors: Tensors, path: Path) -> None:
    """Replace the VAE in ``tensors`` by the one in ``path``: a file in ldm's or diffusers' layout, or a folder.

    Raises:
        UserError: there is no VAE in it.
    """
    if path.is_dir():
        sources = component(path / "vae" if (path / "vae").is_dir() else path)
    else:
        sources = [open_source(path)]
    tensors.discard(VAE)
    for source in sources:
        add_vae(tensors, source)
    if f"{VAE}decoder.conv_in.weight" not in tensors or f"{VAE}encoder.conv_in.weight" not in tensors:
        raise UserError(f"{path.name} is not a VAE.", field="vae", remedy="Choose a VAE file for Stable Diffusion.")


def component(folder: Path) -> list[Source]:
    """The weight file of one part of the model, or all of its shards."""
    for stem in _STEMS:
        for ending in _ENDINGS:
            if (path := folder / f"{stem}{ending}").is_file():
                return [open_source(path)]
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict):
                raise UserError(f"{index.name} has no weight_map.")
            # Names only: an index must not lead out of its folder.
            return [open_source(folder / Path(str(name)).name) for name in sorted(set(files.values()))]
    raise UserError(
        f"{folder.name} holds no weights.",
        field="base_model",
        remedy="The folder is incomplete; download the model again.",
    )


def _unet_table(names: Iterable[str]) -> Table:
    names = set(names)
    layers: list[int] = []
    while f"down_blocks.{len(layers)}.resnets.0.norm1.weight" in names:
        count = 1
        while f"down_blocks.{len(layers)}.resnets.{count}.norm1.weight" in names:
            count += 1
        layers.append(count)
    attention = [f"down_blocks.{level}.attentions.0.norm.weight" in names for level in range(len(layers))]
    return unet_table(layers, attention)


def _add(tensors: Tensors, source: Source, table: Table, prefix: str) -> None:
    for name in source.shapes:
        tensors.add(prefix + (rename(name, table) or name), source, name)


def add_vae(tensors: Tensors, source: Source) -> None:
    names = source.shapes
    if not any(".down_blocks." in name or ".up_blocks." in name for name in names):
        whole = any(name.startswith(VAE) for name in names)
        for name in names:
            if not whole or name.startswith(VAE):
                tensors.add(VAE + name.removeprefix(VAE), source, name)
        return
    levels, layers = 0, 0
    while f"encoder.down_blocks.{levels}.resnets.0.norm1.weight" in names:
        levels += 1
    while f"encoder.down_blocks.0.resnets.{layers}.norm1.weight" in names:
        layers += 1
    table = vae_table(levels, layers)
    for name in names:
        *path, layer, leaf = name.split(".")
        current = ".".join([*path, _OLD_ATTENTION.get(layer, layer), leaf]) if "attentions" in path else name
        tensors.add(VAE + (rename(current, table) or name), source, name)
