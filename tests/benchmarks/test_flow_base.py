"""The small FLUX.1 that learns is the one that is lent, and what is made by hand for it does what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_trainer.config import from_mapping
from lora_trainer.demo import shapes
from lora_trainer.models.families.flux.network import patches, unpatched
from lora_trainer.run import file_lender
from tests.benchmarks import flow_base, flow_pretraining
from tests.benchmarks.flow_parts import latents_of, pictures_of, write_parts

SIZES = {"width": 32, "double": 1, "single": 1}
CAPTIONS = ["", "a big red circle on a navy background", "a grey background with a big **red** star"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flow_base")


@pytest.fixture(scope="module")
def run(folder):
    """One whose blocks and prediction are not 0 any more."""
    run = flow_pretraining.Pretraining(folder, **SIZES)
    with torch.no_grad():
        for parameter, average in zip(run.parameters, run.average):
            average.copy_(parameter.add_(0.1 * torch.randn_like(parameter)))
    return run


@pytest.fixture(scope="module")
def lent(folder, run):
    settings = write_parts(folder)
    run.export()
    with file_lender(from_mapping(settings)).borrow() as model:
        yield model


def test_one_token_that_counts_as_often_stands_for_all_of_the_padding(run, lent):
    side, sigmas = flow_pretraining.LATENTS, torch.tensor([0.2, 0.6, 0.9])
    latents = torch.randn(3, 16, side, side)
    with torch.no_grad():
        context, pooled = flow_pretraining.Texts(lent)(CAPTIONS)
        tokens = run.network(patches(latents), context, pooled, sigmas, None, (side // 2, side // 2))
        whole = lent.predict(latents, sigmas, lent.encode_prompts(CAPTIONS), None)
    torch.testing.assert_close(unpatched(tokens, (side // 2, side // 2)), whole, atol=1e-5, rtol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 1e-3


def test_captions_fit_into_what_is_computed(lent):
    rng = np.random.default_rng(0)
    scene = shapes.Scene("triangle", "orange", "beige", flow_pretraining.SIZE)
    captions = {shapes.random_caption(scene, rng) for _ in range(200)}
    assert max(map(lent.count_tokens, captions)) + 2 <= flow_pretraining.TEXT


def test_latents_are_the_vae_s(lent):
    picture = np.asarray(shapes.draw(shapes.Scene("ring", "red", "grey", "big"), 64), np.float32)
    pixels = torch.from_numpy(picture / 127.5 - 1).permute(2, 0, 1)[None]
    reduced = (picture / 127.5 - 1).reshape(8, 8, 8, 8, 3).mean(axis=(1, 3))[None]
    with torch.no_grad():
        latents = lent.sample_latents(lent.encode_images(pixels), None)
        decoded = lent.decode_latents(latents)
    torch.testing.assert_close(latents, latents_of(reduced), atol=0.02, rtol=0)
    levels = ((decoded[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).numpy()
    assert np.abs(levels - np.asarray(pictures_of(latents)[0], np.float32)).max() < 4


def test_it_learns_stops_and_goes_on(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(flow_pretraining, "MASKS_PER_SHAPE", 2)
    monkeypatch.setattr(flow_pretraining, "SAMPLING_STEPS", 2)
    flow_pretraining.learn_base(tmp_path, 0.02, 0, **SIZES)
    first = flow_pretraining.Pretraining.resumed(tmp_path)
    assert first.step > 0 and list(tmp_path.glob("base_*.png"))
    flow_pretraining.learn_base(tmp_path, 0.04, 0, **SIZES)
    second = flow_pretraining.Pretraining.resumed(tmp_path)
    assert second.step > first.step and second.seconds > first.seconds
    assert any((a != b).any() for a, b in zip(first.average, second.average))


@pytest.mark.slow
def test_a_lora_is_trained_on_it_and_scored(folder, run, lent, monkeypatch, capsys):
    monkeypatch.setattr(flow_pretraining, "SAMPLING_STEPS", 2)
    run.save()
    flow_base.learn_star(folder, 6, ["max_train_steps=2"])
    out = capsys.readouterr().out
    assert out.count("of 6; shapes seen") == 4 and "2 steps" in out
