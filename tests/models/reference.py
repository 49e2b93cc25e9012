"""What the models must compute, written down a second time without the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils

UNETS = {
    "sd1": {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (1, 1, 1),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 32 + 6 * 256,
    },
}
UNETS["sd2"] = {**UNETS["sd1"], "attention_head_dim": (1, 1, 1, 1), "use_linear_projection": True}


def unet(family: str, checkpoint: dict[str, torch.Tensor]) -> UNet2DConditionModel:
    """diffusers' UNet with weights renamed by diffusers' own conversion."""
    model = UNet2DConditionModel(**UNETS[family])
    config = {**model.config, "layers_per_block": 2}
    model.load_state_dict(single_file_utils.convert_ldm_unet_checkpoint(dict(checkpoint), config))
    return model.eval()


def vae(checkpoint: dict[str, torch.Tensor]) -> AutoencoderKL:
    model = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
    )
    model.load_state_dict(single_file_utils.convert_ldm_vae_checkpoint(dict(checkpoint), model.config))
    return model.eval()


def clip_states(tensors: dict[str, torch.Tensor], prefix: str, ids: torch.Tensor, heads: int = 1) -> list[torch.Tensor]:
    """Hidden states of CLIP's text transformer after the embeddings and each layer, then the final LayerNorm's output.

    Understands transformers' names and open_clip's. Radford et al. 2021, section 2.4.
    """
    fused = prefix + "transformer.resblocks.0.ln_1.weight" in tensors

    def get(name: str) -> torch.Tensor:
        return tensors[prefix + name].float()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], get(name + ".weight"), get(name + ".bias"))

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, get(name + ".weight"), get(name + ".bias"))

    if fused:
        x = get("token_embedding.weight")[ids] + get("positional_embedding")
        names = ("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    else:
        x = get("text_model.embeddings.token_embedding.weight")[ids]
        x = x + get("text_model.embeddings.position_embedding.weight")
        names = ("layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2")
    states, layer = [x], 0
    while True:
        block = f"transformer.resblocks.{layer}." if fused else f"text_model.encoder.layers.{layer}."
        if prefix + block + names[0] + ".weight" not in tensors:
            break
        h = norm(x, block + names[0])
        if fused:
            qkv = F.linear(h, get(block + "attn.in_proj_weight"), get(block + "attn.in_proj_bias")).chunk(3, dim=-1)
        else:
            qkv = [linear(h, f"{block}self_attn.{part}_proj") for part in "qkv"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), block + names[1])
        h = linear(norm(x, block + names[2]), block + names[3])
        h = F.gelu(h) if fused else h * torch.sigmoid(1.702 * h)
        x = x + linear(h, block + names[4])
        states.append(x)
        layer += 1
    return [*states, norm(x, "ln_final" if fused else "text_model.final_layer_norm")]
