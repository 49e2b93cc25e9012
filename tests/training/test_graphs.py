"""When a micro-batch's graph is recorded, replayed and dropped, as far as that needs no GPU (see tests/gpu)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from lora_trainer.training.graphs import EAGER_STEPS, MicroBatchGraphs
from tests.devices import pretended_gpu
from tests.streams import pretended_streams


@dataclass(frozen=True)
class Inputs:
    latents: torch.Tensor


@pytest.fixture
def graphs(monkeypatch):
    """With weights at ``place``; computing brings them to 1. A recorded graph reads them where they were."""
    with pretended_gpu(memory=64 << 30), pretended_streams():
        parameter = torch.nn.Parameter(torch.ones(2, device="cuda"))
        place, replayed = SimpleNamespace(now=1), []

        def compute(inputs, divisor):
            place.now = 1
            loss = (parameter * inputs.latents).sum() / divisor
            loss.backward()
            return loss.detach()

        class Graph:
            def pool(self):
                return 0, 0

            def replay(self):
                replayed.append(place.now)

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        for name in ("graph", "device"):
            monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: nullcontext())
        found = MicroBatchGraphs(compute, [parameter], lambda: (place.now,), torch.device("cuda:0"))
        found.min_gain = 1e9
        yield found, place, replayed


def step(graphs, place=None, leaves=False):
    with graphs.step():
        if leaves:
            place.now = 0  # for the text encoders, while the inputs are made
        graphs(Inputs(torch.ones(2, device="cuda")), torch.ones((), device="cuda"))
        graphs.finish()


def test_weights_that_leave_in_every_step_are_never_recorded(graphs):
    graphs, place, replayed = graphs
    for _ in range(2 * EAGER_STEPS):
        step(graphs, place, leaves=True)
    assert graphs.count == 0 and graphs.enabled and not replayed
    step(graphs)
    assert graphs.count == 1, "they stayed"


def test_weights_that_left_within_a_step_are_not_read_where_they_were(graphs):
    graphs, place, replayed = graphs
    for _ in range(EAGER_STEPS + 2):
        step(graphs)
    assert graphs.count == 1 and len(replayed) == 2
    step(graphs, place, leaves=True)
    assert replayed == [1, 1] and place.now == 1, "computed without the graph"
