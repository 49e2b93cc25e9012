"""What objectives on pictures have in common: the batch, the captions, the mask, what is preserved, and the noise.

All random numbers come from private generators on the CPU (``generator_for``), so every device sees the same noise
and nothing that runs in the same process can change it. x0 and ε are the papers' names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_trainer.config.schema import TrainConfig
from lora_trainer.devices import to_device
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning, LentModel

TIMESTEPS = 1000


@dataclass(frozen=True)
class Batch:
    """Pictures of one bucket.

    moments: (B, 2C, h, w) fp32, the VAE's mean and log-variance. captions: the texts that the step trains with.
    conditioning: their encoding, or None when the step encodes them. time_ids: what the model is told of the pictures'
    sizes, (B, …), or None.
    mask: (B, 1, h, w) fp32 in [0, 1] or None. weights: (B,) fp32, of each picture in the loss.
    preserved: (B,) bool, the pictures whose caption does not name what is learned, and for which the base's answer is
    the target; None where there are none in the whole run.
    strength: what the adapters are multiplied with while they learn from it; None for 1.
    """

    moments: Tensor
    captions: tuple[str, ...]
    conditioning: Conditioning | None
    time_ids: Tensor | None
    mask: Tensor | None
    weights: Tensor
    preserved: Tensor | None = None
    strength: float | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, rows: slice) -> Batch:
        """Some of its pictures; the tensors are views."""
        return Batch(
            self.moments[rows],
            self.captions[rows],
            None if self.conditioning is None else self.conditioning[rows],
            None if self.time_ids is None else self.time_ids[rows],
            None if self.mask is None else self.mask[rows],
            self.weights[rows],
            None if self.preserved is None else self.preserved[rows],
            self.strength,
        )

    def to(self, device: torch.device) -> Batch:
        """On ``device``, copied without waiting for it."""
        return Batch(
            to_device(self.moments, device),
            self.captions,
            self.conditioning and self.conditioning.map(lambda tensor: to_device(tensor, device)),
            to_device(self.time_ids, device),
            to_device(self.mask, device),
            to_device(self.weights, device),
            to_device(self.preserved, device),
            self.strength,
        )

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


@dataclass(frozen=True)
class PictureDraws:
    """A micro-batch of pictures with the random numbers of its loss, on the CPU (see ``objectives.base.Drawn``).

    latents: (B, C, h, w) fp32, sampled from the VAE's moments, scaled. noise: (B, C, h, w), what the target is made of.
    perturbed: (B, C, h, w), what is added to the latents; the same as ``noise`` without input_perturbation.
    timesteps: (B,), the noise levels as the model is told of them: int64, or σ as fp32. rows: the pictures of ``batch``
    that are meant; all tensors hold the whole batch.
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

    def __getitem__(self, rows: slice) -> PictureDraws:
        return replace(self, rows=self.rows[rows])


@dataclass(frozen=True)
class PictureInputs:
    """What the loss of a micro-batch reads, on the device: see ``PictureDraws`` and ``Batch``.

    captions: those of the batch and which of them are meant, where the loss encodes them; else None.
    preserved: (B,) bool, the pictures whose target is the base's prediction, and base_pred: (B, C, h, w) fp32, which
    holds it for them; None in runs that preserve nothing. strength: see ``Objective.inputs``.
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
    strength: float | None = None


class PictureObjective(ABC):
    """See ``Objective``.

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
        self.min_timestep, self.max_timestep = config.min_timestep, min(config.max_timestep, TIMESTEPS - 1)
        if self.min_timestep > self.max_timestep:
            raise UserError(
                f"{self.min_timestep} lies above max_timestep ({self.max_timestep}).",
                field="min_timestep",
                remedy="Lower it, or raise max_timestep.",
            )

    # What the kinds differ in -------------------------------------------------------------------------------------

    @abstractmethod
    def draw_levels(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """The noise level of each picture, (B,) on the CPU."""

    @abstractmethod
    def level_at(self, place: float) -> float:
        """The noise level at ``place``, from 0 (min_timestep) to 1 (max_timestep)."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model sees, (B, C, h, w)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model learns to predict, (B, C, h, w)."""

    @abstractmethod
    def _elementwise(self, difference: Tensor, timesteps: Tensor) -> Tensor:
        """The error of each element."""

    @abstractmethod
    def _level_weights(self, timesteps: Tensor) -> Tensor | float:
        """The weight of each picture's noise level, (B,)."""

    @abstractmethod
    def warnings(self) -> list[str]:
        """Settings that are accepted but probably not intended, one sentence each."""

    # What they share ----------------------------------------------------------------------------------------------

    def draw(self, micro_batch: Batch, generator: torch.Generator) -> PictureDraws:
        """Latents, noise and noise levels of a micro-batch, on the CPU."""
        sampling = self.config.latent_sampling == "sample"
        latents = self.model.sample_latents(micro_batch.moments, generator if sampling else None)
        noise = self._draw_noise(latents.shape, generator)
        timesteps = self.draw_levels(latents, generator)
        perturbed = self._perturb(noise, generator)
        return PictureDraws(micro_batch, latents, noise, perturbed, timesteps, range(len(micro_batch)))

    def fixed_draws(self, micro_batch: Batch, place: float, generator: torch.Generator) -> PictureDraws:
        """Latents without sampling, plain noise and one noise level, for a measurement that is to be repeated.

        place: of the level, from 0 (min_timestep) to 1 (max_timestep).
        """
        latents = self.model.sample_latents(micro_batch.moments, None)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.full((len(micro_batch),), self.level_at(place))
        return PictureDraws(micro_batch, latents, noise, noise, timesteps, range(len(micro_batch)))

    def inputs(self, drawn: PictureDraws) -> PictureInputs:
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
        inputs = PictureInputs(
            latents, noise, perturbed, timesteps, conditioning, batch.time_ids, batch.weights, batch.mask, captions,
            strength=batch.strength,
        )  # fmt: skip
        if drawn.batch.preserved is None:
            return inputs
        chosen = drawn.batch.preserved[rows].nonzero().flatten()
        return self._with_base_pred(inputs, batch.preserved, chosen) if len(chosen) else inputs

    def _with_base_pred(self, inputs: PictureInputs, preserved: Tensor | None, chosen: Tensor) -> PictureInputs:
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

    def loss(self, inputs: PictureInputs) -> Tensor:
        """The sum over the pictures, a scalar fp32 with gradients."""
        target, mask = self.target(inputs.latents, inputs.noise, inputs.timesteps), inputs.mask
        model_pred = self.predict(inputs)
        if inputs.preserved is None or inputs.base_pred is None:
            return self._losses(model_pred, target, inputs.timesteps, inputs.weights, mask).sum()
        kept = inputs.preserved.view(-1, 1, 1, 1)
        target = torch.where(kept, inputs.base_pred, target)
        mask = None if mask is None else mask.masked_fill(kept, 1.0)
        return self._losses(model_pred, target, inputs.timesteps, inputs.weights, mask, kept).sum()

    def predict(self, inputs: PictureInputs) -> Tensor:
        """What the model predicts, (B, C, h, w) fp32."""
        noisy_latents = self.add_noise(inputs.latents, inputs.perturbed, inputs.timesteps)
        conditioning = inputs.conditioning if inputs.captions is None else self.encode(*inputs.captions)
        assert conditioning is not None, "inputs have the captions or their encoding"
        return self.model.predict(noisy_latents, inputs.timesteps, conditioning, inputs.time_ids)

    def addresses(self) -> tuple[int, ...]:
        return self.model.addresses()

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
        return loss.mean(dim=(1, 2, 3)) * weights * self._level_weights(timesteps)
