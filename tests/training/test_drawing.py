"""What a run draws on the way, and how the lent model itself draws."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from lora_trainer.training import preview
from lora_trainer.training.metrics import MetricsLog
from tests.training.fakes import FakeModel, Run, configuration, same


class Painter:
    """A previewer that notes in which mode and with which weights it was asked to draw."""

    def __init__(self):
        self.calls = []

    def draw(self, prompt, seed, step, adapters):
        weights = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
        self.calls.append((prompt, seed, step, adapters.training, weights))
        return Image.new("RGB", (8, 8))


def test_previews_are_drawn_without_dropout_and_with_the_average(tmp_path):
    painter = Painter()
    config = configuration(tmp_path, preview_prompts=["a", "b"], preview_steps=2, epochs=3, ema_decay=0.5, save_steps=2)
    run = Run(config, previewer=painter)
    run.trainer.run()
    assert [(prompt, seed, step) for prompt, seed, step, *_ in painter.calls] == [
        (prompt, 42 + index, step) for step in (0, 2, 4, 6) for index, prompt in enumerate("ab")
    ], "step 0 is what the base draws"
    assert not any(training for _, _, _, training, _ in painter.calls) and run.adapters.training
    assert same(painter.calls[2][4], run.saved[0][2]), "what is drawn is what is saved"
    assert not same(run.final, dict(run.adapters.state_dict())), "the average is saved, the trained weights stay"
    assert [path.name for path, _, _ in run.recorder.previews[:2]] == [
        "thing-step00000000-0.png",
        "thing-step00000000-1.png",
    ]
    assert not run.model.released, "a model that draws previews keeps its VAE and text encoders"


@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_models_own_previewer_draws(prediction_type, zero_terminal, family):
    model = FakeModel(family, prediction_type)
    if zero_terminal:
        model.schedule.alphas_cumprod[-1] = 0
    before = torch.random.get_rng_state()
    images = [
        preview.sample(model, "a star", width=70, height=48, steps=4, seed=seed, cfg=cfg)
        for seed, cfg in [(1, 7.0), (1, 7.0), (2, 7.0), (1, 1.0)]
    ]
    time_ids = model.time_ids[0]
    assert images[0].size == (64, 48) and images[0].mode == "RGB"
    assert images[0].tobytes() == images[1].tobytes() != images[2].tobytes()
    assert len(set(images[0].tobytes())) > 10, "not one color"
    assert (time_ids is not None) == (family == "sdxl")
    assert torch.equal(before, torch.random.get_rng_state())


def test_ddim_finds_the_picture_of_a_perfect_model():
    """A model that answers the noise of one known picture is sampled back to that picture."""
    model = FakeModel()
    picture = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    alphas = model.schedule.alphas_cumprod

    def predict(noisy_latents, timesteps, prompts, time_ids):
        a = alphas[timesteps].view(-1, 1, 1, 1)
        return (noisy_latents - a.sqrt() * picture) / (1 - a).sqrt()

    model.predict, seen = predict, []
    model.decode_latents = lambda latents: seen.append(latents) or torch.zeros(1, 3, 64, 64)
    preview.sample(model, "x", width=64, height=64, steps=20, seed=3)
    torch.testing.assert_close(seen[0], picture, atol=1e-3, rtol=0)


def test_the_default_previewer_takes_a_turn(tmp_path):
    config = configuration(tmp_path, preview_prompts=["a star"], preview_steps=2)
    run = Run(config, previewer=Painter())
    run.trainer.previewer = preview.ModelPreviewer(run.model, run.turns, (32, 32), steps=2)
    before = run.turns.taken
    with MetricsLog(tmp_path / "logs", 0, False, run.recorder.on_warning) as run.trainer.metrics:
        run.trainer._draw_previews()
    assert run.turns.taken == before + 1
    with Image.open(run.recorder.previews[0][0]) as image:
        assert image.size == (32, 32)
