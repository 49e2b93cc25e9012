"""One optimizer step: noise, prediction, loss, gradients, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.config.schema import TrainConfig
from lora_trainer.devices import to_device
from lora_trainer.models.base import LentModel, Prompts
from lora_trainer.training.ema import ExponentialMovingAverage
from lora_trainer.training.inputs import Batch, BatchSource
from lora_trainer.training.objectives.diffusion import Objective, generator_for
from lora_trainer.training.optim import (
    advance_scheduler,
    create_optimizer,
    create_scheduler,
    load_optimizer,
    step_scheduler,
)


class TrainingStep:
    """What one step needs, and everything that changes by it.

    adapters: attached to ``model``; offers ``param_groups(config)`` and ``begin_step(step, micro_step)``.
    updating: true while the weights are being changed, so that an error then leaves them half changed.
    """

    def __init__(self, config: TrainConfig, model: LentModel, adapters: nn.Module, source: BatchSource):
        self.config, self.model, self.adapters, self.source = config, model, adapters, source
        self.device, self.precision = model.device, source.precision
        zero_terminal_snr = config.zero_terminal_snr
        if zero_terminal_snr is None:
            zero_terminal_snr = model.info.zero_terminal_snr
        self.objective = Objective(config, model.schedule, self.device, zero_terminal_snr)
        self.parameters = [parameter for parameter in adapters.parameters() if parameter.requires_grad]
        self.optimizer = create_optimizer(config, adapters.param_groups(config))
        self.scheduler = create_scheduler(config, self.optimizer, source.total_steps)
        self.scaler = self.precision.create_scaler()
        self.ema = ExponentialMovingAverage(self.parameters, config.ema_decay) if config.ema_decay else None
        self.updating = False

    def __call__(self, step: int, batches: Sequence[Batch]) -> float | None:
        """Train on ``batches``, whose gradients are averaged. ``step``: how many were made before.

        Returns the mean loss; None when it or the gradient was not finite, and the weights were left alone.
        """
        total = torch.zeros((), device=self.device)
        for micro_step, batch in enumerate(batches):
            self.adapters.begin_step(step, micro_step)
            generator = generator_for(self.config.seed, "step", step, micro_step)
            loss = self.loss(batch.to(self.device), generator) / len(batches)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total += loss.detach()
        return self._update(total)

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The loss of one batch, a scalar with gradients. All that is random comes from ``generator``."""
        sampling = self.config.latent_sampling == "sample"
        latents = self.model.sample_latents(batch.moments, generator if sampling else None)  # (B, 4, h, w)
        noise = self.objective.draw_noise(latents.shape, generator)
        timesteps = self.objective.draw_timesteps(len(batch), generator)  # (B,)
        perturbed = self.objective.perturb(noise, generator)
        noise, perturbed, timesteps = (to_device(drawn, self.device) for drawn in (noise, perturbed, timesteps))

        noisy_latents = self.objective.add_noise(latents, perturbed, timesteps)
        target = self.objective.target(latents, noise, timesteps)
        prompts = self._prompts(batch)
        with self.precision.autocast():
            model_pred = self.model.predict(noisy_latents, timesteps, prompts, batch.size_ids)
        return self.objective.loss(model_pred, target, timesteps, batch.weights, batch.mask)

    def _prompts(self, batch: Batch) -> Prompts:
        if batch.prompts is not None:
            return batch.prompts
        with torch.set_grad_enabled(self.config.train_text_encoder):
            return self.source.encode_prompts(batch.captions)

    def _update(self, total: Tensor) -> float | None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        loss, norm = torch.stack([total, norm]).tolist()  # the one place where the CPU waits for the GPU
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.updating = True
        if finite:
            self.optimizer.step() if self.scaler is None else self.scaler.step(self.optimizer)
            if self.ema is not None:
                self.ema.update()
        if self.scaler is not None:
            self.scaler.update()
        step_scheduler(self.scheduler)
        self.optimizer.zero_grad(set_to_none=True)
        self.updating = False
        return loss if finite else None

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the adapters hold what is to be saved: their moving average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.applied()

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that steps change. The schedule is a function of the step, so the step is its state."""
        parts = {"adapters": self.adapters, "optimizer": self.optimizer, "scaler": self.scaler, "ema": self.ema}
        return {name: dict(part.state_dict()) for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Raises ValueError, KeyError or RuntimeError when the state belongs to other adapters or another optimizer."""
        self.adapters.load_state_dict(state["adapters"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"]) if "ema" in state else self.ema.restart()
        advance_scheduler(self.scheduler, step)
