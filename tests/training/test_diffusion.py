"""The loss of one step against the recipe, computed independently in NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning
from lora_trainer.models.schedule import rescale_zero_terminal_snr, scaled_linear_alphas_cumprod
from lora_trainer.training.objectives import diffusion
from lora_trainer.training.objectives.base import generator_for
from lora_trainer.training.objectives.pictures import Batch
from tests.adapters.layers import randomize
from tests.training.fakes import FakeModel, Run, configuration

SEED = 7


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H', W') -> (height, width), pixel centers at halves, edges repeated."""

    def matrix(n_in, n_out):
        rows = np.zeros((n_out, n_in))
        for i in range(n_out):
            x = max((i + 0.5) * n_in / n_out - 0.5, 0.0)
            low = min(int(x), n_in - 1)
            high = min(low + 1, n_in - 1)
            rows[i, low] += 1 - (x - low)
            rows[i, high] += x - low
        return rows

    return matrix(image.shape[0], height) @ image @ matrix(image.shape[1], width).T


def expected_loss(config, prediction_type, zero_terminal, moments, predict, weights, mask):
    """The recipe as recipe-and-formats describes it; draws from the step's generator in the step's order."""
    generator = generator_for(config.seed, "step", 0, 0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).double().numpy()

    mean, logvar = np.split(moments.double().numpy(), 2, axis=1)
    latents = mean
    if config.latent_sampling == "sample":
        latents = mean + np.exp(logvar / 2) * randn(*mean.shape)
    latents = latents * 0.18215
    batch, channels, height, width = latents.shape
    noise = randn(*latents.shape)
    if config.noise_offset:
        noise = noise + config.noise_offset * randn(batch, channels, 1, 1)
    for level in range(config.multires_noise_iterations):
        ratio = (2 + 2 * torch.rand((), generator=generator).item()) ** level
        h, w = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = randn(batch, channels, h, w)
        up = np.array([[bilinear(coarse[b, c], height, width) for c in range(channels)] for b in range(batch)])
        noise = noise + config.multires_noise_discount**level * up
        if 1 in (h, w):
            break
    if config.multires_noise_iterations:
        noise = noise / noise.std(ddof=1)
    timesteps = torch.randint(config.min_timestep, config.max_timestep + 1, (batch,), generator=generator).numpy()
    seen = noise
    if config.input_perturbation:
        seen = noise + config.input_perturbation * randn(*noise.shape)

    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = np.cumprod(1 - betas)
    if zero_terminal:
        root = np.sqrt(alphas_cumprod)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas_cumprod = root**2
    a = alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    noisy = np.sqrt(a) * latents + np.sqrt(1 - a) * seen
    target = noise if prediction_type == "epsilon" else np.sqrt(a) * noise - np.sqrt(1 - a) * latents

    d = predict(noisy, timesteps) - target
    if config.loss == "mse":
        loss = d**2
    else:
        with np.errstate(divide="ignore"):
            sigma = np.sqrt((1 - a) / a)
        c = (1 - config.huber_c) / (1 + sigma) ** 2 + config.huber_c
        loss = 2 * (c if config.loss == "huber" else 1) * (np.sqrt(d**2 + c**2) - c)
    if mask is not None:
        loss = loss * mask.double().numpy()
    loss = loss.mean((1, 2, 3)) * weights.double().numpy()
    snr = (a / (1 - a)).ravel()
    v = prediction_type == "v_prediction"
    if config.debiased_estimation:
        snr = np.minimum(snr, 1000)
        loss = loss * (1 / (snr + 1) if v else 1 / np.sqrt(snr))
    elif config.min_snr_gamma is not None and not (config.min_snr_gamma == "auto" and v and zero_terminal):
        capped = np.minimum(snr, 5 if config.min_snr_gamma == "auto" else config.min_snr_gamma)
        # 0/0 at the pure noise of a zero-terminal schedule: SNR is below gamma there, so the weight is 1.
        loss = loss * (capped / (snr + 1) if v else np.divide(capped, snr, out=np.ones_like(snr), where=snr > 0))
    return loss.mean(), noisy, timesteps


OBJECTIVES = [
    {"loss": "mse"},
    {"loss": "huber"},
    {"loss": "smooth_l1", "huber_c": 0.3},
    {"min_snr_gamma": None},
    {"min_snr_gamma": 1.0},
    {"debiased_estimation": True},
    {"noise_offset": 0.05},
    {"multires_noise_iterations": 6},
    {"multires_noise_iterations": 2, "noise_offset": 0.1, "multires_noise_discount": 0.8},
    {"input_perturbation": 0.1},
    {"latent_sampling": "mean"},
    {"min_timestep": 200, "max_timestep": 300},
    {"min_timestep": 999},
    {"loss": "huber", "noise_offset": 0.1, "input_perturbation": 0.2, "min_snr_gamma": 3.0},
]


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
def test_one_step_equals_the_recipe(tmp_path, settings, prediction_type, zero_terminal):
    if zero_terminal and prediction_type == "epsilon" and settings.get("debiased_estimation"):
        pytest.skip("refused; tested below")
    config = configuration(tmp_path, seed=SEED, zero_terminal_snr=zero_terminal, dropout=0.0, **settings)
    model = FakeModel(prediction_type=prediction_type)
    objective = Run(config, model).trainer.train_step.objective
    generator = generator_for(1, "data")
    moments = torch.randn(3, 8, 8, 12, generator=generator)
    weights = torch.tensor([1.0, 0.5, 2.0])
    mask = torch.rand(3, 1, 8, 12, generator=generator)
    batch = Batch(moments, ("a", "b", "c"), Conditioning(torch.zeros(3, 77, 6)), None, mask, weights)
    seen = {}

    def predict(noisy_latents, timesteps, prompts, time_ids):
        seen.update(noisy=noisy_latents, timesteps=timesteps)
        return (0.3 * noisy_latents + timesteps.view(-1, 1, 1, 1) / 1000).requires_grad_()

    model.predict = predict
    drawn = objective.draw(batch, generator_for(SEED, "step", 0, 0))
    loss = objective.loss(objective.inputs(drawn)) / drawn.count

    def predict_again(noisy, timesteps):
        return 0.3 * noisy + timesteps.reshape(-1, 1, 1, 1) / 1000

    expected, noisy, timesteps = expected_loss(
        config, prediction_type, zero_terminal, moments, predict_again, weights, mask
    )
    assert seen["timesteps"].tolist() == timesteps.tolist()
    np.testing.assert_allclose(seen["noisy"].numpy(), noisy, rtol=1e-4, atol=1e-5)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), expected, rtol=2e-5)


@pytest.mark.parametrize("sizes", [(3, 1), (1, 3), (2, 1, 1), (2, 2), (1, 1, 1, 1)], ids=str)
def test_every_picture_of_a_step_has_the_same_weight_however_the_batches_are_cut(tmp_path, monkeypatch, sizes):
    settings = {"min_timestep": 500, "max_timestep": 500, "latent_sampling": "mean", "max_grad_norm": 0, "dropout": 0.0}
    whole, parts = (Run(configuration(tmp_path, **settings)).trainer.train_step for _ in range(2))
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.zeros(*shape))  # each batch draws its own noise
    moments = torch.rand(4, 8, 8, 12, generator=generator_for(1, "data")) * torch.arange(1, 5).view(4, 1, 1, 1)
    contexts = torch.rand(4, 77, 6, generator=generator_for(2, "data"))
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0])

    def batch(start, end):
        prompts = Conditioning(contexts[start:end])
        return Batch(moments[start:end], ("a",) * (end - start), prompts, None, None, weights[start:end])

    ends = np.cumsum(sizes)
    expected = whole(0, [batch(0, 4)])
    loss = parts(0, [batch(end - size, end) for end, size in zip(ends, sizes)])
    assert loss == pytest.approx(expected, rel=1e-6)
    for first, second in zip(whole.parameters, parts.parameters):  # Adam's first moment is 0.1 times the gradient
        gradient, other = (step.optimizer.state[p]["exp_avg"] for step, p in ((whole, first), (parts, second)))
        torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-9)
    assert any(state["exp_avg"].any() for state in whole.optimizer.state.values())


@pytest.mark.parametrize(
    "settings", [{}, {"multires_noise_iterations": 4, "input_perturbation": 0.1}, {"loss": "huber", "preserve": 0.5}]
)
@pytest.mark.parametrize("varying", [False, True], ids=["cached captions", "encoded in the step"])
def test_a_micro_batch_can_be_cut_and_its_losses_add_up(tmp_path, settings, varying):
    config = configuration(tmp_path, batch_size=4, dropout=0.0, use_masks=True, shuffle_tags=varying, **settings)
    run = Run(config, FakeModel("sdxl"))
    randomize(run.adapters, deviation=0.2)
    objective = run.trainer.train_step.objective
    batch = max(run.source.micro_batches(0, 0), key=len)
    assert len(batch) == 4 and (batch.conditioning is None) == varying
    drawn = objective.draw(batch, generator_for(0, "draw"))
    assert drawn.count == len(drawn) == 4
    whole = objective.loss(objective.inputs(drawn)).item()
    one_by_one = [objective.loss(objective.inputs(drawn[row : row + 1])).item() for row in range(4)]
    assert len(set(one_by_one)) == 4
    for cut in (1, 2, 3):
        parts = [drawn[:cut], drawn[cut:]]
        assert [part.count for part in parts] == [cut, 4 - cut]
        assert sum(objective.loss(objective.inputs(part)).item() for part in parts) == pytest.approx(whole, rel=1e-5)
    assert objective.loss(objective.inputs(drawn[1:4][1:2])).item() == pytest.approx(one_by_one[2], rel=1e-5)
    assert whole == pytest.approx(sum(one_by_one), rel=1e-5)


def test_schedule_is_rescaled_before_the_tables_and_only_once():
    alphas = scaled_linear_alphas_cumprod()
    once = rescale_zero_terminal_snr(alphas)
    assert once[-1] == 0
    assert torch.equal(rescale_zero_terminal_snr(once), once)


def test_weights_stay_finite_at_zero_and_at_infinite_snr(tmp_path):
    snr = torch.tensor([0.0, 1e-8, 1.0, 5.0, 1e6])
    for prediction_type in ("epsilon", "v_prediction"):
        weight = diffusion.min_snr_weight(snr, 5.0, prediction_type)
        assert torch.isfinite(weight).all() and (weight <= 1).all()
    with pytest.raises(UserError) as error:
        objective(configuration(tmp_path, debiased_estimation=True, zero_terminal_snr=True))
    assert error.value.field == "debiased_estimation"


def objective(config) -> diffusion.DiffusionObjective:
    return diffusion.DiffusionObjective(config, FakeModel(), encode=FakeModel().encode_prompts)


def test_timestep_limits_are_included(tmp_path):
    run = Run(configuration(tmp_path, min_timestep=10, max_timestep=12))
    (batch, *_) = run.source.micro_batches(0, 0)
    draws = [run.trainer.train_step.objective.draw(batch, generator_for(0, "t", place)) for place in range(50)]
    assert {timestep for drawn in draws for timestep in drawn.timesteps.tolist()} == {10, 11, 12}
    with pytest.raises(UserError) as error:
        objective(configuration(tmp_path, min_timestep=500, max_timestep=100))
    assert error.value.field == "min_timestep"


def test_generators_differ_by_every_part_and_leave_the_global_one_alone():
    before = torch.random.get_rng_state()
    draws = [
        torch.randn(4, generator=generator_for(*parts)).tolist()
        for parts in [(1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0), (1, "a", 0, 0), (1, "a")]
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert torch.equal(before, torch.random.get_rng_state())
    # The very numbers: a later version must draw the same noise, or no run could be resumed or repeated.
    assert generator_for(42, "step", 3, 0).initial_seed() == 9060418193460033200


@given(st.integers(0, 2**63 - 1), st.text())
def test_any_seed_makes_a_generator(seed, part):
    first, second = generator_for(seed, part), generator_for(seed, part)
    assert torch.equal(torch.rand(2, generator=first), torch.rand(2, generator=second))


def test_min_snr_with_zero_terminal_snr_is_said(tmp_path):
    def said(**values):
        config = configuration(tmp_path, zero_terminal_snr=True, **values)
        model = FakeModel(prediction_type="v_prediction")
        return diffusion.DiffusionObjective(config, model, encode=model.encode_prompts).warnings()

    assert "min_snr_gamma is off" in said()[0]
    (warning,) = said(min_snr_gamma=5.0)
    share = float(warning.partition("%")[0].rpartition(" ")[2])
    assert share < 5 and "upper third" in warning
    assert said(min_snr_gamma=None) == []
