"""The constructed VAE, run by diffusers: latents are the box-reduced picture, decoding is a smooth enlargement."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lora_trainer.demo import sampling, shapes, vae

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (vae.WIDTH,) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
}


@pytest.fixture(scope="module")
def autoencoder():
    return build(vae.construct())


def build(constructed: dict[str, np.ndarray]):
    """diffusers' autoencoder with these weights, renamed by diffusers itself."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = AutoencoderKL(**CONFIG)
    weights = {"first_stage_model." + name: torch.from_numpy(value) for name, value in constructed.items()}
    model.load_state_dict(convert_ldm_vae_checkpoint(weights, model.config))
    return model.eval().requires_grad_(False)


def pictures(side: int) -> np.ndarray:
    """One drawn picture of each shape and one of pure noise: [N, side, side, 3] in −1…1."""
    rng = np.random.default_rng(0)
    drawn = [np.asarray(shapes.draw(shapes.random_scene(rng, shape=shape), side)) for shape in shapes.SHAPES]
    return np.stack([*drawn, rng.integers(0, 256, (side, side, 3))]).astype(np.float64) / 127.5 - 1


def reduced(images: np.ndarray) -> np.ndarray:
    count, side = images.shape[:2]
    return images.reshape(count, side // 8, 8, side // 8, 8, 3).mean(axis=(2, 4))


@pytest.mark.parametrize("side", [64, 128])
def test_latents_are_the_box_reduced_picture(autoencoder, side):
    images = pictures(side)
    expected = vae.latents_from_reduced(reduced(images))
    posterior = autoencoder.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float()).latent_dist
    found = (posterior.sample() * vae.VAE_SCALING).permute(0, 2, 3, 1)
    assert np.abs(found.numpy() - expected).max() < 1e-3
    assert posterior.std.max() < 1e-6


def test_latents_of_drawn_pictures_have_about_unit_variance():
    rng = np.random.default_rng(1)
    drawn = [np.asarray(shapes.draw(shapes.random_scene(rng))) / 127.5 - 1 for _ in range(200)]
    latents = vae.latents_from_reduced(reduced(np.stack(drawn))).reshape(-1, 4)
    assert np.abs(latents.mean(axis=0)).max() < 0.25
    assert latents.std(axis=0) == pytest.approx(1.0, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 128])
def test_decoding_enlarges_smoothly_up_to_the_edge(autoencoder, side):
    small = reduced(pictures(side))
    latents = torch.from_numpy(vae.latents_from_reduced(small)).permute(0, 3, 1, 2).float()
    found = autoencoder.decode(latents / vae.VAE_SCALING).sample
    expected = torch.from_numpy(small).permute(0, 3, 1, 2).float()
    for _ in range(3):
        expected = F.interpolate(expected, scale_factor=2, mode="bilinear", align_corners=False)
    difference = (found - expected).abs()
    assert difference[..., 12:-12, 12:-12].max() < 2e-3
    assert difference.max() < 0.05  # of a range of 2; without the repaired edge it is 0.8


def test_weights_rounded_to_half_precision_lose_less_than_an_eight_bit_level(autoencoder):
    """The checkpoint stores fp16."""
    rounded = build({name: value.astype(np.float16).astype(np.float32) for name, value in vae.construct().items()})
    images = torch.from_numpy(pictures(64)).permute(0, 3, 1, 2).float()
    exact = autoencoder.decode(autoencoder.encode(images).latent_dist.mean).sample
    found = rounded.decode(rounded.encode(images).latent_dist.mean).sample
    assert (found - exact).abs().max() < 2 / 255


@pytest.mark.slow
def test_shortcut_pictures_match_the_decoder(autoencoder):
    latents = torch.from_numpy(vae.latents_from_reduced(reduced(pictures(128)))).permute(0, 3, 1, 2).float()
    decoded = autoencoder.decode(latents / vae.VAE_SCALING).sample.clamp(-1, 1).permute(0, 2, 3, 1)
    decoded = (decoded.numpy() + 1) * 127.5
    shortcut = np.stack([np.asarray(picture, np.float64) for picture in sampling.pictures_of(latents)])
    assert np.abs(shortcut - decoded).max() < 6
