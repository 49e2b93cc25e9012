"""One batch forward and backward, before anything is encoded for long: what cannot work fails here, in seconds.

Nothing of it stays in the result: no weight, no state of the optimizer and no random state changes. What it encodes is
found in the cache again, and a measure against too little memory that it takes is one that the steps need as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lora_trainer import plugins
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.findings import enumerate_some
from lora_trainer.errors import UserError
from lora_trainer.out_of_memory import OutOfMemoryError, first_line
from lora_trainer.training.loop import Trainer
from lora_trainer.training.precision import other_precision

ATTEMPTS = 2
"""Batches that are tried until one has a finite loss: a single one without may be left out of a training."""
_NAMED = 3


def try_one_step(trainer: Trainer, adapters: AdapterSet) -> bool:
    """Try the largest batch of the first epoch with the adapters attached. A run that is resumed has done its steps
    before, so nothing is tried.

    Where nothing is left to encode, to draw or to measure, the first step comes as soon as a trial would: its gradients
    are judged instead, unless a plug-in takes part, whose errors are told here. Returns False when it was stopped.

    Raises:
        UserError: memory does not suffice, no loss is finite, nothing gets a gradient, or a plug-in fails.
    """
    if resumes(trainer):
        return True
    if not (trainer.source.worth_trying() or _begins_with_the_base(trainer) or _plugins_used(trainer.config)):
        trainer.train_step.on_first_gradients = lambda loss: _judge_gradients(
            trainer, adapters, loss, without_gradient(adapters)
        )
        return True
    trainer.callbacks.on_phase("trying", 0, 0)
    trainer.recovery.apply()
    adapters.train()
    losses: list[float] = []
    silent: list[str] = []
    for number in range(ATTEMPTS):
        with trainer.ranks.working():
            micro_batch = trainer.source.trial_batch(number, trainer.turn, trainer.commands)
        if micro_batch is None:
            break
        try:
            # the first step of all takes longer than any other
            with _own_random_state(trainer.model.device), trainer.ranks.unhurried(), trainer.turn():
                losses.append(trainer.train_step.try_out(micro_batch, number))
                silent = without_gradient(adapters)
        except OutOfMemoryError as error:
            trainer.give_up_for_memory(error)
        except Exception as error:
            blamed = _plugin_in_doubt(trainer.config, error)
            if blamed is None:
                raise
            raise blamed from error
        finally:
            trainer.train_step.optimizer.zero_grad(set_to_none=True)
        if math.isfinite(losses[-1]):
            break
    trainer.recovery.begin_again()
    if trainer.commands.stopping:
        return False
    if losses:
        _judge(trainer, adapters, losses, silent)
    return True


def resumes(trainer: Trainer) -> bool:
    """Whether there is a state of this run to go on from. All processes ask at once."""
    return trainer.ranks.first(lambda: trainer.states.has_one(trainer.config.resume))


def _begins_with_the_base(trainer: Trainer) -> bool:
    """Whether the base is measured, or previews of it are drawn, before the first step."""
    return trainer.validator is not None or (trainer.previewer is not None and bool(trainer.config.preview_prompts))


def without_gradient(adapters: AdapterSet) -> list[str]:
    """Names of the layers that learn, but got no gradient in the last backward pass."""
    silent = []
    for target, adapter in adapters.items():
        learning = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
        if learning and not any(one.grad is not None and bool(one.grad.any()) for one in learning):
            silent.append(target.diffusers_name)
    return silent


def _judge(trainer: Trainer, adapters: AdapterSet, losses: Sequence[float], silent: Sequence[str]) -> None:
    if not math.isfinite(losses[-1]):
        raise UserError(
            f"{len(losses)} batches were tried, and none of them gave a finite loss (NaN).",
            field="base_model",
            remedy=" ".join([trainer.source.blame, *other_precision(trainer.train_step.precision.name)]),
        )
    _judge_gradients(trainer, adapters, losses[-1], silent)


def _judge_gradients(trainer: Trainer, adapters: AdapterSet, loss: float, silent: Sequence[str]) -> None:
    config = trainer.config
    if not silent or loss == 0:  # of pictures that do not count nothing is learned, and that is no fault
        return
    learning = sum(any(one.requires_grad for one in adapter.parameters()) for _, adapter in adapters.items())
    if len(silent) == learning and config.module_dropout == 0:
        raise UserError(
            "One step was tried, and no layer got a gradient: nothing would be learned.",
            field="target_modules",
            remedy="Choose other layers; those that were chosen do not take part in what the model computes.",
        )
    if config.module_dropout == 0:
        names = enumerate_some(silent, _NAMED)
        trainer.callbacks.on_warning(f"{len(silent)} of {learning} layers get no gradient and learn nothing: {names}.")


def _own_random_state(device: torch.device) -> torch.random.fork_rng:
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _plugin_in_doubt(config: TrainConfig, error: Exception) -> UserError | None:
    """``error`` as a sentence, where code of a plug-in took part in the step."""
    if isinstance(error, UserError):
        return None
    found = _plugins_used(config)
    if not found:
        return None
    field, name = found[0][0], ", ".join(name for _, name in found)
    return UserError(
        f"One step was tried, and it failed with {name}: {type(error).__name__}: {first_line(error)}.",
        field=field,
        remedy="Correct the plug-in's file, or choose another.",
    )


def _plugins_used(config: TrainConfig) -> list[tuple[str, str]]:
    """The settings and names of the plug-ins that take part in a step's gradients."""
    used = [("loss", "loss", config.loss), *(("regularisers", "regulariser", name) for name in config.regularisers)]
    return [(field, name) for field, kind, name in used if plugins.fingerprint(kind, name) is not None]
