"""Drawn pictures and their captions."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lora_trainer.demo import shapes


@given(st.integers(0, 2**32 - 1))
def test_shapes_lie_inside_and_contrast(seed):
    rng = np.random.default_rng(seed)
    scene = shapes.random_scene(rng, shape=shapes.SHAPES[rng.integers(len(shapes.SHAPES))])
    moved = replace(scene, center=(0.5, 0.5))
    areas = [np.asarray(shapes.draw_mask(s), np.float64).sum() for s in (scene, moved)]
    assert areas[0] == pytest.approx(areas[1], rel=0.03)  # corners are rounded to pixels
    assert shapes.contrasts(scene.color, scene.background)


@given(st.integers(0, 2**32 - 1))
def test_captions_tell_the_truth(seed):
    rng = np.random.default_rng(seed)
    scene = shapes.random_scene(rng)
    words = shapes.random_caption(scene, rng).replace("*", " ").replace(",", " ").split()
    named = {
        "shape": set(words) & set(shapes.SHAPES),
        "color": set(words) & set(shapes.COLORS),
        "background": set(words) & set(shapes.BACKGROUNDS),
        "size": set(words) & set(shapes.SIZES),
    }
    assert named["shape"] == {scene.shape}
    assert all(found <= {getattr(scene, attribute)} for attribute, found in named.items())


def test_the_base_never_sees_the_new_shape():
    rng = np.random.default_rng(0)
    assert shapes.NEW_SHAPE not in {shapes.random_scene(rng).shape for _ in range(500)}


def test_the_same_seed_draws_the_same_picture():
    first, second = (shapes.draw(shapes.random_scene(np.random.default_rng(7))) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("count", [1, 20, 90])
def test_dataset_is_complete_and_keeps_pairs_back(tmp_path, count):
    scenes = shapes.write_dataset(tmp_path / "stars", count)
    with (tmp_path / "stars" / "metadata.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == len(scenes) == count
    for row, scene in zip(rows, scenes, strict=True):
        assert Image.open(tmp_path / "stars" / row["filename"]).size == (128, 128)
        assert row["prompt"] == f"a {scene.size} {scene.color} **star** on a {scene.background} background"
    assert not {(scene.color, scene.background) for scene in scenes} & set(shapes.held_out_pairs())


def test_held_out_pairs_leave_every_color_and_background_in_training():
    kept = set(shapes.color_pairs()) - set(shapes.held_out_pairs())
    assert {color for color, _ in kept} == set(shapes.COLORS)
    assert {ground for _, ground in kept} == set(shapes.BACKGROUNDS)
