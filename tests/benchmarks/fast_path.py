"""Two hundred steps of the training step as it is against the same of ordinary operations in fp32.

    python -m tests.benchmarks.fast_path                      on the demo's base, on the CPU
    python -m tests.benchmarks.fast_path --device cuda --steps 50

The plain side computes in fp32 with diffusers' own blocks and with ``base(x) + up(down(x)) · scale`` layer by layer:
no fused nodes, no layers that compute together, no copies. Both see the same weights, pictures and random numbers.
Reported are the mean losses and the cosine of what was learned: of all changes of weights, one behind the other.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from lora_trainer.adapters import inject
from lora_trainer.adapters.lora import LoraAdapter
from lora_trainer.models.families.unet import model as assembling
from lora_trainer.training.step import TrainingStep
from tests.benchmarks.sides import Work, batch_of, our_training

BATCHES = 8
KINDS = {"lora": (), "dora": (("dora", True),), "locon": (("conv_rank", 16),)}


@contextmanager
def ordinary_operations() -> Iterator[None]:
    """Inside, models and adapters are made without what makes a step fast."""
    made = LoraAdapter.__init__

    def plain(adapter: LoraAdapter, *arguments, **options) -> None:
        made(adapter, *arguments, **options)
        adapter.base_is_plain = False

    with ExitStack() as stack:
        stack.enter_context(patch.object(assembling, "slim", lambda module: None))
        stack.enter_context(patch.object(inject, "joints", lambda pairs: []))
        stack.enter_context(patch.object(LoraAdapter, "__init__", plain))
        yield


def train(work: Work, folder: Path, steps: int) -> tuple[list[float], torch.Tensor]:
    """The loss of each step, and the changes of all weights in the end, flat."""
    with our_training(work, folder) as step:
        assert isinstance(step, TrainingStep)
        unet = step.objective.model.unet
        batches = [batch_of(work, unet, seed) for seed in range(BATCHES)]
        losses = [step(number, [batches[number % BATCHES]]) for number in range(steps)]
        changes = [adapter.merged_weight() - adapter.base_weight() for _, adapter in step.adapters.items()]
        flat = torch.cat([change.detach().flatten().double().cpu() for change in changes])
    assert None not in losses, "a step was left out"
    return losses, flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    options = parser.parse_args()
    plain = Work("sd1", size="demo", resolution=64, batch_size=2, device=options.device, mixed_precision="no")
    formats = ["no", "bf16"] if options.device == "cpu" else ["no", "bf16", "fp16"]
    with tempfile.TemporaryDirectory() as temporary:
        for kind in options.kind or KINDS:
            work = replace(plain, changes=KINDS[kind])
            with ordinary_operations():
                losses, changes = train(work, Path(temporary), options.steps)
            first, last = (sum(losses[part]) / BATCHES for part in (slice(BATCHES), slice(-BATCHES, None)))
            print(f"{kind:6} plain fp32: loss {first:.5f} -> {last:.5f}", flush=True)
            for mixed_precision in formats:
                fast = replace(work, mixed_precision=mixed_precision)
                ours, learned = train(fast, Path(temporary), options.steps)
                cosine = torch.nn.functional.cosine_similarity(learned, changes, dim=0)
                apart = max(abs(a - b) / b for a, b in zip(ours, losses))
                end = sum(ours[-BATCHES:]) / BATCHES
                print(
                    f"{kind:6} fast {mixed_precision:>4}: loss {end:.5f} ({end / last - 1:+.3%}), of a step at most "
                    f"{apart:.3%} apart; cosine of what was learned {cosine:.6f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
