"""The loss of diffusion models that predict ε or v.

x0, ε, v, ᾱ and SNR are the papers' names: x_t = √ᾱ·x0 + √(1−ᾱ)·ε (Ho et al. 2020, eq. 4), v = √ᾱ·ε − √(1−ᾱ)·x0
(Salimans & Ho 2022, app. D), SNR = ᾱ / (1−ᾱ) (Kingma et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from lora_trainer import plugins
from lora_trainer.config.schema import TrainConfig
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning, LentModel, NoiseSchedule
from lora_trainer.models.schedule import rescale_zero_terminal_snr
from lora_trainer.training.objectives.pictures import PictureObjective

# ---- weights of timesteps -------------------------------------------------------------------------------------


def signal_to_noise(alphas_cumprod: Tensor) -> Tensor:
    """SNR = ᾱ / (1−ᾱ) per timestep, (T,)."""
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v, (T,) (Hang et al. 2023, "Min-SNR", §3.4)."""
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return gamma / snr.clamp(min=gamma)  # the same as min(SNR, γ)/SNR, and 1 where SNR = 0


def debiased_weight(snr: Tensor, prediction_type: str) -> Tensor:
    """1/√SNR for ε (Yu et al. 2023, "Debias the training of diffusion models"); 1/(SNR + 1) for v, as kohya. (T,).

    SNR is capped at 1000, as kohya does.
    """
    snr = snr.clamp(max=1000)
    return 1 / (snr + 1) if prediction_type == "v_prediction" else snr.rsqrt()


# ---- element-wise errors --------------------------------------------------------------------------------------


def huber_threshold(alphas_cumprod: Tensor, c: float) -> Tensor:
    """c_t = (1−c)/(1+σ)² + c with σ = √((1−ᾱ)/ᾱ), (T,): kohya's "snr" schedule (Khrapov et al. 2024, §4)."""
    sigma = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    return (1 - c) / (1 + sigma) ** 2 + c


def huber(difference: Tensor, c: Tensor) -> Tensor:
    """2c·(√(d² + c²) − c): pseudo-Huber, the square for small d, straight beyond c."""
    return 2 * c * ((difference**2 + c**2).sqrt() - c)


def smooth_l1(difference: Tensor, c: Tensor) -> Tensor:
    """2·(√(d² + c²) − c): pseudo-Huber divided by c."""
    return 2 * ((difference**2 + c**2).sqrt() - c)


LOSSES = {"huber": huber, "smooth_l1": smooth_l1}


def trained_schedule(config: TrainConfig, schedule: NoiseSchedule, ends_in_noise: bool) -> NoiseSchedule:
    """The schedule, which ends in pure noise where the settings, or else ``ends_in_noise``, say so."""
    if not (ends_in_noise if config.zero_terminal_snr is None else config.zero_terminal_snr):
        return schedule
    # Does not change a schedule that ends at 0 already.
    return replace(schedule, alphas_cumprod=rescale_zero_terminal_snr(schedule.alphas_cumprod))


class DiffusionObjective(PictureObjective):
    """See ``PictureObjective``. Its tables live on the model's device, (T,) fp32 each."""

    def __init__(
        self,
        config: TrainConfig,
        model: LentModel,
        encode: Callable[[Sequence[str], slice], Conditioning],
        bare: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        super().__init__(config, model, encode, bare)
        schedule = model.schedule
        assert isinstance(schedule, NoiseSchedule), "flow models have an objective of their own"
        self.prediction_type = schedule.prediction_type
        # Before any table is made: every one of them depends on it.
        alphas_cumprod = trained_schedule(config, schedule, model.info.zero_terminal_snr).alphas_cumprod
        if config.debiased_estimation and self.prediction_type == "epsilon" and alphas_cumprod[-1] == 0:
            raise UserError(
                "the last noise level would get an infinite weight under zero terminal SNR.",
                field="debiased_estimation",
                remedy="Switch one of the two off; zero_terminal_snr is for v-prediction models.",
            )
        device = model.device
        self.alphas_cumprod = alphas_cumprod.double()
        self._signal = self.alphas_cumprod.sqrt().float().to(device)
        self._noise = (1 - self.alphas_cumprod).sqrt().float().to(device)
        self._weight = self._timestep_weights().float().to(device)
        self._huber_c = huber_threshold(self.alphas_cumprod, config.huber_c).float().to(device)

    def draw_levels(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(self.min_timestep, self.max_timestep + 1, (len(latents),), generator=generator)

    def level_at(self, place: float) -> int:
        return round(self.min_timestep + place * (self.max_timestep - self.min_timestep))

    def _level_weights(self, timesteps: Tensor) -> Tensor:
        return self._weight[timesteps]

    def warnings(self) -> list[str]:
        if not self._ends_in_noise:
            return []
        if self.prediction_type == "epsilon":
            return ["zero_terminal_snr is meant for v-prediction models; this one predicts noise."]
        if self.config.min_snr_gamma == "auto" and not self.config.debiased_estimation:
            return [
                "min_snr_gamma is off: this model predicts v with zero terminal SNR, where it would leave the high "
                "noise levels next to no weight. Set min_snr_gamma: 5 to use it all the same."
            ]
        if isinstance(self.config.min_snr_gamma, float):
            share = float(self._weight[len(self._weight) * 2 // 3 :].sum() / self._weight.sum())
            return [
                f"min_snr_gamma: {self.config.min_snr_gamma:g} leaves the upper third of the noise levels {share:.1%} "
                "of the weight, because this model predicts v with zero terminal SNR. Leave it out to switch it off."
            ]
        return []

    def _timestep_weights(self) -> Tensor:
        snr = signal_to_noise(self.alphas_cumprod)
        if self.config.debiased_estimation:
            return debiased_weight(snr, self.prediction_type)
        gamma = self.config.snr_gamma(self.prediction_type, self._ends_in_noise)
        return torch.ones_like(snr) if gamma is None else min_snr_weight(snr, gamma, self.prediction_type)

    @property
    def _ends_in_noise(self) -> bool:
        return bool(self.alphas_cumprod[-1] == 0)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ·x0 + √(1−ᾱ)·ε, (B, C, h, w)."""
        return self._signal[timesteps].view(-1, 1, 1, 1) * latents + self._noise[timesteps].view(-1, 1, 1, 1) * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model learns to predict: ε, or v = √ᾱ·ε − √(1−ᾱ)·x0, (B, C, h, w)."""
        if self.prediction_type == "v_prediction":
            signal, sigma = self._signal[timesteps].view(-1, 1, 1, 1), self._noise[timesteps].view(-1, 1, 1, 1)
            return signal * noise - sigma * latents
        return noise

    def _elementwise(self, difference: Tensor, timesteps: Tensor) -> Tensor:
        if self.config.loss == "mse":
            return difference**2
        error = LOSSES.get(self.config.loss) or plugins.need("loss", self.config.loss, "loss", ["mse", *LOSSES])
        return error(difference, self._huber_c[timesteps].view(-1, 1, 1, 1))
