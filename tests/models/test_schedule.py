from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.schedule import rescale_zero_terminal_snr, scaled_linear_alphas_cumprod


def diffusers_schedule(**options):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)
    return scheduler.alphas_cumprod


def test_the_schedule_is_stable_diffusions():
    ours = scaled_linear_alphas_cumprod()
    assert ours.shape == (1000,) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, diffusers_schedule(), atol=1e-6, rtol=1e-4)
    assert ours[0].item() == pytest.approx(1 - 0.00085, abs=1e-7)


def test_zero_terminal_snr():
    ours = rescale_zero_terminal_snr(scaled_linear_alphas_cumprod())
    theirs = diffusers_schedule(rescale_betas_zero_snr=True)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)
    assert ours[-1] == 0 and (ours.diff() < 0).all()
    assert ours[0] == scaled_linear_alphas_cumprod()[0]


def test_the_model_carries_the_schedule_that_its_file_asks_for(checkpoints):
    with FileLender(checkpoints["sd1"]).borrow() as model:
        assert len(model.schedule) == 1000
        assert torch.equal(model.schedule.alphas_cumprod, scaled_linear_alphas_cumprod())
    with FileLender(checkpoints["sd1"], v_prediction=True, zero_terminal_snr=True).borrow() as model:
        assert model.schedule.alphas_cumprod[-1] == 0
        assert model.schedule.prediction_type == model.info.prediction_type == "v_prediction"
        assert model.info.zero_terminal_snr
