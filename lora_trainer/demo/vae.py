"""The base model's VAE: constructed, not trained.

Its latents are the eightfold box-reduced picture (red, green, blue and luma), and its decoder is a smooth
enlargement. Signals travel as pairs (+x, −x) beside two companions (+K, −K), because then
 - a group's mean is zero and its deviation is K to within x²/K², so that group normalization only scales; and
 - SiLU(x) − SiLU(−x) = x exactly, so that the activation can be undone by the next convolution.
Residual branches are zero, except three that repair the picture's edge (see `_repair_edge`).
Key names and shapes are those of LDM's `AutoencoderKL` (width 128, one residual block a level).
"""

from __future__ import annotations

import numpy as np

VAE_SCALING = 0.18215
LUMA = (0.299, 0.587, 0.114)
CHANNEL_MEAN = np.array([0.09, -0.01, -0.03, 0.02])
CHANNEL_STD = np.array([0.66, 0.51, 0.49, 0.49])
"""Mean and deviation of red, green, blue and luma (in −1…1) over the drawn pictures, measured once."""
WIDTH = 128
LEVELS = 4
COMPANION = 64.0
"""K: large beside the signals, and exact in half precision with all its edge values (48, 36)."""
LOG_VARIANCE = -30.0
SMOOTHING = np.outer([1, 2, 1], [1, 2, 1]) / 16
"""After nearest-neighbor doubling this is bilinear interpolation."""
Weights = dict[str, np.ndarray]


def latents_from_reduced(rgb: np.ndarray) -> np.ndarray:
    """Scaled latents (already × 0.18215) of a picture that is box-reduced eightfold.

    `rgb` is [..., 3] in −1…1; the result is [..., 4]: red, green, blue and luma, each with about unit variance over
    the drawn pictures. It is what the constructed encoder computes, so that pretraining needs no encoder.
    """
    channels = np.concatenate([rgb, rgb @ np.array(LUMA)[:, None]], axis=-1)
    return (channels - CHANNEL_MEAN) / CHANNEL_STD


def reduced_from_latents(latents: np.ndarray) -> np.ndarray:
    """RGB in −1…1 at an eighth of the picture's side: the decoder's first layer. Luma is redundant and unused."""
    return (latents * CHANNEL_STD + CHANNEL_MEAN)[..., :3]


def construct() -> Weights:
    """Every tensor of the VAE as float32, by its LDM name without the `first_stage_model.` prefix."""
    weights: Weights = {}
    _add_encoder(weights)
    _add_decoder(weights)
    _add_conv(weights, "quant_conv", 8, 8, kernel=1)
    _add_conv(weights, "post_quant_conv", 4, 4, kernel=1)
    for name, channels in (("quant_conv", 8), ("post_quant_conv", 4)):
        weights[f"{name}.weight"][:, :, 0, 0] = np.eye(channels)
    return weights


def _add_conv(weights: Weights, name: str, out: int, into: int, kernel: int = 3) -> tuple[np.ndarray, np.ndarray]:
    weights[f"{name}.weight"] = np.zeros((out, into, kernel, kernel), np.float32)
    weights[f"{name}.bias"] = np.zeros(out, np.float32)
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _add_norm(weights: Weights, name: str, gain: float = 1.0) -> None:
    weights[f"{name}.weight"] = np.full(WIDTH, gain, np.float32)
    weights[f"{name}.bias"] = np.zeros(WIDTH, np.float32)


def _add_block(weights: Weights, name: str) -> None:
    """A residual block that adds nothing."""
    for half in "12":
        _add_norm(weights, f"{name}.norm{half}")
        _add_conv(weights, f"{name}.conv{half}", WIDTH, WIDTH)


def _add_middle(weights: Weights, name: str) -> None:
    _add_block(weights, f"{name}.block_1")
    _add_block(weights, f"{name}.block_2")
    _add_norm(weights, f"{name}.attn_1.norm")
    for part in ("q", "k", "v", "proj_out"):
        _add_conv(weights, f"{name}.attn_1.{part}", WIDTH, WIDTH, kernel=1)


def _spread(weights: Weights, name: str, mixing: np.ndarray, offset: np.ndarray) -> None:
    """A first convolution: signal j = mixing[j] · input + offset[j], laid out as (+x, −x, +K, −K) in group j."""
    kernel, bias = _add_conv(weights, name, WIDTH, mixing.shape[1])
    for j, (row, shift) in enumerate(zip(mixing, offset, strict=True)):
        kernel[4 * j, :, 1, 1], bias[4 * j] = row, shift
        kernel[4 * j + 1, :, 1, 1], bias[4 * j + 1] = -row, -shift
        bias[4 * j + 2], bias[4 * j + 3] = COMPANION, -COMPANION


def _gather(weights: Weights, name: str, scale: np.ndarray, offset: np.ndarray, outputs: int) -> None:
    """The last norm, activation and convolution: output j = scale[j] · signal j + offset[j]."""
    _add_norm(weights, f"{name}.norm_out", COMPANION / np.sqrt(2))
    kernel, bias = _add_conv(weights, f"{name}.conv_out", outputs, WIDTH)
    for j, (factor, shift) in enumerate(zip(scale, offset, strict=True)):
        kernel[j, 4 * j, 1, 1], kernel[j, 4 * j + 1, 1, 1] = factor, -factor
        bias[j] = shift


def _add_encoder(weights: Weights) -> None:
    mixing = np.vstack([np.eye(3), LUMA])
    _spread(weights, "encoder.conv_in", mixing, np.zeros(4))
    for level in range(LEVELS):
        _add_block(weights, f"encoder.down.{level}.block.0")
        if level < LEVELS - 1:
            kernel, _ = _add_conv(weights, f"encoder.down.{level}.downsample.conv", WIDTH, WIDTH)
            # The downsampler pads on the right and at the bottom only, so these four taps never meet the padding.
            kernel[:, :, :2, :2] = np.eye(WIDTH)[:, :, None, None] / 4
    _add_middle(weights, "encoder.mid")
    scale = 1 / (CHANNEL_STD * VAE_SCALING)
    _gather(weights, "encoder", scale, -CHANNEL_MEAN * scale, 8)
    weights["encoder.conv_out.bias"][4:] = LOG_VARIANCE


def _add_decoder(weights: Weights) -> None:
    mixing = np.diag(CHANNEL_STD * VAE_SCALING)[:3]
    _spread(weights, "decoder.conv_in", mixing, CHANNEL_MEAN[:3])
    _add_middle(weights, "decoder.mid")
    for level in reversed(range(LEVELS)):
        for block in range(2):
            _add_block(weights, f"decoder.up.{level}.block.{block}")
        if level < LEVELS - 1:
            _repair_edge(weights, f"decoder.up.{level}.block.0")
        if level > 0:
            kernel, _ = _add_conv(weights, f"decoder.up.{level}.upsample.conv", WIDTH, WIDTH)
            kernel[:] = np.eye(WIDTH)[:, :, None, None] * SMOOTHING
    _gather(weights, "decoder", np.ones(3), np.zeros(3), 3)


def _repair_edge(weights: Weights, name: str) -> None:
    """Turn a residual block into the repair of the edge pixels that the smoothing before it has darkened.

    Smoothing meets zero padding, which leaves a share c of signal and companion alike: 3/4 on an edge, 9/16 in a
    corner. What the companion lacks tells where that happened, and opens a gate: SiLU(L + sx) − SiLU(L − sx) is 0
    where L is far below zero and 2sx where it is far above. An open edge gate adds x/3 to the signals and K/4 to the
    companions, an open corner gate 4x/9 and 3K/16 more, which makes cx into x and cK into K.
    """
    inner, strength, swing = 1024.0, 4.0, 24.0
    weights[f"{name}.norm1.weight"][:] = COMPANION / np.sqrt(2)
    weights[f"{name}.norm2.weight"][:] = inner / np.sqrt(2)
    first, bias = weights[f"{name}.conv1.weight"][:, :, 1, 1], weights[f"{name}.conv1.bias"]
    second = weights[f"{name}.conv2.weight"][:, :, 1, 1]
    channel = 0
    # Share lacking where the gate is closed and where it is open, then what to add of signal and of companion.
    for closed, opened, signal_share, companion_share in ((0.0, 0.25, 1 / 3, 1 / 4), (0.25, 0.4375, 4 / 9, 3 / 16)):
        slope = 2 * swing / (opened - closed)
        for j in range(4):  # the three signals, then a constant for the companions
            for sign in (1, -1):
                # L = slope · (1 − companion/K − closed) − swing: −swing where closed, +swing where open.
                first[channel, 2], first[channel, 3] = -slope / COMPANION, slope / COMPANION
                bias[channel] = slope * (1 - closed) - swing
                if j < 3:
                    first[channel, 4 * j], first[channel, 4 * j + 1] = sign * strength, -sign * strength
                    amount = sign * signal_share / (2 * strength)
                    second[4 * j, channel], second[4 * j + 1, channel] = amount, -amount
                else:
                    bias[channel] += sign * strength
                    amount = sign * companion_share * COMPANION / (2 * strength)
                    second[2:12:4, channel], second[3:12:4, channel] = amount, -amount
                first[channel + 1], bias[channel + 1] = -first[channel], -bias[channel]
                bias[channel + 2], bias[channel + 3] = inner, -inner
                channel += 4
