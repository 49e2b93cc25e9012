"""Blocks compiled by torch.compile: what they compute, and that nothing is lost where they fail."""

from __future__ import annotations

import math
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import TrainConfig
from lora_trainer.devices import torch_version
from lora_trainer.host.lending import WebuiLender
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.run.faster import make_faster
from lora_trainer.training import compiling
from lora_trainer.training.compiling import LEAST_TORCH, TIMED_PASSES, CompiledBlocks
from lora_trainer.training.ranks import ALONE
from tests import chroma, flux, sd3
from tests.benchmarks.sides import Work, batch_of, our_training

COMPILES = torch_version() >= LEAST_TORCH
COMPILER = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()
compiles = pytest.mark.skipif(not COMPILES, reason="torch compiles each block by itself")
TINY = Work(size="tiny", device="cpu", mixed_precision="no", resolution=64)
PASSES = TIMED_PASSES + 1 + TIMED_PASSES + 3  # plain, tried, compiled while it is timed, compiled


@pytest.fixture(autouse=True)
def anew():
    if COMPILES:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


def train(folder, work=TINY, blocks=lambda model: [], steps=PASSES // 2, least_seconds=0.0, min_gain=1e9):
    """The losses, the weights, and the compiled blocks, of which ``blocks`` chooses those of the model."""
    with our_training(work, folder) as step:
        model = step.objective.model
        if chosen := blocks(model):
            step.compiled.use(chosen)
        step.compiled.least_seconds, step.compiled.min_gain = least_seconds, min_gain
        batch = batch_of(work, model.unet)
        losses = [step(number, [batch, batch]) for number in range(steps)]  # two passes each
        return losses, torch.cat([parameter.detach().flatten() for parameter in step.parameters]), step.compiled


def a_few(model):
    """The first transformer block and the first resnet, each of which has a graph of its own."""
    blocks = model.compilable()
    return [blocks[0], next(block for block in blocks if type(block) is not type(blocks[0]))]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@compiles
@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("no", {}),
        ("bf16", {"dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1}),
        ("no", {"conv_rank": 4, "dropout": 0.1}),
        ("bf16", {"conv_rank": 4, "dora": True}),
    ],
)
def test_compiled_blocks_compute_what_the_plain_ones_do(tmp_path, monkeypatch, precision, settings):
    """Without a break: with one, ``fullgraph`` would give it up."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    work = Work(size="tiny", device="cpu", mixed_precision=precision, resolution=64, changes=tuple(settings.items()))
    losses, weights, _ = train(tmp_path, work)
    found, compiled_weights, compiled = train(tmp_path, work, a_few)
    assert compiled.enabled and graphs() == 2
    tolerance = 1e-4 if precision == "no" else 0.02
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=tolerance, atol=0)
    assert torch.cosine_similarity(weights, compiled_weights, dim=0) > 0.999
    assert found[:2] == losses[:2], "these are plain"


@compiles
@pytest.mark.slow
def test_blocks_of_one_kind_and_width_share_what_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    work = Work(size="tiny", device="cpu", mixed_precision="no", resolution=64, gradient_checkpointing=0.5)
    kinds = []

    def blocks(model):
        kinds.extend({(type(one), tuple(p.shape for p in one.parameters())) for one in model.compilable()})
        return model.compilable()

    losses, weights, _ = train(tmp_path, work)
    found, compiled_weights, compiled = train(tmp_path, work, blocks)
    assert compiled.enabled and len(kinds) < 16
    assert graphs() <= 16 < 38, "of 38 blocks; some kinds stand at two sizes of the picture"
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-4, atol=0)
    assert torch.cosine_similarity(weights, compiled_weights, dim=0) > 0.9999


@compiles
@pytest.mark.parametrize("tiny", [flux.tiny_flux, chroma.tiny_chroma, sd3.tiny_sd3])
def test_flow_models(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    base, config = tiny(tmp_path), TrainConfig(lora_rank=4, target_modules=["attention", "feed_forward"], dropout=0.1)
    lender = FileLender(base["base_model"], vae=base.get("vae"), text_encoders=base.get("text_encoders", ()))
    with lender.borrow() as model, AdapterSet.build(model.lora_targets(), config) as adapters:
        told = model.encode_prompts(["a cat", "a dog"]).map(torch.Tensor.detach)
        latents = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(0))
        for parameter in adapters.parameters():
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))

        def compute(inputs, divisor):
            loss = model.predict(inputs["latents"], torch.tensor([0.3, 0.7]), told, None).square().mean()
            loss.backward()
            return loss.detach()

        compiled = CompiledBlocks(compute, list(adapters.parameters()), torch.device("cpu"), torch.float32)
        compiled.use(model.compilable())
        compiled.least_seconds = 0.0
        adapters.begin_step(0)
        losses = []
        for _ in range(TIMED_PASSES + 2):
            compiled.begin_step(10)
            losses.append(compiled({"latents": latents}, torch.ones(())))
    assert compiled.enabled and graphs() >= 2
    torch.testing.assert_close(losses[-1], losses[0])


@compiles
@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="no C++ compiler, or not Python's headers")
def test_the_compiler_that_is_used(tmp_path):
    assert compiling.BACKEND == "inductor"
    losses, weights, _ = train(tmp_path)
    found, compiled_weights, compiled = train(tmp_path, blocks=a_few)
    assert compiled.enabled and graphs() == 2
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-4, atol=0)
    assert torch.cosine_similarity(weights, compiled_weights, dim=0) > 0.9999


def failing_forwards(module, inputs):
    raise RuntimeError("Cannot find a working triton installation.")


def failing_backwards():
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda module, inputs: module.forward, bw_compiler=failing_forwards)


def times(factor):
    def wrong(module, inputs):
        return lambda *given: tuple(
            one * factor if isinstance(one, torch.Tensor) and one.requires_grad else one
            for one in module.forward(*given)
        )

    return wrong


@compiles
@pytest.mark.parametrize(
    "backend",
    [lambda: failing_forwards, failing_backwards, lambda: times(1.5), lambda: times(math.nan)],
    ids=["fails", "fails backwards", "wrong", "not finite"],
)
def test_what_cannot_be_compiled_or_computes_something_else_is_given_up(tmp_path, monkeypatch, caplog, backend):
    """The pass that tried it counts as the plain one that it was, gradients of the micro-batch before included."""
    caplog.set_level("INFO", "lora_trainer")
    losses, weights, _ = train(tmp_path)
    monkeypatch.setattr(compiling, "BACKEND", backend())
    found, same_weights, compiled = train(tmp_path, blocks=a_few)
    assert not compiled.enabled
    assert found == losses and torch.equal(weights, same_weights)
    (said,) = [record.getMessage() for record in caplog.records if "torch.compile is not used" in record.message]
    assert "triton" in said or "gradients of a compiled pass differ" in said


@compiles
def test_a_compiled_pass_that_fails_later_costs_nothing_but_its_step(tmp_path, monkeypatch):
    passes = []

    def breaking(module, inputs):
        def run(*given):
            passes.append(1)
            if len(passes) == 2 * 5:
                raise RuntimeError("a kernel that fails")
            return module.forward(*given)

        return run

    losses, weights, _ = train(tmp_path)
    monkeypatch.setattr(compiling, "BACKEND", breaking)
    found, same_weights, compiled = train(tmp_path, blocks=a_few)
    assert not compiled.enabled and len(passes) == 2 * 5
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-5, atol=0)
    torch.testing.assert_close(same_weights, weights, rtol=1e-3, atol=1e-5)


@compiles
def test_a_run_that_is_soon_over_and_blocks_that_are_no_faster_stay_plain(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    _, weights, compiled = train(tmp_path, blocks=a_few, least_seconds=compiling.LEAST_SECONDS)
    assert compiled.enabled and graphs() == 0, "seconds are left, not minutes"
    _, same_weights, compiled = train(tmp_path, blocks=a_few, min_gain=0.0)
    assert not compiled.enabled and graphs() == 2
    torch.testing.assert_close(same_weights, weights, rtol=1e-3, atol=1e-5)


@compiles
def test_each_shape_is_judged_by_itself(monkeypatch):
    """One that is no faster does not cost another its gain, and the cost is that of one shape."""
    now, used, told = [0.0], [], []
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setattr(compiling, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    block, seconds = nn.Linear(4, 4), {1: (10, 5), 2: (10, 11), 3: (10, 5)}  # plain, compiled

    def compute(inputs, divisor):
        used.append(compiled._on)
        now[0] += seconds[len(inputs["x"])][compiled._on]
        loss = block(inputs["x"]).sum()
        loss.backward()
        return loss.detach()

    compiled = CompiledBlocks(compute, list(block.parameters()), torch.device("cpu"), torch.float32)
    compiled.use([block])
    compiled.say, compiled.least_seconds = told.append, 0.0

    def passes(size, count, steps_left=1000):
        for _ in range(count):
            compiled.begin_step(steps_left)
            compiled({"x": torch.ones(size, 4)}, torch.ones(()))
        return used[-1]

    assert passes(1, PASSES) and not passes(2, PASSES) and passes(1, 1)
    assert [text for text in told if "0.50" in text] == told
    # 16 · 4 of 25 micro-batches of 10 seconds, of which half are saved: more than the 11 seconds of one shape.
    assert passes(3, TIMED_PASSES + 1, steps_left=16)


@compiles
def test_what_can_never_be_compiled_is_said():
    compiled = CompiledBlocks(lambda inputs, divisor: divisor, [], torch.device("cpu"), torch.float32)
    compiled.use([nn.Linear(2, 2)])
    told = []
    compiled.say = told.append
    assert compiled({"captions": ("a cat",)}, torch.ones(())) == 1
    assert not compiled.enabled and "text encoders learn" in told[0]


def blocks_for(model=None, lender=FileLender, adapter="lora", processes=1):
    """Whether blocks are compiled."""
    parameter = nn.Parameter(torch.zeros(1))
    compiled = CompiledBlocks(lambda inputs, divisor: divisor, [parameter], torch.device("cpu"), torch.float32)
    config = TrainConfig(compile="auto", adapter=adapter)
    ranks = ALONE if processes == 1 else SimpleNamespace(size=processes)
    told = []
    make_faster(SimpleNamespace(compiled=compiled), config, lender, model, ranks, told.append)
    assert compiled.enabled != bool(told), "why not"
    return compiled.enabled


def test_nobody_waits_for_a_compiler_in_a_webui(tmp_path):
    with our_training(TINY, tmp_path) as step:
        model = step.objective.model
        assert blocks_for(model) == COMPILES
        assert not blocks_for(model, lender=WebuiLender)
        assert not blocks_for(model, adapter="lokr")
        assert not blocks_for(model, processes=2)
        assert not blocks_for(SimpleNamespace(info=model.info)), "a plug-in's model"
