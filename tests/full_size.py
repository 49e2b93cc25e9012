"""The demo's base at the sizes of a real Stable Diffusion 1, for WebUIs that load nothing smaller.

It draws what the small one draws. A channel becomes several equal ones, and what reads them takes their mean, so that
every layer computes what it did before (T. Chen, I. Goodfellow, J. Shlens, "Net2Net", 2016, without its noise);
normalization over a group, or over all channels, does not see the copies. Attention heads keep their width, padded
with zeros: the product of queries and keys then is what it was, and only its scale, 1/√width, has to be made good.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lora_trainer.demo import networks
from lora_trainer.demo.base import TEXT, UNET, VAE, build_base

UNET_TIMES = 5
"""A first level of 320 channels, as in every Stable Diffusion."""
HEADS, UNET_HEADS, TEXT_HEADS = 4, 8, 12  # of the demo's attention, and of the wide ones
TEXT_WIDTH = 768
VAE_CHANNELS, VAE_BLOCKS = (128, 256, 512, 512), 2
Weights = dict[str, np.ndarray]


def build(path: Path, unet_times: int = UNET_TIMES, text_width: int = TEXT_WIDTH, text_heads: int = TEXT_HEADS) -> Path:
    """Write the checkpoint (fp16; 0.7 GB at the given sizes) to ``path``."""
    tensors = load_file(build_base())
    small = {
        prefix: {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for prefix in (UNET, TEXT, VAE)
    }
    wide = {
        UNET: {key: _unet(key, value, unet_times, text_width) for key, value in small[UNET].items()},
        TEXT: {key: _text(key, value, text_width, text_heads) for key, value in small[TEXT].items()},
        VAE: _vae(small[VAE]),
    }
    found = {prefix + key: value for prefix, part in wide.items() for key, value in part.items()}
    save_file({key: _stored(value) for key, value in found.items()}, path)
    return path


def _stored(weight: np.ndarray) -> np.ndarray:
    """In fp16 where it is no integer; the library writes the memory as it lies, so it has to lie in order."""
    return np.ascontiguousarray(weight, np.float16 if np.issubdtype(weight.dtype, np.floating) else None)


def _fit(weight: np.ndarray, out: int, into: int | None = None) -> np.ndarray:
    """``out`` rows, each row repeated; with ``into`` as many columns, of which equal ones share the weight."""
    weight = weight.astype(np.float32).repeat(out // weight.shape[0], axis=0)
    if into is None:
        return weight
    times = into // weight.shape[1]
    return weight.repeat(times, axis=1) / times


def _pad_heads(weight: np.ndarray, heads: int, width: int, axis: int = 0) -> np.ndarray:
    """The heads along ``axis`` as the first of ``heads``, each filled up with zeros to ``width``."""
    weight = np.moveaxis(weight, axis, 0)
    padded = np.zeros((heads, width, *weight.shape[1:]), weight.dtype)
    each = weight.shape[0] // HEADS
    padded[:HEADS, :each] = weight.reshape(HEADS, each, *weight.shape[1:])
    return np.moveaxis(padded.reshape(heads * width, *weight.shape[1:]), 0, axis)


def _attention(kind: str, weight: np.ndarray, heads: int, out: int, into: int) -> np.ndarray:
    """A projection "q", "k", "v" or "out" of attention whose heads together are as wide as ``out`` or ``into``."""
    if kind == "out":
        return _pad_heads(_fit(weight, out), heads, into // heads, axis=1)
    width, before = out // heads, weight.shape[0] // HEADS
    wide = _pad_heads(weight if weight.ndim == 1 else _fit(weight, weight.shape[0], into), heads, width)
    return wide * np.sqrt(width / before) if kind == "q" else wide


def _unet(key: str, weight: np.ndarray, times: int, context: int) -> np.ndarray:
    if key == "time_embed.0.weight":
        return _fit(_frequencies(weight, times), weight.shape[0] * times)
    if key == "out.2.bias":
        return weight
    if weight.ndim == 1:
        return _fit(weight, weight.shape[0] * times)
    out = weight.shape[0] * (1 if key == "out.2.weight" else times)
    into = weight.shape[1] * (1 if key == "input_blocks.0.0.weight" else times)
    if re.search(r"attn2\.to_[kv]\.", key):
        into = context
    if found := re.search(r"attn\d\.to_(q|k|v|out)\.", key):
        return _attention(found.group(1), weight, UNET_HEADS, out, into)
    return _fit(weight, out, into)


def _frequencies(weight: np.ndarray, times: int) -> np.ndarray:
    """Columns for a time embedding of more frequencies, 10000^(-i/half): the old ones are among them."""
    rows, width = weight.shape
    wide = np.zeros((rows, 2, width // 2, times), weight.dtype)  # cosines, then sines
    wide[..., 0] = weight.reshape(rows, 2, width // 2)
    return wide.reshape(rows, width * times)


def _text(key: str, weight: np.ndarray, width: int, heads: int) -> np.ndarray:
    times = width // networks.WIDTH
    if key == "embeddings.position_ids":
        return weight
    if "embeddings." in key:
        return weight.repeat(times, axis=1)
    out, into = weight.shape[0] * times, weight.shape[-1] * times
    if found := re.search(r"self_attn\.(q|k|v|out(?=_proj\.weight))_proj\.", key):  # not the bias of what goes out
        return _attention(found.group(1), weight, heads, out, into)
    return _fit(weight, out, into if weight.ndim == 2 else None)


def _vae(small: Weights) -> Weights:
    wide: Weights = {}

    def layer(name: str, source: str, out: int, into: int | None = None) -> None:
        wide[f"{name}.weight"] = _fit(small[f"{source}.weight"], out, into)
        wide[f"{name}.bias"] = _fit(small[f"{source}.bias"], out)

    def block(name: str, source: str, into: int, out: int) -> None:
        for half, channels in (("1", into), ("2", out)):
            layer(f"{name}.norm{half}", f"{source}.norm{half}", channels)
            layer(f"{name}.conv{half}", f"{source}.conv{half}", out, channels)
        if into != out:
            same = np.eye(VAE_CHANNELS[0], dtype=np.float32)[:, :, None, None]
            wide[f"{name}.nin_shortcut.weight"] = _fit(same, out, into)
            wide[f"{name}.nin_shortcut.bias"] = np.zeros(out, np.float32)

    def middle(name: str) -> None:
        deep = VAE_CHANNELS[-1]
        block(f"{name}.block_1", f"{name}.block_1", deep, deep)
        block(f"{name}.block_2", f"{name}.block_2", deep, deep)
        layer(f"{name}.attn_1.norm", f"{name}.attn_1.norm", deep)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.attn_1.{part}", f"{name}.attn_1.{part}", deep, deep)

    def ends(name: str, into: int, first: int, last: int, out: int) -> None:
        layer(f"{name}.conv_in", f"{name}.conv_in", first, into)
        layer(f"{name}.norm_out", f"{name}.norm_out", last)
        layer(f"{name}.conv_out", f"{name}.conv_out", out, last)

    ends("encoder", 3, VAE_CHANNELS[0], VAE_CHANNELS[-1], 8)
    ends("decoder", 4, VAE_CHANNELS[-1], VAE_CHANNELS[0], 3)
    for name in ("encoder.mid", "decoder.mid"):
        middle(name)
    for level, channels in enumerate(VAE_CHANNELS):
        finer, coarser = VAE_CHANNELS[max(level - 1, 0)], VAE_CHANNELS[min(level + 1, len(VAE_CHANNELS) - 1)]
        down, up = f"encoder.down.{level}", f"decoder.up.{level}"
        for index in range(VAE_BLOCKS):
            block(f"{down}.block.{index}", f"{down}.block.0", channels if index else finer, channels)
        for index in range(VAE_BLOCKS + 1):
            block(f"{up}.block.{index}", f"{up}.block.{min(index, 1)}", channels if index else coarser, channels)
        if f"{down}.downsample.conv.weight" in small:
            layer(f"{down}.downsample.conv", f"{down}.downsample.conv", channels, channels)
        if f"{up}.upsample.conv.weight" in small:
            layer(f"{up}.upsample.conv", f"{up}.upsample.conv", channels, channels)
    return wide | {key: value for key, value in small.items() if "quant_conv" in key}
