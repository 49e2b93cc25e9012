"""One optimizer step: draws, loss, gradients, update."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_trainer import plugins
from lora_trainer.adapters.copies import WorkingCopies
from lora_trainer.config.schema import TrainConfig
from lora_trainer.errors import UserError
from lora_trainer.out_of_memory import OutOfMemoryError, first_line, is_out_of_memory, release_memory
from lora_trainer.training.compiling import CompiledBlocks, CompilingFailedError
from lora_trainer.training.ema import ExponentialMovingAverage
from lora_trainer.training.gradients import SharedGradients
from lora_trainer.training.graphs import Compute, MicroBatchGraphs
from lora_trainer.training.memory import (
    MemoryMeasures,
    MemoryRecovery,
    move_optimizer_to_cpu,
    on_cpu,
    parameters_on_cpu,
)
from lora_trainer.training.objectives.base import Drawn, MicroBatch, Objective, generator_for
from lora_trainer.training.optim import (
    advance_scheduler,
    create_optimizer,
    create_scheduler,
    load_optimizer,
    step_scheduler,
)
from lora_trainer.training.precision import Precision
from lora_trainer.training.protocols import Resumable
from lora_trainer.training.ranks import ALONE, Ranks

Loss = TypeVar("Loss", float, "float | None")


class TrainingStep:
    """What one step needs, and everything that changes by it.

    adapters: attached to the model; offers ``param_groups(config)``, ``begin_step(step, micro_step)`` and
        ``working_copies(dtype)``.
    total_steps: length of the learning-rate schedule.
    recovery: says what to change when memory is short; without it the step fails.
    ranks: the processes that compute a step together, each some of its micro-batches.
    grad_norm: of the last step, before it was clipped; None where it was not finite. samples: in the last step.
    layout: of the base model's weights, kept with the run where something chooses it.
    updating: true while the weights are being changed, so that an error then leaves them half changed.
    computed: this process has computed a micro-batch before, which takes longest the first time.
    on_first_gradients: called once, with the loss, in the first step whose loss is finite and not 0, before its update.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        adapters: nn.Module,
        precision: Precision,
        total_steps: int,
        recovery: MemoryRecovery | None = None,
        ranks: Ranks = ALONE,
    ):
        self.ranks = ranks
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
        self.ema = ExponentialMovingAverage(self.parameters, config.ema_decay) if config.ema_decay else None
        self.total_steps = total_steps
        self.compiled = CompiledBlocks(
            self._forward_backward, self.parameters, precision.device, precision.compute_dtype
        )
        self.graphs = MicroBatchGraphs(
            self.compiled, self.parameters, objective.addresses, precision.device, self.compiled.is_settled
        )
        accumulation = config.gradient_accumulation_steps
        self.shared = None
        if ranks.size > 1:
            self.shared = SharedGradients(self.parameters, ranks, accumulation, config.exact)
        if config.cuda_graphs == "off":
            self.graphs.give_up("cuda_graphs is off.")
        elif self.shared is not None and self.shared.in_order:
            self.graphs.give_up("each micro-batch's gradients are kept apart.")
        elif config.shard_base or config.given_offload_blocks:
            self.graphs.give_up("the weights move.")
        elif self.regularisers:
            self.graphs.give_up("there are regularisers.")
        self.recovery = recovery
        self.measures = MemoryMeasures() if recovery is None else recovery.measures
        self.layout: Resumable | None = None
        self.updating = self.computed = False
        self.grad_norm: float | None = None
        self.samples = 0
        self.on_first_gradients: Callable[[float], None] | None = None
        self._in_update = False
        self._fits = False  # an update was done with the memory that there is
        self._before: dict[str, Any] | None = None  # what the update in hand changes, until one was seen to fit

    @cached_property
    def copies(self) -> WorkingCopies:
        """Made in the first step, when the adapters are attached and know their joints."""
        return self.adapters.working_copies(self.precision.compute_dtype)

    def __call__(self, step: int, micro_batches: Sequence[MicroBatch]) -> float | None:
        """Train on ``micro_batches``. The loss of the step is the mean over all their samples, whatever their sizes.

        step: optimizer steps done before. Returns the loss; None when it or the gradient was not finite, and the
        weights were not changed.

        Raises:
            OutOfMemoryError: memory is short and no measure is left. The weights are those before the step, unless
                ``updating`` is set.
        """
        seed = self.config.seed
        drawn = [
            self.objective.draw(micro_batch, generator_for(seed, "step", step, micro_step))
            for micro_step, micro_batch in self.ranks.numbered(micro_batches)
        ]
        moved = self.measures.optimizer_on_cpu
        count, samples, all_moved = self.ranks.total(_count(drawn), sum(map(len, drawn)), moved)
        self.samples = int(samples)
        self.compiled.begin_step(self.total_steps - step)
        if 0 < all_moved < self.ranks.size:
            self._move_optimizer_like_others(step)
        if self.shared is None:
            return self._until_it_fits(step, drawn, functools.partial(self._attempt, count))
        return self._together(step, drawn, count, self.shared)

    def try_out(self, micro_batch: MicroBatch, number: int) -> float:
        """The loss of a micro-batch, finite or not; its gradients are added to the parameters'. Nothing is updated.

        number: the random numbers depend on it and on the seed. Raises OutOfMemoryError.
        """
        drawn = [self.objective.draw(micro_batch, generator_for(self.config.seed, "trial", number))]
        return self._until_it_fits(0, drawn, self._gradients)

    def _together(self, step: int, drawn: Sequence[Drawn], count: float, shared: SharedGradients) -> float | None:
        """A step of several processes. Each repeats its own parts for as long as memory is short; what all of them do
        together stands between these."""

        def compute(step: int, drawn: Sequence[Drawn]) -> float:
            shared.begin()
            with self.graphs.step(), self.copies.computing():
                total = self._backward(step, drawn, count, self.graphs, shared)
                self.graphs.finish()
                if not shared.in_order:
                    shared.take(None, total)
                return 0.0

        self._until_it_fits(step, drawn, compute)
        self._reduce(shared)
        return self._until_it_fits(step, drawn, lambda step, drawn: self._update(shared.give()))

    def _reduce(self, shared: SharedGradients) -> None:
        # Never a second time: the others may have what this process had to tell.
        try:
            shared.reduce()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        release_memory()
        raise OutOfMemoryError(reason)

    def _move_optimizer_like_others(self, step: int) -> None:
        """Some process has had to move its optimizer to the CPU, which rounds otherwise: all do, and go on from what
        rank 0 has."""
        self.measures.optimizer_on_cpu = True
        move_optimizer_to_cpu(self.optimizer)
        state = self.ranks.first(lambda: on_cpu(self.state_dict()))
        if not self.ranks.leads:
            self.load_state_dict({**state, "memory": self.measures.state_dict()}, step)

    def _until_it_fits(
        self, step: int, drawn: Sequence[Drawn], compute: Callable[[int, Sequence[Drawn]], Loss]
    ) -> Loss:
        """``compute(step, drawn)``, again with one measure more for as long as memory is short."""
        while True:
            try:
                return compute(step, drawn)
            except CompilingFailedError:
                self.optimizer.zero_grad(set_to_none=True)
                continue
            except Exception as error:  # each library has an exception of its own for memory
                if self.recovery is None or not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # The error is gone here, and with its traceback the activations that it kept alive.
            in_update = self._in_update
            restored = self._undo()
            release_memory()
            if not restored or not self.recovery.take(step + 1, max(map(len, drawn), default=1), in_update):
                raise OutOfMemoryError(reason)
            if self.measures.optimizer_on_cpu:
                move_optimizer_to_cpu(self.optimizer)

    def _attempt(self, count: float, step: int, drawn: Sequence[Drawn]) -> float | None:
        with self.graphs.step(), self.copies.computing():
            total = self._backward(step, drawn, count, self.graphs)
            self.graphs.finish()
            return self._update(total)

    def _gradients(self, step: int, drawn: Sequence[Drawn]) -> float:
        with self.copies.computing():
            return float(self._backward(step, drawn, _count(drawn), self._forward_backward))

    def _backward(
        self,
        step: int,
        drawn: Sequence[Drawn],
        count: float,
        compute: Compute,
        shared: SharedGradients | None = None,
    ) -> Tensor:
        """The loss of what this process computes of a step, detached; its gradients are added up.

        count: the divisor, of the whole step. compute: what does that for a micro-batch. shared: keeps the gradients
        of each micro-batch apart, where they are added in order.
        """
        divisor = torch.full((), float(count), device=self.precision.device)
        losses = [torch.zeros((), device=self.precision.device)] if not drawn else []
        if not drawn and self.scaler is not None:
            self.scaler.scale(losses[0])  # without it a scaler that is new, or was just loaded, has no scale
        for place, (micro_step, micro_batch) in enumerate(self.ranks.numbered(drawn)):
            for part in self.measures.parts(len(micro_batch)):
                self.adapters.begin_step(step, micro_step, part)
                computed = micro_batch if part is None else micro_batch[part.start : part.stop]
                losses.append(compute(self.objective.inputs(computed), divisor))
                if shared is not None and shared.in_order:
                    shared.take(place, losses[-1])
                self.computed = True
                self.ranks.progress()
        if self.regularisers and self.ranks.leads:
            penalty = sum(weight * regulariser(self.adapters) for regulariser, weight in self.regularisers)
            (penalty if self.scaler is None else self.scaler.scale(penalty)).backward()
            losses.append(penalty.detach())
            if shared is not None and shared.in_order:
                shared.take(None, losses[-1])
        return functools.reduce(torch.add, losses)

    def _forward_backward(self, inputs: Any, count: Tensor) -> Tensor:
        """A micro-batch's share of the step's loss, detached; its gradients are added to the parameters'."""
        strength = getattr(inputs, "strength", None)
        with nullcontext() if strength is None else self.adapters.multiplied(strength):
            return self._add_gradients(inputs, count)

    def _add_gradients(self, inputs: Any, count: Tensor) -> Tensor:
        # Divided before the backward pass: in fp16 the gradient of a sum could overflow where a mean's does not.
        loss = self.objective.loss(inputs) / count
        if not loss.requires_grad:
            raise UserError(
                "The loss depends on no layer that learns.", field="target_modules", remedy="Choose other layers."
            )
        try:
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        except BaseException:
            self.copies.forget()  # or the next backward pass would add to what is half done
            raise
        self.copies.gather()
        return loss.detach()

    def _update(self, total: Tensor) -> float | None:
        self._in_update = True
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        loss, norm = torch.stack([total, norm]).tolist()  # the one place where the CPU waits for the GPU
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.grad_norm = norm if math.isfinite(norm) else None
        if finite and loss and self.on_first_gradients is not None:
            self.on_first_gradients(loss)
            self.on_first_gradients = None
        self._before = None if self._fits or self.recovery is None else self._snapshot()
        self.updating = True
        if finite:
            self._step_optimizer()
            if self.config.scale_weight_norms:
                self.adapters.limit_norms(self.config.scale_weight_norms)
            if self.ema is not None:
                self.ema.update()
        if self.scaler is not None:
            self.scaler.update()
        step_scheduler(self.scheduler)
        self.optimizer.zero_grad(set_to_none=True)
        self.updating = self._in_update = False
        self._before, self._fits = None, self._fits or finite
        return loss if finite else None

    def _step_optimizer(self) -> None:
        # GradScaler.step would only look again whether all gradients are finite.
        if self.measures.optimizer_on_cpu:
            with parameters_on_cpu(self.parameters):
                self.optimizer.step()
        else:
            self.optimizer.step()

    def _snapshot(self) -> dict[str, Any]:
        """What an update changes, copied to the CPU."""
        state = {name: part for name, part in self.state_dict().items() if name != "adapters"}
        return on_cpu({**state, "parameters": self.parameters})

    def _undo(self) -> bool:
        """Put back what it was before a step that failed. False when the weights are half changed."""
        self._save_memory()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None and self._in_update:
            self.scaler.update(self.scaler.get_scale())  # forgets that the gradients were unscaled
        self._in_update = False
        self._fits = False
        if not self.updating:
            return True
        if self._before is None:
            return False
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self._before["parameters"]):
                parameter.copy_(value)
        self.optimizer.load_state_dict(self._before["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(self._before["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(self._before["ema"])
        self.updating, self._before = False, None
        return True

    def _save_memory(self) -> None:
        """Nothing that is faster and takes more memory for the rest of the run."""
        if self.graphs.enabled:
            self.graphs.give_up("memory is short.")
        if self.compiled.enabled:
            self.compiled.leave("torch.compile is not used: memory is short.")

    @property
    def bytes(self) -> int:
        """About what a state takes: the parameters, what most optimizers keep of each, and the average."""
        return 4 * (4 if self.ema is not None else 3) * sum(parameter.numel() for parameter in self.parameters)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the adapters hold what is to be saved: their moving average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.applied()

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that steps change. The schedule is a function of the step, so the step is its state."""
        parts = {
            "adapters": self.adapters,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "ema": self.ema,
            "memory": self.measures,
            "layout": self.layout,
        }
        return {name: dict(part.state_dict()) for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Raises ValueError, KeyError or RuntimeError when the state belongs to other adapters or another optimizer."""
        self.adapters.load_state_dict(state["adapters"])
        self.measures.load_state_dict(state.get("memory", {}))
        if self.layout is not None and "layout" in state:
            self.layout.load_state_dict(state["layout"])
        if self.measures != MemoryMeasures():
            self._save_memory()
        with parameters_on_cpu(self.parameters) if self.measures.optimizer_on_cpu else nullcontext():
            load_optimizer(self.optimizer, state["optimizer"])
        if self.measures.optimizer_on_cpu:
            move_optimizer_to_cpu(self.optimizer)
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"]) if "ema" in state else self.ema.restart()
        advance_scheduler(self.scheduler, step)


def _count(drawn: Sequence[Drawn]) -> float:
    return float(sum(part.count for part in drawn))
