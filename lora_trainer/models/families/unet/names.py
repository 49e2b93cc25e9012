"""Names of the same layer in different worlds: single files (ldm, sgm, open_clip), diffusers, transformers, kohya.

A table maps dotted prefixes, a layer's or a whole block's; ``rename`` applies it. All names are built here from the
architecture, never taken from a library's modules, because libraries rename those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Table = dict[str, str]

UNET, VAE = "model.diffusion_model.", "first_stage_model."  # what their tensors' names start with in a single file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
CLIP_LAYERS = (
    *(f"self_attn.{projection}_proj" for projection in "qkv"),
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
TRANSFORMER_BLOCK = (
    *(f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """``name`` with its longest dotted prefix that ``table`` knows replaced; None when it knows none."""
    end = len(name)
    while end > 0:
        if (prefix := table.get(name[:end])) is not None:
            return prefix + name[end:]
        end = name.rfind(".", 0, end)
    return None


def inverted(table: Table) -> Table:
    return {value: key for key, value in table.items()}


def unet_table(layers: Sequence[int], attention: Sequence[bool]) -> Table:
    """diffusers -> ldm for the UNet's tensors.

    layers: resnets of each level on the way down; attention: whether a level has transformers.
    """
    table = dict(_UNET_ENDS)

    def resnet(diffusers: str, ldm: str) -> None:
        table.update({f"{diffusers}.{ours}": f"{ldm}.{theirs}" for ours, theirs in _RESNET.items()})

    index = 1
    for level, count in enumerate(layers):
        for i in range(count):
            resnet(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{index}.0")
            if attention[level]:
                table[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{index}.1"
            index += 1
        if level < len(layers) - 1:
            table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    resnet("mid_block.resnets.0", "middle_block.0")
    table["mid_block.attentions.0"] = "middle_block.1"
    resnet("mid_block.resnets.1", "middle_block.2")
    index = 0
    for up, level in enumerate(reversed(range(len(layers)))):
        for i in range(layers[level] + 1):
            resnet(f"up_blocks.{up}.resnets.{i}", f"output_blocks.{index}.0")
            if attention[level]:
                table[f"up_blocks.{up}.attentions.{i}"] = f"output_blocks.{index}.1"
            if level and i == layers[level]:
                place = 2 if attention[level] else 1
                table[f"up_blocks.{up}.upsamplers.0.conv"] = f"output_blocks.{index}.{place}.conv"
            index += 1
    return table


def vae_table(levels: int, layers: int) -> Table:
    """diffusers -> ldm for the VAE's tensors; ``layers`` resnets per level in the encoder."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    def resnet(diffusers: str, ldm: str) -> None:
        table[diffusers] = ldm
        table[f"{diffusers}.conv_shortcut"] = f"{ldm}.nin_shortcut"

    for half in ("encoder", "decoder"):
        table[f"{half}.conv_in"] = f"{half}.conv_in"
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        table[f"{half}.conv_out"] = f"{half}.conv_out"
        for i in (0, 1):
            resnet(f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}")
        for ours, theirs in _VAE_ATTENTION.items():
            table[f"{half}.mid_block.attentions.0.{ours}"] = f"{half}.mid.attn_1.{theirs}"
    for level in range(levels):
        up = levels - 1 - level
        for i in range(layers):
            resnet(f"encoder.down_blocks.{level}.resnets.{i}", f"encoder.down.{level}.block.{i}")
        for i in range(layers + 1):
            resnet(f"decoder.up_blocks.{up}.resnets.{i}", f"decoder.up.{level}.block.{i}")
        table[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"decoder.up_blocks.{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return table


def open_clip_table(layers: int) -> Table:
    """transformers (without ``text_model.``) -> open_clip for what the two store in the same shape.

    q, k and v are fused in open_clip (``attn.in_proj_weight``) and the projection is transposed: see ``binding``.
    """
    table = {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    }
    for i in range(layers):
        for ours, theirs in _OPEN_CLIP_LAYER.items():
            table[f"encoder.layers.{i}.{ours}"] = f"transformer.resblocks.{i}.{theirs}"
    return table


_UP_DOWN = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")


def block_of_diffusers_name(name: str) -> int | None:
    """kohya's number of a block of SD 1 and 2: 1…12 down (0 has no layer), 12 middle, 13…24 up.

    kohya's formula is used for every depth; where a model has more blocks than SD 1, the last number is shared.
    Source: ``get_block_index`` in kohya-ss sd-scripts, networks/lora.py.
    """
    if name.startswith("mid_block."):
        return 12
    if (match := _UP_DOWN.match(name)) is None:
        return None
    side, level, kind, index = match.groups()
    within = 3 * int(level) + (2 if kind.endswith("samplers") else int(index))
    return min(1 + within, 11) if side == "down" else min(13 + within, 24)


def block_of_sgm_name(name: str) -> int | None:
    """kohya's number of a block of SDXL: 1…9 input blocks, 10…12 middle, 13…21 output blocks."""
    side, number = name.split(".")[:2]
    first, last = {"input_blocks": (1, 9), "middle_block": (10, 12), "output_blocks": (13, 21)}[side]
    return min(first + int(number), last)
