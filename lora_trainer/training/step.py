"""One optimizer step: draws, loss, gradients, update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer import plugins
from lora_trainer.config.schema import TrainConfig
from lora_trainer.training.ema import ExponentialMovingAverage
from lora_trainer.training.graphs import MicroBatchGraphs
from lora_trainer.training.objectives.base import MicroBatch, Objective, generator_for
from lora_trainer.training.optim import (
    advance_scheduler,
    create_optimizer,
    create_scheduler,
    load_optimizer,
    step_scheduler,
)
from lora_trainer.training.precision import Precision


class TrainingStep:
    """What one step needs, and everything that changes by it.

    adapters: attached to the model; offers ``param_groups(config)``, ``begin_step(step, micro_step)`` and
        ``working_copies(dtype)``.
    total_steps: length of the learning-rate schedule.
    updating: true while the weights are being changed, so that an error then leaves them half changed.
    """

    def __init__(
        self, config: TrainConfig, objective: Objective, adapters: nn.Module, precision: Precision, total_steps: int
    ):
        self.config, self.objective, self.adapters, self.precision = config, objective, adapters, precision
        self.parameters = [parameter for parameter in adapters.parameters() if parameter.requires_grad]
        self.optimizer = create_optimizer(config, adapters.param_groups(config))
        self.scheduler = create_scheduler(config, self.optimizer, total_steps)
        self.regularisers = [
            (plugins.need("regulariser", name, "regularisers"), weight)
            for name, weight in config.regularisers.items()
            if weight
        ]
        self.scaler = precision.create_scaler()
        self.copies = adapters.working_copies(precision.compute_dtype)
        self.ema = ExponentialMovingAverage(self.parameters, config.ema_decay) if config.ema_decay else None
        self.graphs = MicroBatchGraphs(
            self._forward_backward, self.parameters, objective.addresses, precision.device
        )
        if config.cuda_graphs == "off":
            self.graphs.give_up("cuda_graphs is off.")
        elif self.regularisers:
            self.graphs.give_up("there are regularisers.")
        self.updating = False

    def __call__(self, step: int, micro_batches: Sequence[MicroBatch]) -> float | None:
        """Train on ``micro_batches``. The loss of the step is the mean over all their samples, whatever their sizes.

        step: optimizer steps done before. Returns the loss; None when it or the gradient was not finite, and the
        weights were not changed.
        """
        seed = self.config.seed
        drawn = [
            self.objective.draw(micro_batch, generator_for(seed, "step", step, micro_step))
            for micro_step, micro_batch in enumerate(micro_batches)
        ]
        device = self.precision.device
        count = torch.tensor(float(sum(part.count for part in drawn)), device=device)
        total = torch.zeros((), device=device)
        with self.graphs.step(), self.copies.computing():
            for micro_step, part in enumerate(drawn):
                self.adapters.begin_step(step, micro_step)
                total += self.graphs(self.objective.inputs(part), count)
            if self.regularisers:
                penalty = sum(weight * regulariser(self.adapters) for regulariser, weight in self.regularisers)
                (penalty if self.scaler is None else self.scaler.scale(penalty)).backward()
                total += penalty.detach()
            return self._update(total)

    def _forward_backward(self, inputs: Any, count: Tensor) -> Tensor:
        """A micro-batch's share of the step's loss, detached; its gradients are added to the parameters'."""
        # Divided before the backward pass: in fp16 the gradient of a sum could overflow where a mean's does not.
        loss = self.objective.loss(inputs) / count
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.copies.gather()
        return loss.detach()

    def _update(self, total: Tensor) -> float | None:
        self.graphs.finish()
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

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Raises ValueError, KeyError or RuntimeError when the state belongs to other adapters or another optimizer."""
        self.adapters.load_state_dict(state["adapters"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"]) if "ema" in state else self.ema.restart()
        advance_scheduler(self.scheduler, step)
