"""The scorer on drawn pictures as the VAE leaves them, and on pictures that show no shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lora_trainer.demo import sampling, score, shapes, vae


def through_vae(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture, np.float64) / 127.5 - 1
    reduced = pixels.reshape(16, 8, 16, 8, 3).mean(axis=(1, 3))
    latents = torch.from_numpy(vae.latents_from_reduced(reduced)).permute(2, 0, 1)[None]
    return sampling.pictures_of(latents)[0]


@pytest.mark.parametrize("size", shapes.SIZES)
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_every_shape_color_and_background_is_recognized(shape, size):
    rng = np.random.default_rng(len(shape))
    scenes = [shapes.random_scene(rng, shape=shape, size=size) for _ in range(15)]
    for scene in scenes:
        seen = score.score(through_vae(shapes.draw(scene)))
        assert (seen.shape, seen.color, seen.background) == (scene.shape, scene.color, scene.background)


def test_a_plain_picture_has_no_shape():
    seen = score.score(Image.new("RGB", (128, 128), shapes.BACKGROUNDS["teal"]))
    assert seen.shape is None
    assert seen.background == "teal"


def test_a_speck_is_no_shape():
    picture = Image.new("RGB", (128, 128), shapes.BACKGROUNDS["navy"])
    picture.paste((255, 255, 255), (60, 60, 66, 66))
    assert score.score(picture).shape is None


def test_other_sizes_are_judged_alike():
    scene = shapes.random_scene(np.random.default_rng(2), shape="cross", size="big")
    assert score.score(shapes.draw(scene, 256)).shape == "cross"
