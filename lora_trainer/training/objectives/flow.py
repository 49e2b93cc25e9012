"""The loss of flow matching (Lipman et al. 2023; Liu et al. 2023, "rectified flow"; Esser et al. 2024, SD3).

x_σ = (1−σ)·x0 + σ·ε with σ in [0, 1]; the model predicts the velocity ε − x0. Every noise level weighs alike: how often
one is drawn is what decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lora_trainer import plugins
from lora_trainer.config.schema import TrainConfig
from lora_trainer.models.base import Conditioning, FlowSchedule, LentModel
from lora_trainer.training.objectives.diffusion import LOSSES
from lora_trainer.training.objectives.pictures import TIMESTEPS, PictureObjective

_TOKENS, _MU = (256, 4096), (0.5, 1.15)
"""exp-shift's mu, linear in the number of 2×2 patches (Black Forest Labs' and diffusers' values for FLUX.1)."""
_PATCH = 4  # latents in a patch


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """s·σ / (1 + (s−1)·σ): more noise for s > 1 (Esser et al. 2024, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def resolution_mu(tokens: float) -> float:
    """mu of exp-shift, s = e^mu, for so many patches."""
    slope = (_MU[1] - _MU[0]) / (_TOKENS[1] - _TOKENS[0])
    return _MU[0] + slope * (tokens - _TOKENS[0])


def draw_sigmas(sampling: str, shift: float, count: int, tokens: float, generator: torch.Generator) -> Tensor:
    """σ of ``count`` pictures, (B,) fp32 on the CPU. sampling: see the setting sigma_sampling. tokens: patches of each.

    sigmoid and logit_normal are one distribution, σ = 1/(1+e^-n) of a normal n, by two names, kohya's and SD3's.
    """
    if sampling == "uniform":
        return torch.rand(count, generator=generator)
    sigmas = torch.randn(count, generator=generator).sigmoid()
    if sampling == "flux_shift":
        return shifted(sigmas, math.exp(resolution_mu(tokens)))
    return shifted(sigmas, shift) if sampling == "shift" else sigmas


class FlowObjective(PictureObjective):
    """See ``PictureObjective``. min_timestep and max_timestep are thousandths of σ; what is drawn is squeezed between
    them."""

    def __init__(
        self,
        config: TrainConfig,
        model: LentModel,
        encode: Callable[[Sequence[str], slice], Conditioning],
        bare: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        super().__init__(config, model, encode, bare)
        schedule = model.schedule
        assert isinstance(schedule, FlowSchedule), "others have an objective of their own"
        self.sampling = schedule.sampling if config.sigma_sampling == "auto" else config.sigma_sampling
        self._lowest, self._highest = self.min_timestep / TIMESTEPS, (self.max_timestep + 1) / TIMESTEPS

    def draw_levels(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        tokens = latents.shape[-2] * latents.shape[-1] / _PATCH
        sigmas = draw_sigmas(self.sampling, self.config.sigma_shift, len(latents), tokens, generator)
        return self._lowest + (self._highest - self._lowest) * sigmas

    def level_at(self, place: float) -> float:
        return self._lowest + (self._highest - self._lowest) * place

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = timesteps.view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def _level_weights(self, timesteps: Tensor) -> float:
        return 1.0

    def _elementwise(self, difference: Tensor, timesteps: Tensor) -> Tensor:
        if self.config.loss == "mse":
            return difference**2
        error = LOSSES.get(self.config.loss) or plugins.need("loss", self.config.loss, "loss", ["mse", *LOSSES])
        return error(difference, torch.full_like(difference[:, :1, :1, :1], self.config.huber_c))

    def warnings(self) -> list[str]:
        return []
