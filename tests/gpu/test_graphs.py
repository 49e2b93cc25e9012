"""Micro-batches that are replayed as CUDA graphs compute what they compute without."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.benchmarks.sides import Work, batch_of, our_training

DEMO = Work("sd1", size="demo", resolution=64, batch_size=2, device="cuda")
STEPS = 10


def train(work: Work, folder, graphs: str, micro_batches=lambda unet, number: [batch_of(DEMO, unet)], on_step=None):
    """The adapters after ``STEPS`` steps, their losses, and how many graphs there were."""
    work = dataclasses.replace(work, changes=(*work.changes, ("cuda_graphs", graphs), ("learning_rate", 1e-3)))
    with our_training(work, folder) as step:
        unet, losses = step.objective.model.unet, []
        step.graphs.min_gain = 100.0  # however slow
        for number in range(STEPS):
            if on_step is not None:
                on_step(step, number)
            losses.append(step(number, micro_batches(unet, number)))
        return {n: v.detach().cpu() for n, v in step.adapters.state_dict().items()}, losses, step.graphs.count


def two_shapes(unet, number):
    """Two micro-batches of unequal shape and size."""
    other = dataclasses.replace(DEMO, resolution=96, batch_size=1)
    return [batch_of(DEMO, unet), batch_of(other, unet)]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("changes", [
    {}, {"conv_rank": 4}, {"dora": True}, {"adapter": "lokr"}, {"dropout": 0.2, "rank_dropout": 0.1},
], ids=["lora", "locon", "dora", "lokr", "dropout"])  # fmt: skip
def test_weights_and_losses_are_the_same(precision, changes, bases):
    work = dataclasses.replace(DEMO, mixed_precision=precision, changes=tuple(changes.items()))
    plain, plain_losses, none = train(work, bases, "off")
    graphed, losses, count = train(work, bases, "auto")
    assert none == 0 and count == 1
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    far = [(graphed[name] - plain[name]).norm() / plain[name].norm().clamp_min(1e-6) for name in plain]
    print(f"{precision} {changes}: furthest {max(far):.1e}")
    assert max(far) <= 1e-2


def test_shapes_have_graphs_of_their_own_and_their_gradients_add_up(bases):
    _, plain_losses, _ = train(DEMO, bases, "off", two_shapes)
    _, losses, count = train(DEMO, bases, "auto", two_shapes)
    assert count == 2 and losses == pytest.approx(plain_losses, rel=1e-4)


def test_gradient_checkpointing_is_recorded_too(bases):
    work = dataclasses.replace(DEMO, gradient_checkpointing=True)
    _, losses, count = train(work, bases, "auto")
    _, plain_losses, _ = train(work, bases, "off")
    assert count == 1 and losses == pytest.approx(plain_losses, rel=1e-4)


def test_weights_that_the_host_moved_are_read_where_they_are(bases):
    """At other addresses the graph is dropped; a replay would read memory that belongs to somebody else."""

    def move(step, number) -> None:
        if number == 6:
            assert step.graphs.count == 1
            for parameter in step.objective.model.unet.parameters():
                parameter.data = parameter.data.clone()

    _, losses, count = train(DEMO, bases, "auto", on_step=move)
    _, plain_losses, _ = train(DEMO, bases, "off")
    assert losses == pytest.approx(plain_losses, rel=1e-4) and count == 1


GRAPHED = dataclasses.replace(DEMO, changes=(("cuda_graphs", "auto"),))


def test_a_graph_that_does_not_pay_is_given_up(bases):
    with our_training(GRAPHED, bases) as step:
        step.graphs.min_gain = 0.0
        losses = [step(number, [batch_of(DEMO, step.objective.model.unet)]) for number in range(STEPS)]
        assert not step.graphs.enabled and step.graphs.count == 0 and None not in losses


def test_where_memory_lacks_there_is_none(bases):
    with our_training(GRAPHED, bases) as step:
        step.graphs.spare_bytes = torch.cuda.get_device_properties(0).total_memory
        for number in range(STEPS):
            step(number, [batch_of(DEMO, step.objective.model.unet)])
        assert not step.graphs.enabled
