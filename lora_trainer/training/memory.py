"""What a run changes when memory is short, instead of ending."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.adapters.masks import MicroBatchPart


@dataclass
class MemoryMeasures:
    """Measures against too little memory. Each one stays for the rest of the run; none changes what is learned.

    part_size: so many samples of a micro-batch are computed at once at the most; None: all of them.
    """

    part_size: int | None = None
    gradient_checkpointing: bool = False
    optimizer_on_cpu: bool = False

    def parts(self, size: int) -> Iterator[MicroBatchPart | None]:
        """The parts in which a micro-batch of ``size`` samples is computed; None stands for the whole."""
        if self.part_size is None or size <= self.part_size:
            yield None
            return
        for start in range(0, size, self.part_size):
            yield MicroBatchPart(start, min(start + self.part_size, size))

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        said = [f"at most {self.part_size} samples at once"] if self.part_size else []
        said += ["gradient checkpointing"] if self.gradient_checkpointing else []
        said += ["the optimizer's state in main memory"] if self.optimizer_on_cpu else []
        return ", ".join(said)


class MemoryRecovery:
    """Takes one measure after another when memory is short, and says so.

    may_move_optimizer: whether the optimizer can compute on the CPU.
    checkpointing: the share of the model's parts that the settings say. set_gradient_checkpointing: sets that of the
    model. make_room: see ``Lender.make_room``.
    """

    def __init__(
        self,
        measures: MemoryMeasures,
        *,
        checkpointing: float,
        may_move_optimizer: bool,
        set_gradient_checkpointing: Callable[[float], None],
        make_room: Callable[[], None],
        on_warning: Callable[[str], None],
    ):
        self.measures = measures
        self._checkpointing, self._may_move_optimizer = checkpointing, may_move_optimizer
        self._set_gradient_checkpointing = set_gradient_checkpointing
        self._make_room, self._on_warning = make_room, on_warning
        self._made_room = False

    def apply(self, resumed: bool = False) -> None:
        """Begin with what the settings say and what was found before. resumed: in an interrupted run, by its state."""
        measures = self.measures
        self._set_gradient_checkpointing(1 if measures.gradient_checkpointing else self._checkpointing)
        if resumed and (said := str(measures)):
            self._on_warning(f"Memory was short before, so this run continues with {said}.")

    def begin_again(self) -> None:
        """What is encoded next may fill the memory that was freed: it can be freed once more."""
        self._made_room = False

    def take(self, step: int, largest: int, in_update: bool) -> bool:
        """Take the next measure. False when none is left.

        step: the one that failed, counted from 1. largest: samples of its largest micro-batch.
        in_update: it failed after its gradients were there, where only the optimizer's memory matters.
        """
        measures = self.measures
        if not self._made_room:
            self._made_room = True
            self._make_room()
            self._on_warning(f"Out of memory in step {step}: unused memory was freed, and the step is repeated.")
            return True
        at_once = min(largest, measures.part_size or largest)
        if at_once > 1 and not in_update:
            measures.part_size = (at_once + 1) // 2
            self._on_warning(
                f"Out of memory in step {step}: from now on at most {measures.part_size} of a batch are computed at"
                " once. The batch size of a step stays the same."
            )
            return True
        if not (self._checkpointing == 1 or measures.gradient_checkpointing or in_update):
            measures.gradient_checkpointing = True
            self._set_gradient_checkpointing(1)
            self._on_warning(f"Out of memory in step {step}: gradient checkpointing is on for the rest of the run.")
            return True
        if self._may_move_optimizer and not measures.optimizer_on_cpu:
            measures.optimizer_on_cpu = True
            self._on_warning(
                f"Out of memory in step {step}: the optimizer works on the CPU for the rest of the run, with its state"
                " in main memory."
            )
            return True
        return False


@contextmanager
def parameters_on_cpu(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters and their gradients are on the CPU, so that what an optimizer makes for them is as well.

    Afterwards the parameters have their own memory on their device again, with their new values, and no gradients.
    """
    homes = [parameter.data for parameter in parameters]
    try:
        for parameter, home in zip(parameters, homes):
            grad, parameter.grad = parameter.grad, None
            parameter.data = home.cpu()
            parameter.grad = None if grad is None else grad.cpu()
        yield
    finally:
        for parameter, home in zip(parameters, homes):
            new, parameter.grad = parameter.data, None
            parameter.data = home
            if new is not home:
                with torch.no_grad():
                    parameter.copy_(new)


def move_optimizer_to_cpu(optimizer: torch.optim.Optimizer) -> None:
    """Move the state that there is to the CPU. Kernels for one device only are switched off."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.cpu()
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = False


def on_cpu(value: Any) -> Any:
    """A copy of nested mappings and lists with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(item) for item in value)
    return value
