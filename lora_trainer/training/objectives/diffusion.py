"""The loss of diffusion models that predict ε or v.

All random numbers come from private generators on the CPU (``generator_for``), so every device sees the same noise
and nothing that runs in the same process can change it. x0, ε, v, ᾱ and SNR are the papers' names:
x_t = √ᾱ·x0 + √(1−ᾱ)·ε (Ho et al. 2020, eq. 4), v = √ᾱ·ε − √(1−ᾱ)·x0 (Salimans & Ho 2022, app. D),
SNR = ᾱ / (1−ᾱ) (Kingma et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_trainer import plugins
from lora_trainer.config.schema import TrainConfig
from lora_trainer.devices import to_device
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning, LentModel
from lora_trainer.models.schedule import rescale_zero_terminal_snr
from lora_trainer.training.inputs import Batch

# ---- noise ----------------------------------------------------------------------------------------------------


def offset_noise(noise: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """ε + strength·N(0, 1) per picture and channel, (B, C, H, W) (Guttenberg 2023, "Diffusion with offset noise")."""
    return noise + strength * torch.randn(*noise.shape[:2], 1, 1, generator=generator)


def multires_noise(noise: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """ε plus coarser noise, each scale 2–4 times the last, scaled back to unit variance.

    (B, C, H, W). Whitaker 2023, "Multi-resolution noise for diffusion model training"; kohya's ``pyramid_noise_like``.
    """
    height, width = noise.shape[-2:]
    total = noise
    for level in range(iterations):
        ratio = (2 + 2 * torch.rand((), generator=generator).item()) ** level
        h, w = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = torch.randn(*noise.shape[:2], h, w, generator=generator)
        total = total + discount**level * F.interpolate(coarse, size=(height, width), mode="bilinear")
        if h == 1 or w == 1:
            break
    return total / total.std()


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


_LOSSES = {"huber": huber, "smooth_l1": smooth_l1}


@dataclass(frozen=True)
class DiffusionDraws:
    """A micro-batch of pictures with the random numbers of its loss, on the CPU (see ``objectives.base.Drawn``).

    latents: (B, C, h, w) fp32, sampled from the VAE's moments, scaled. noise: (B, C, h, w), what the target is made of.
    perturbed: (B, C, h, w), what is added to the latents; the same as ``noise`` without input_perturbation.
    timesteps: (B,) int64. rows: the pictures of ``batch`` that are meant; all tensors hold the whole batch.
    """

    batch: Batch
    latents: Tensor
    noise: Tensor
    perturbed: Tensor
    timesteps: Tensor
    rows: range

    @property
    def count(self) -> int:
        return len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> DiffusionDraws:
        return replace(self, rows=self.rows[rows])


@dataclass(frozen=True)
class DiffusionInputs:
    """What the loss of a micro-batch reads, on the device: see ``DiffusionDraws`` and ``Batch``.

    captions: those of the batch and which of them are meant, where the loss encodes them; else None.
    preserved: (B,) bool, the pictures whose target is the base's prediction, and base_pred: (B, C, h, w) fp32, which
    holds it for them; None in runs that preserve nothing.
    """

    latents: Tensor
    noise: Tensor
    perturbed: Tensor
    timesteps: Tensor
    conditioning: Conditioning | None
    time_ids: Tensor | None
    weights: Tensor
    mask: Tensor | None
    captions: tuple[Sequence[str], slice] | None
    preserved: Tensor | None = None
    base_pred: Tensor | None = None


class DiffusionObjective:
    """The objective of a diffusion model. Its tables live on the model's device, (T,) fp32 each.

    encode: captions and which rows of them are needed -> their encoding, for micro-batches that come without one.
    bare: inside, the model is the base: without its adapters.

    Raises:
        UserError: settings that cannot be combined.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: LentModel,
        encode: Callable[[Sequence[str], slice], Conditioning],
        bare: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.config, self.model, self.encode, self.bare = config, model, encode, bare
        schedule = model.schedule
        self.prediction_type = schedule.prediction_type
        self.min_timestep, self.max_timestep = config.min_timestep, min(config.max_timestep, len(schedule) - 1)
        if self.min_timestep > self.max_timestep:
            raise UserError(
                f"{self.min_timestep} lies above max_timestep ({self.max_timestep}).",
                field="min_timestep",
                remedy="Lower it, or raise max_timestep.",
            )
        # Before any table is made: every one of them depends on it.
        alphas_cumprod = schedule.alphas_cumprod
        zero_terminal_snr = config.zero_terminal_snr
        if zero_terminal_snr is None:
            zero_terminal_snr = model.info.zero_terminal_snr
        if zero_terminal_snr:  # does not change a schedule that ends at 0 already
            alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod)
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

    def draw(self, micro_batch: Batch, generator: torch.Generator) -> DiffusionDraws:
        """Latents, noise and timesteps of a micro-batch, on the CPU."""
        sampling = self.config.latent_sampling == "sample"
        latents = self.model.sample_latents(micro_batch.moments, generator if sampling else None)
        noise = self._draw_noise(latents.shape, generator)
        timesteps = torch.randint(self.min_timestep, self.max_timestep + 1, (len(micro_batch),), generator=generator)
        perturbed = self._perturb(noise, generator)
        return DiffusionDraws(micro_batch, latents, noise, perturbed, timesteps, range(len(micro_batch)))

    def fixed_draws(self, micro_batch: Batch, place: float, generator: torch.Generator) -> DiffusionDraws:
        """Latents without sampling, plain noise and one timestep, for a measurement that is to be repeated.

        place: of the timestep, from 0 (min_timestep) to 1 (max_timestep).
        """
        latents = self.model.sample_latents(micro_batch.moments, None)
        noise = torch.randn(latents.shape, generator=generator)
        timestep = round(self.min_timestep + place * (self.max_timestep - self.min_timestep))
        timesteps = torch.full((len(micro_batch),), timestep)
        return DiffusionDraws(micro_batch, latents, noise, noise, timesteps, range(len(micro_batch)))

    def inputs(self, drawn: DiffusionDraws) -> DiffusionInputs:
        """The pictures of ``drawn`` on the device. Captions that came without an encoding are encoded, unless the text
        encoders learn, which makes their encoding a part of the loss."""
        rows = slice(drawn.rows.start, drawn.rows.stop)
        batch = drawn.batch[rows].to(self.model.device)
        draws = (drawn.latents, drawn.noise, drawn.perturbed, drawn.timesteps)
        latents, noise, perturbed, timesteps = (to_device(values[rows], self.model.device) for values in draws)
        conditioning, captions = batch.conditioning, None
        if conditioning is None and self.config.train_text_encoder:
            captions = (drawn.batch.captions, rows)
        elif conditioning is None:
            with torch.no_grad():
                conditioning = self.encode(drawn.batch.captions, rows)
        inputs = DiffusionInputs(
            latents, noise, perturbed, timesteps, conditioning, batch.time_ids, batch.weights, batch.mask, captions
        )
        if drawn.batch.preserved is None:
            return inputs
        chosen = drawn.batch.preserved[rows].nonzero().flatten()
        return self._with_base_pred(inputs, batch.preserved, chosen) if len(chosen) else inputs

    def _with_base_pred(self, inputs: DiffusionInputs, preserved: Tensor | None, chosen: Tensor) -> DiffusionInputs:
        """The same with what the base predicts for the ``chosen`` rows, (n,) on the CPU."""
        rows = to_device(chosen, self.model.device)
        picked = {name: value[rows] for name, value in vars(inputs).items() if isinstance(value, Tensor)}
        conditioning = inputs.conditioning and inputs.conditioning.map(lambda tensor: tensor[rows])
        captions = None
        if inputs.captions is not None:
            # All captions, so that these are filled up to the length that they have beside the others.
            texts, of_batch = inputs.captions
            captions = ([*(texts[of_batch][row] for row in chosen.tolist()), *texts], slice(0, len(chosen)))
        with torch.no_grad(), self.bare():
            prediction = self.predict(replace(inputs, **picked, conditioning=conditioning, captions=captions))
        base_pred = torch.zeros_like(inputs.latents).index_copy_(0, rows, prediction)
        return replace(inputs, preserved=preserved, base_pred=base_pred)

    def loss(self, inputs: DiffusionInputs) -> Tensor:
        """The sum over the pictures, a scalar fp32 with gradients."""
        target, mask = self._target(inputs.latents, inputs.noise, inputs.timesteps), inputs.mask
        model_pred = self.predict(inputs)
        if inputs.preserved is None or inputs.base_pred is None:
            return self._losses(model_pred, target, inputs.timesteps, inputs.weights, mask).sum()
        kept = inputs.preserved.view(-1, 1, 1, 1)
        target = torch.where(kept, inputs.base_pred, target)
        mask = None if mask is None else mask.masked_fill(kept, 1.0)
        return self._losses(model_pred, target, inputs.timesteps, inputs.weights, mask, kept).sum()

    def predict(self, inputs: DiffusionInputs) -> Tensor:
        """ε or v, as the model predicts it, (B, C, h, w) fp32."""
        noisy_latents = self._add_noise(inputs.latents, inputs.perturbed, inputs.timesteps)
        conditioning = inputs.conditioning if inputs.captions is None else self.encode(*inputs.captions)
        assert conditioning is not None, "inputs have the captions or their encoding"
        return self.model.predict(noisy_latents, inputs.timesteps, conditioning, inputs.time_ids)

    def addresses(self) -> tuple[int, ...]:
        return self.model.addresses()

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

    def _draw_noise(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """ε, (B, C, h, w) fp32 on the CPU."""
        noise = torch.randn(shape, generator=generator)
        if self.config.noise_offset:
            noise = offset_noise(noise, self.config.noise_offset, generator)
        if self.config.multires_noise_iterations:
            iterations, discount = self.config.multires_noise_iterations, self.config.multires_noise_discount
            noise = multires_noise(noise, iterations, discount, generator)
        return noise

    def _perturb(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        """The noise that the model sees; the target keeps ε (Ning et al. 2023, "Input perturbation", alg. 1)."""
        if not self.config.input_perturbation:
            return noise
        return noise + self.config.input_perturbation * torch.randn(noise.shape, generator=generator)

    def _add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ·x0 + √(1−ᾱ)·ε, (B, C, h, w)."""
        return self._signal[timesteps].view(-1, 1, 1, 1) * latents + self._noise[timesteps].view(-1, 1, 1, 1) * noise

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model learns to predict: ε, or v = √ᾱ·ε − √(1−ᾱ)·x0, (B, C, h, w)."""
        if self.prediction_type == "v_prediction":
            signal, sigma = self._signal[timesteps].view(-1, 1, 1, 1), self._noise[timesteps].view(-1, 1, 1, 1)
            return signal * noise - sigma * latents
        return noise

    def _losses(
        self,
        model_pred: Tensor,
        target: Tensor,
        timesteps: Tensor,
        weights: Tensor,
        mask: Tensor | None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The loss of each picture, (B,).

        Order: element-wise error in fp32 -> × mask (B, 1, h, w) -> mean over C, h, w -> × weight of the sample (B,)
        -> × weight of the timestep. kept: (B, 1, 1, 1) bool, where the error is the square whatever the loss is.
        """
        difference = model_pred.float() - target.float()
        loss = self._elementwise(difference, timesteps)
        if kept is not None:
            loss = torch.where(kept, difference**2, loss)
        if mask is not None:
            loss = loss * mask
        return loss.mean(dim=(1, 2, 3)) * weights * self._weight[timesteps]

    def _elementwise(self, difference: Tensor, timesteps: Tensor) -> Tensor:
        if self.config.loss == "mse":
            return difference**2
        error = _LOSSES.get(self.config.loss) or plugins.need("loss", self.config.loss, "loss", ["mse", *_LOSSES])
        return error(difference, self._huber_c[timesteps].view(-1, 1, 1, 1))
