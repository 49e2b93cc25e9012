"""The embedded base's two trained networks: their sizes, their start, and their names in an LDM checkpoint."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

VOCABULARY = 49408
BOS, EOS = 49406, 49407
CONTEXT_LENGTH = 77
WIDTH = 64
"""Width of the text encoder and so of the UNet's context."""
EMBEDDING_STD = 0.5
END_MARK = 4.0
"""Value of the first embedding channel in BOS and EOS; every word has 0 there, which tells padding from words."""
UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    # Normalization has 32 groups in every SD checkpoint. At a width of 32 each channel would be a group of its own,
    # which loses every channel's mean, and with it the colors that the text asks for.
    "block_out_channels": (64, 64, 128, 128),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,  # diffusers' historical name for the number of heads
    "norm_num_groups": 32,
}
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "hidden_act": "quick_gelu",
    "projection_dim": WIDTH,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def constructed_embeddings(seed: int = 0) -> np.ndarray:
    """Distinct token embeddings [49408, 64] as float32, the same on every platform and numpy version.

    Each value is the sum of four 16-bit integers of Philox's raw stream (close to a normal, deviation 0.5): numpy
    keeps raw streams stable, but not its distributions. The first channel only marks BOS and EOS.
    """
    raw = np.random.Philox(key=seed).random_raw(VOCABULARY * WIDTH)
    parts = np.stack([(raw >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)]).astype(np.int64)
    deviation = 65535 * np.sqrt(4 / 12)
    table = ((parts.sum(axis=0) - 2 * 65535) / deviation * EMBEDDING_STD).astype(np.float32)
    table = table.reshape(VOCABULARY, WIDTH)
    table[:, 0] = 0.0
    table[[BOS, EOS], 0] = END_MARK
    return table


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet whose residual branches and output start at zero (as LDM's do)."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**UNET_CONFIG)
    for name, parameter in unet.named_parameters():
        if re.search(r"(resnets\.\d+\.conv2|\.proj_out|^conv_out)\.", name):
            torch.nn.init.zeros_(parameter)
    return unet


def new_text_encoder() -> CLIPTextModel:
    """An untrained text encoder that starts as "every position carries the mean of the words before it".

    A caption of ten tokens is padded to 77, so that a UNet that starts with even attention would read mostly
    padding. The first layer's attention therefore starts as an average over the words alone (BOS and EOS are told by
    their first channel) which it adds to every position, the padding included; the other branches start small.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG, attn_implementation="eager"))
    text = text_core(model)
    with torch.no_grad():
        for layer in text.encoder.layers:
            layer.self_attn.out_proj.weight *= 0.2
            layer.mlp.fc2.weight *= 0.5
        first = text.encoder.layers[0].self_attn
        eye = torch.eye(WIDTH)
        first.v_proj.weight.copy_(eye)
        first.out_proj.weight.copy_(1.5 * eye)
        heads = torch.arange(0, WIDTH, WIDTH // TEXT_CONFIG["num_attention_heads"])
        first.q_proj.bias[heads] += 1.0
        first.k_proj.weight[heads, 0] -= 6.0
        text.embeddings.token_embedding.weight.copy_(torch.from_numpy(constructed_embeddings()))
    return model


def text_core(model: CLIPTextModel) -> torch.nn.Module:
    """The module that owns `embeddings` and `encoder` (transformers 5.6 flattened CLIPTextModel)."""
    return getattr(model, "text_model", model)


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_unet_key(name: str) -> str:
    """The LDM name of one parameter of this UNet (one resnet a level), without `model.diffusion_model.`."""
    for ours, theirs in _TOP.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d)|mid_block)\.(resnets|attentions|\w+samplers)\.(\d)\.(.+)", name)
    if found is None:
        raise KeyError(name)
    part, level, kind, index, rest = found.group(1), int(found.group(2) or 0), found.group(3), int(found.group(4)), ""
    rest = found.group(5)
    if kind == "resnets":
        head, _, tail = rest.partition(".")
        rest = f"{_RESNET[head]}.{tail}"
    if part is None:
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{2 * level + 2}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{2 * level + 1}.{1 if level == 0 else 2}.{rest}"
    block = f"input_blocks.{2 * level + 1}" if part == "down" else f"output_blocks.{2 * level + index}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{rest}"
