"""Whole runs with ``channels_last: auto``: what is chosen stays with the run."""

from __future__ import annotations

import re

from lora_trainer.config import TrainConfig
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.run import layout
from lora_trainer.training.callbacks import TrainCommands
from lora_trainer.training.ranks import ALONE
from lora_trainer.training.state import read_state
from tests.run.runs import Listener, assert_same_weights, run


def chosen(result):
    newest = max((result.lora.parent / "state").glob("*.state"))
    return read_state(newest).parts["layout"]["channels_last"]


def test_a_resumed_run_keeps_its_layout_and_gives_the_same_lora(settings, tmp_path, monkeypatch):
    changes = {"channels_last": "auto", "conv_rank": 2, "preview_prompts": ["a disc"], "preview_steps": 2}
    listener = Listener()
    measured = run(settings, listener, output_dir=str(tmp_path / "measured"), **changes)
    (told,) = (text for text in listener.warnings if text.startswith("channels_last"))
    assert re.search(r"takes [0-9.]+, [0-9.]+ ms without it and [0-9.]+, [0-9.]+ ms with it", told), "of each level"
    assert set(chosen(measured)) <= {0, 1}

    monkeypatch.setattr(layout, "MIN_GAIN", float("inf"))
    whole = run(settings, output_dir=str(tmp_path / "whole"), **changes)
    assert chosen(whole) == [0, 1]
    commands = TrainCommands()
    run(settings, Listener(lambda report: report.step == 2 and commands.stop_and_save()), commands, **changes)
    monkeypatch.setattr(layout, "MIN_GAIN", 0.0)  # measured again, it would be another
    resumed = run(settings, **changes)
    assert chosen(resumed) == [0, 1]
    assert_same_weights(resumed.lora, whole.lora)


def test_without_it_nothing_is_measured_and_the_state_says_so(settings, monkeypatch):
    monkeypatch.setattr(layout, "MIN_GAIN", float("inf"))
    assert chosen(run(settings)) == []


def test_the_weights_of_a_host_are_left_as_they_are(tiny_base):
    config = TrainConfig(channels_last="auto", resolution="64")
    told = []
    with FileLender(tiny_base).borrow() as model:
        model.residency = None  # as of a model that a WebUI lends
        lent = layout.Layout(config, model, ALONE, told.append)
        lent.choose()
        lent.load_state_dict({"channels_last": [0, 1]})  # of a run that began on the command line
        assert all(parameter.is_contiguous() for parameter in model.unet.parameters())
        assert lent.state_dict() == {"channels_last": []}
    assert len(told) == 1 and told[0].startswith("channels_last is not used: it is for")
