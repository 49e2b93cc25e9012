"""Waiting for a model that its lender cannot give right now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from lora_trainer.errors import UserError
from lora_trainer.models.base import Lender, ModelAwayError
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands

_POLL_SECONDS = 0.25


class StoppedWhileWaiting(Exception):
    """A stop was asked for while the model was away."""


def patient_turns(
    lender: Lender, callbacks: TrainCallbacks, commands: TrainCommands
) -> Callable[[], AbstractContextManager[None]]:
    """The lender's ``turn``, which waits, and says why, while the model is away."""

    @contextmanager
    def turn() -> Iterator[None]:
        with ExitStack() as stack:
            reported = None
            while True:
                try:
                    stack.enter_context(lender.turn())
                    break
                except ModelAwayError as away:
                    if (away.reason, away.returns) != reported:
                        reported = away.reason, away.returns
                        callbacks.on_waiting(away.reason, away.returns)
                if commands.stopping:
                    raise StoppedWhileWaiting
                if commands.take_switch_back():
                    try:
                        lender.switch_back()
                    except UserError as error:
                        callbacks.on_warning(str(error))
                with lender.rest():
                    time.sleep(_POLL_SECONDS)
            yield

    return turn
