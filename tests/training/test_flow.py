"""Flow matching against diffusers' and kohya's formulas, written down anew from their sources."""

from __future__ import annotations

import math

import pytest
import torch

from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.models.base import FlowSchedule
from lora_trainer.training.objectives.base import generator_for
from lora_trainer.training.objectives.flow import FlowObjective, draw_sigmas, resolution_mu, shifted
from lora_trainer.training.objectives.of_pictures import picture_objective
from tests.training.fakes import FakeModel

NORMAL = torch.randn(64, generator=generator_for(0, "sigmas"))
UNIFORM = torch.rand(64, generator=generator_for(0, "sigmas"))


def drawn(sampling: str, shift: float = 3.0, tokens: float = 1024) -> torch.Tensor:
    return draw_sigmas(sampling, shift, 64, tokens, generator_for(0, "sigmas"))


def kohya_flux_shift(latent_height: int, latent_width: int) -> torch.Tensor:
    """library/flux_train_utils.py: get_lin_function, time_shift, get_noisy_model_input_and_timesteps."""
    x1, y1, x2, y2 = 256, 0.5, 4096, 1.15
    m = (y2 - y1) / (x2 - x1)
    b = y1 - m * x1
    mu = m * ((latent_height // 2) * (latent_width // 2)) + b
    t = (NORMAL * 1.0).sigmoid()
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** 1.0)


def test_sigmas_are_those_of_kohya_and_diffusers():
    torch.testing.assert_close(drawn("flux_shift", tokens=64 * 96 / 4), kohya_flux_shift(64, 96))
    sigmoid = NORMAL.sigmoid()
    torch.testing.assert_close(drawn("shift", 3.1582), sigmoid * 3.1582 / (1 + (3.1582 - 1) * sigmoid))
    assert torch.equal(drawn("uniform"), UNIFORM)
    # diffusers.training_utils.compute_density_for_timestep_sampling: sigmoid(normal(0, 1))
    assert torch.equal(drawn("logit_normal"), sigmoid) and torch.equal(drawn("sigmoid"), sigmoid)


def test_the_shift_grows_with_the_picture_as_in_diffusers():
    """pipelines/flux/pipeline_flux.py: calculate_shift."""
    for tokens in (256, 1024, 4096):
        slope = (1.15 - 0.5) / (4096 - 256)
        assert resolution_mu(tokens) == pytest.approx(tokens * slope + 0.5 - slope * 256)
    sigmas = torch.linspace(0.01, 1, 20)
    expected = math.exp(1.15) / (math.exp(1.15) + (1 / sigmas - 1))  # FlowMatchEulerDiscreteScheduler.time_shift
    torch.testing.assert_close(shifted(sigmas, math.exp(1.15)), expected)


def objective(tmp_path, **settings) -> FlowObjective:
    base = {"base_model": "x", "train_data_dir": str(tmp_path), "output_dir": str(tmp_path)}
    model = FakeModel()
    model.schedule = FlowSchedule("flux_shift", 1.15, 3.5)
    built = picture_objective(from_mapping({**base, **settings}), model, model.encode_prompts)
    assert isinstance(built, FlowObjective)
    return built


def test_the_path_and_its_target(tmp_path):
    flow = objective(tmp_path)
    x0, noise, sigma = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.0, 0.25, 1.0])
    noisy = flow.add_noise(x0, noise, sigma)
    assert torch.equal(noisy[0], x0[0]) and torch.equal(noisy[2], noise[2])
    velocity = flow.target(x0, noise, sigma)
    torch.testing.assert_close(noisy - sigma.view(-1, 1, 1, 1) * velocity, x0)  # x0 = x_σ - σ·v
    torch.testing.assert_close(noisy + (1 - sigma.view(-1, 1, 1, 1)) * velocity, noise)


def test_the_loss_is_the_plain_mean_square(tmp_path):
    flow = objective(tmp_path, min_snr_gamma=5)  # which has no meaning here
    prediction, target = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    losses = flow._losses(prediction, target, torch.tensor([0.1, 0.9]), torch.tensor([1.0, 0.5]), None)
    expected = (prediction - target).square().mean(dim=(1, 2, 3)) * torch.tensor([1.0, 0.5])
    torch.testing.assert_close(losses, expected)


def test_settings_decide_on_the_levels(tmp_path):
    latents = torch.zeros(512, 16, 32, 32)

    def levels(**settings):
        return objective(tmp_path, **settings).draw_levels(latents, generator_for(1, "levels"))

    assert torch.equal(levels(), levels(sigma_sampling="flux_shift"))  # the model's own
    means = [float(levels(sigma_sampling=name, sigma_shift=6).mean()) for name in ("uniform", "flux_shift", "shift")]
    assert means == sorted(means) and means[0] == pytest.approx(0.5, abs=0.05) and means[2] > 0.75
    few = levels(sigma_sampling="uniform", min_timestep=200, max_timestep=399)
    assert few.min() >= 0.2 and few.max() <= 0.4 and few.std() > 0.05
    ends = objective(tmp_path, min_timestep=200, max_timestep=399)
    assert [ends.level_at(place) for place in (0.0, 1.0)] == pytest.approx([0.2, 0.4])
    with pytest.raises(UserError, match="sigma_sampling"):
        levels(sigma_sampling="other")
