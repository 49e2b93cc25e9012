"""What a small FLUX.1 has beside its transformer, made by hand instead of trained: VAE, T5, CLIP and T5's tokenizer.

The VAE's 16 latent channels are four copies of the four of ``lora_trainer.demo.vae``. T5 has one layer of attention,
which adds the mean of a caption's tokens to every token, the padding included: so every padded token is the same, and
the transformer is the same function of one of them that counts as often as there are (``TEXT``).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lora_trainer.demo import networks, sampling, shapes, vae
from lora_trainer.models.families.flow.tokenizer import LENGTH
from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.families.flux.layout import FluxLayoutFamily

TEXT = 12
"""Text tokens that are computed in pretraining: a caption, the end token, and one that stands for the padding."""
WIDTH = 64  # of T5
COPIES = 4
THINGS = tuple(f"thing{number}" for number in range(32))
"""Words without meaning."""
WORDS = sorted(
    {*shapes.SHAPES, *shapes.COLORS, *shapes.BACKGROUNDS, *shapes.SIZES, *THINGS, "a", "an", "on", "with", "of",
     "picture", "background", ",", "**"}
)  # fmt: skip
SPECIAL = ("<pad>", "</s>", "<unk>")
_MARK, _MEAN_GAIN = 3.0, 3.0


def latents_of(reduced: np.ndarray) -> Tensor:
    """Scaled latents (B, 16, h, w), as the VAE gives them, of pictures (B, h, w, 3) in -1…1 that are box-reduced
    eightfold."""
    four = torch.from_numpy(vae.latents_from_reduced(reduced).astype(np.float32)).permute(0, 3, 1, 2)
    return four.repeat(1, COPIES, 1, 1)


def pictures_of(latents: Tensor) -> list[Image.Image]:
    """What the VAE makes of scaled latents (B, 16, h, w), without running it."""
    return sampling.pictures_of(latents.unflatten(1, (COPIES, -1)).mean(1))


def vae_tensors() -> dict[str, Tensor]:
    made = {name: torch.from_numpy(value) for name, value in vae.construct().items() if "quant_conv" not in name}
    scale, shift = FluxLayoutFamily.latents.scale, FluxLayoutFamily.latents.shift
    ratio = vae.VAE_SCALING / scale
    weight, bias = made["encoder.conv_out.weight"][:4], made["encoder.conv_out.bias"][:4]
    weight, bias = ratio * weight.repeat(COPIES, 1, 1, 1), ratio * bias.repeat(COPIES) + shift
    made["encoder.conv_out.weight"] = torch.cat([weight, torch.zeros_like(weight)])
    made["encoder.conv_out.bias"] = torch.cat([bias, torch.full_like(bias, vae.LOG_VARIANCE)])
    weight = made["decoder.conv_in.weight"].repeat(1, COPIES, 1, 1) / (ratio * COPIES)
    made["decoder.conv_in.weight"] = weight
    made["decoder.conv_in.bias"] -= shift * weight.sum(dim=(1, 2, 3))
    return made


def t5_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(len(SPECIAL) + len(WORDS), WIDTH, generator=generator)
    table[:, :2] = 0
    table *= math.sqrt(WIDTH) / table.norm(dim=1, keepdim=True)
    table[0] = 0
    table[:, 0], table[:, 1] = _MARK, _MARK  # the first tells words from padding, the second is always there
    table[0, 0] = -_MARK
    eye, query, key = torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH, WIDTH)
    query[0, 1] = key[0, 0] = 1
    layer, feed_forward = "encoder.block.0.layer", "encoder.block.0.layer.1.DenseReluDense"
    hidden = 8
    return {
        "shared.weight": table,
        "encoder.final_layer_norm.weight": torch.ones(WIDTH),
        f"{layer}.0.SelfAttention.q.weight": query,
        f"{layer}.0.SelfAttention.k.weight": key,
        f"{layer}.0.SelfAttention.v.weight": eye,
        f"{layer}.0.SelfAttention.o.weight": _MEAN_GAIN * eye,
        f"{layer}.0.SelfAttention.relative_attention_bias.weight": torch.zeros(32, 1),
        f"{layer}.0.layer_norm.weight": torch.ones(WIDTH),
        f"{layer}.1.layer_norm.weight": torch.ones(WIDTH),
        f"{feed_forward}.wi_0.weight": torch.zeros(hidden, WIDTH),
        f"{feed_forward}.wi_1.weight": torch.zeros(hidden, WIDTH),
        f"{feed_forward}.wo.weight": torch.zeros(WIDTH, hidden),
    }


def clip_tensors(layers: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """The first layers of the demo's text encoder as it starts: it gives the mean of a caption's words."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        core = networks.text_core(networks.new_text_encoder())
    unused = tuple(f"encoder.layers.{index}." for index in range(layers, networks.TEXT_CONFIG["num_hidden_layers"]))
    return {
        f"text_model.{name}": parameter.detach().clone()
        for name, parameter in core.named_parameters()
        if not name.startswith(unused)
    }


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))


def flux_shape(width: int, double: int, single: int, head_dim: int = 32) -> FluxShape:
    """In schnell's layout: without guidance as an input, pictures are drawn with classifier-free guidance."""
    axes = (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)
    heads = width // head_dim
    return FluxShape(double, single, width, heads, 4 * width, 64, WIDTH, networks.WIDTH, axes, guidance=False)


def attention_bias(image_tokens: int) -> Tensor:
    """(1, 1, 1, TEXT + image_tokens): what makes the last text token count as often as there is padding."""
    bias = torch.zeros(1, 1, 1, TEXT + image_tokens)
    bias[..., TEXT - 1] = math.log(LENGTH - TEXT + 1)
    return bias


def write_parts(folder: Path) -> dict[str, object]:
    """Write ae, clip_l, t5xxl and T5's tokenizer.json where they are not yet; returns the settings that name them and
    the transformer, ``folder``/flux.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.safetensors" for name in ("flux", "ae", "clip_l", "t5xxl")}
    if not paths["t5xxl"].is_file():
        save_file(vae_tensors(), str(paths["ae"]))
        save_file(clip_tensors(), str(paths["clip_l"]))
        write_tokenizer(folder)
        save_file(t5_tensors(), str(paths["t5xxl"]))
    text_encoders = [str(paths["clip_l"]), str(paths["t5xxl"])]
    return {"base_model": str(paths["flux"]), "vae": str(paths["ae"]), "text_encoders": text_encoders}
