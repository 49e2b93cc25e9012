"""Waiting for a model that its lender cannot give right now."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from lora_trainer.errors import UserError
from lora_trainer.models.base import Lender, ModelAwayError
from lora_trainer.run.waiting import StoppedWhileWaiting, patient_turns
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands


class SwitchedLender(Lender):
    """Its host has another model until it is switched back, or until ``looks`` were had."""

    def __init__(self, looks=1000, error=None):
        self.looks, self.error, self.switched = looks, error, 0

    @contextmanager
    def turn(self):
        self.looks -= 1
        if self.looks >= 0:
            raise ModelAwayError("Another one is selected.", returns=True)
        yield

    def switch_back(self):
        self.switched += 1
        if self.error is not None:
            raise self.error
        self.looks = 0


class Told(TrainCallbacks):
    def __init__(self, act):
        self.reasons, self.warnings, self._act = [], [], act

    def on_waiting(self, reason, returns=False):
        self.reasons.append((reason, returns))
        self._act()

    def on_warning(self, text):
        self.warnings.append(text)


def test_a_model_that_comes_back_by_itself_is_found_and_said_once():
    lender, told = SwitchedLender(looks=3), Told(lambda: None)
    with patient_turns(lender, told, TrainCommands())():
        pass
    assert told.reasons == [("Another one is selected.", True)] and lender.switched == 0


def test_switching_back_brings_it_back():
    commands, lender = TrainCommands(), SwitchedLender()
    told = Told(commands.switch_back)
    with patient_turns(lender, told, commands)():
        pass
    assert lender.switched == 1 and not told.warnings


def test_a_host_that_cannot_switch_back_says_so_and_the_run_waits_on():
    commands = TrainCommands()
    lender = SwitchedLender(looks=3, error=UserError("It could not be loaded."))
    told = Told(commands.switch_back)
    with patient_turns(lender, told, commands)():
        pass
    assert told.warnings == ["It could not be loaded."] and lender.switched == 1


def test_who_waits_can_be_stopped():
    commands = TrainCommands()
    with pytest.raises(StoppedWhileWaiting), patient_turns(SwitchedLender(), Told(commands.stop), commands)():
        pass
