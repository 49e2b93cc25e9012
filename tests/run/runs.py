"""Runs of the engine on a tiny base, and what they tell and leave."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from lora_trainer.config import from_mapping
from lora_trainer.run import file_lender, train
from lora_trainer.training.callbacks import TrainCallbacks


class Listener(TrainCallbacks):
    """Keeps what a run tells, and may act on a step."""

    def __init__(self, on_step=lambda report: None):
        self.steps, self.warnings, self.phases, self.previews = [], [], [], []
        self._act = on_step

    def on_step(self, report):
        self.steps.append(report)
        self._act(report)

    def on_warning(self, text):
        self.warnings.append(text)

    def on_phase(self, name, done, total):
        self.phases.append((name, done, total))

    def on_preview(self, path, step, prompt):
        self.previews.append(path)


def run(settings, listener=None, commands=None, **changes):
    config = from_mapping({**settings, **changes})
    return train(config, file_lender(config), callbacks=listener or Listener(), commands=commands)


def weights(path):
    return load_file(str(path))


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
