"""Working copies, layers that compute together, and that everything which learns gets its gradient."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

from lora_trainer.adapters import dora
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.families.unet.blocks import project
from tests.adapters.layers import FakeTarget, randomize, settings, unet_targets

WIDTH, CONTEXT = 8, 6
TARGETS = ["attention", "feed_forward", "projection"]


def targets(dtype: torch.dtype = torch.float32) -> list[FakeTarget]:
    """Layers of a UNet that compute in ``dtype``, with a whole attention to the text."""
    torch.manual_seed(0)
    found = unet_targets()
    values = [target for target in found if target.diffusers_name.endswith("attn2.to_k")]
    for target in values:
        names = {
            name: getattr(target, name).replace("to_k", "to_v")
            for name in ("kohya_name", "diffusers_name", "checkpoint_name")
        }
        layer = nn.Linear(CONTEXT, WIDTH, bias=False).requires_grad_(False)
        found.append(FakeTarget(**names, part="unet", group="attention", block=target.block, module=layer))
    for target in found:
        cast_layers(target.module.to(dtype), dtype)
    return found


def attached(dtype: torch.dtype = torch.float32, **options) -> AdapterSet:
    options = {"lora_rank": 2, "alpha": 1.0, "conv_rank": 2, "target_modules": TARGETS, **options}
    adapters = AdapterSet.build(targets(dtype), settings(**options))
    randomize(adapters)
    adapters.attach()
    return adapters.train()


def outputs(adapters: AdapterSet, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of every layer, as attention calls them; the inputs need gradients, as those inside of a model do."""
    layers = {target.diffusers_name: target.module for target, _ in adapters.items()}
    generator, found = torch.Generator().manual_seed(seed), {}

    def given(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    for name, layer in layers.items():
        attention, _, part = name.rpartition(".")
        if attention.endswith("attn1") and part == "to_q":
            together = [f"{attention}.{part}" for part in ("to_q", "to_k", "to_v")]
        elif attention.endswith("attn2") and part == "to_k":
            together = [f"{attention}.{part}" for part in ("to_k", "to_v")]
        else:
            together = [name]
        if name in found:
            continue
        shape = (2, WIDTH, 5, 5) if isinstance(layer, nn.Conv2d) else (2, 3, layer.in_features)
        found.update(zip(together, project(tuple(layers[name] for name in together), given(*shape))))
    return found


def total(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(output.float().square().sum() for output in found.values())


def gradients(adapters: AdapterSet) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in adapters.named_parameters()}


DROPPED = [{"dropout": a, "rank_dropout": b} for a, b in itertools.product((0.0, 0.3), (0.0, 0.3))]
KINDS = [{}, {"dora": True}, {"adapter": "loha"}, {"adapter": "lokr"}]


@pytest.mark.parametrize("how", ["fp32", "bf16", "copies", "autocast"])
@pytest.mark.parametrize("dropped", DROPPED, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_everything_that_learns_gets_a_gradient(kind, dropped, how):
    """Alpha is not the rank, and convolutions learn as well. torch 2.1 to 2.3 lost some of DoRA's under autocast."""
    dtype = torch.float32 if how in ("fp32", "autocast") else torch.bfloat16
    adapters = attached(dtype, **kind, **dropped)
    copies = adapters.working_copies(torch.bfloat16 if how == "copies" else torch.float32)
    adapters.begin_step(3)
    with copies.computing():
        with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext():
            loss = total(outputs(adapters, dtype))
        loss.backward()
        copies.gather()
    for name, parameter in adapters.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


@pytest.mark.parametrize("dropped", DROPPED, ids=str)
def test_layers_of_one_input_compute_together(dropped):
    """Self-attention's three and the text's two give what each gives by itself, there and back."""
    together, alone = attached(**dropped), attached(**dropped)
    assert sorted(len(joint.layers) for joint in together.joints) == [2, 2, 3, 3]
    for joint in alone.joints:
        del joint.layers[0].joint
    if not any(dropped.values()):  # dropout is drawn for all of them at once
        torch.testing.assert_close(outputs(together, torch.float32), outputs(alone, torch.float32))
        for adapters in (together, alone):
            total(outputs(adapters, torch.float32)).backward()
        torch.testing.assert_close(gradients(together), gradients(alone))
    with together.enabled(False), alone.enabled(False):
        bare = outputs(together, torch.float32)
        assert all(torch.equal(value, bare[name]) for name, value in outputs(alone, torch.float32).items())
    together.detach()
    assert not any("joint" in vars(target.module) for target, _ in together.items())


@pytest.mark.parametrize("difference", ["rank", "alpha", "bias", "dora", "missing"])
def test_layers_that_differ_compute_alone(difference):
    options = {"rank": {"block_ranks": [2] * 16 + [0] * 9}, "dora": {"dora": True}}.get(difference, {})
    found = targets()
    if difference == "missing":
        found = [target for target in found if not target.diffusers_name.endswith("attn2.to_v")]
    if difference == "bias":
        for target in found:
            if target.diffusers_name.endswith("attn1.to_k"):
                target.module.bias = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)
    adapters = AdapterSet.build(found, settings(lora_rank=2, **options))
    if difference == "alpha":
        next(adapter for target, adapter in adapters.items() if target.diffusers_name.endswith("to_v")).alpha = 7.0
    with adapters:
        expected = {"rank": [2, 3], "alpha": [2, 2, 3], "bias": [2, 2], "dora": [], "missing": [3, 3]}[difference]
        assert sorted(len(joint.layers) for joint in adapters.joints) == expected


def test_who_hooks_a_layer_is_called():
    adapters, called = attached(), []
    expected = outputs(adapters, torch.float32)
    layer = adapters.joints[0].layers[1]
    handle = layer.register_forward_hook(lambda *arguments: called.append("hook"))
    torch.testing.assert_close(outputs(adapters, torch.float32), expected)
    handle.remove()
    inner = layer.forward
    layer.forward = lambda x: (called.append("forward"), inner(x))[1]
    torch.testing.assert_close(outputs(adapters, torch.float32), expected)
    assert called == ["hook", "forward"]


def step_with(adapters: AdapterSet, copies, seeds=(0,)) -> dict[str, torch.Tensor]:
    adapters.zero_grad(set_to_none=True)
    with copies.computing():
        for micro_step, seed in enumerate(seeds):
            adapters.begin_step(0, micro_step)
            total(outputs(adapters, torch.bfloat16, seed)).backward()
            copies.gather()
    return gradients(adapters)


@pytest.mark.parametrize("dropped", [{}, {"dropout": 0.3}], ids=str)
def test_copies_change_nothing_but_when_casts_are_made(dropped):
    """Gradients are those of layers that cast their own parameters, and are summed in fp32 over micro-batches."""
    adapters = attached(torch.bfloat16, **dropped)
    none, copies = adapters.working_copies(torch.float32), adapters.working_copies(torch.bfloat16)
    assert len(none.leaves) == 0 and all(leaf.dtype == torch.bfloat16 for leaf in copies.leaves)
    for seeds in ((0,), (1, 2, 3)):
        expected = step_with(adapters, none, seeds)
        found = step_with(adapters, copies, seeds)
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_copies_follow_the_parameters_and_are_used_in_steps_alone():
    adapters = attached(torch.bfloat16)
    copies = adapters.working_copies(torch.bfloat16)
    before = step_with(adapters, copies)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.mul_(1.5)
    changed = outputs(adapters, torch.bfloat16)
    after = step_with(adapters, copies)
    assert not torch.equal(next(iter(before.values())), next(iter(after.values())))
    with copies.computing():
        assert any(adapter.working for _, adapter in adapters.items()) and all(j.working for j in adapters.joints)
        assert all(torch.equal(value, changed[name]) for name, value in outputs(adapters, torch.bfloat16).items())
    with pytest.raises(ValueError, match="stopped"), copies.computing():
        raise ValueError("stopped")
    assert not any(one.working for one in [*(adapter for _, adapter in adapters.items()), *adapters.joints])
    assert {name.rpartition(".")[2] for name in adapters.state_dict()} == {"lora_down", "lora_up"}


def test_what_is_frozen_or_not_reached_gets_no_gradient():
    adapters = attached(torch.bfloat16)
    frozen, unused = (a for target, a in adapters.items() if target.diffusers_name.endswith("ff.net.2"))
    frozen.requires_grad_(False)
    copies = adapters.working_copies(torch.bfloat16)
    with copies.computing():
        found = outputs(adapters, torch.bfloat16)
        del found[next(target.diffusers_name for target, adapter in adapters.items() if adapter is unused)]
        total(found).backward()
        copies.gather()
    assert frozen.lora_up.grad is None and unused.lora_up.grad is None
    assert all(a.lora_up.grad is not None for _, a in adapters.items() if a not in (frozen, unused))


# -- DoRA -------------------------------------------------------------------------------------------------------------

DORA = {"dora": True, "block_ranks": [2] * 16 + [3] * 9}


def by_definition(adapters: AdapterSet) -> AdapterSet:
    """Layers that compute with ``(W + ΔW) · dora_scale / ‖W + ΔW‖``, of ordinary operations; no gradient through the
    norm, as the paper says."""
    adapters.detach()
    for target, adapter in adapters.items():

        def forward(x, adapter=adapter):
            layer = adapter.layer
            changed = layer.weight + adapter.delta_weight()
            norm = changed.detach().transpose(0, 1).flatten(1).norm(dim=1).view(adapter.dora_scale.shape)
            weight = changed * adapter.dora_scale / norm
            if isinstance(layer, nn.Conv2d):
                return functional.conv2d(x, weight.to(x.dtype), layer.bias, layer.stride, layer.padding)
            return functional.linear(x, weight.to(x.dtype), layer.bias)

        target.module.forward = forward
    return adapters


def test_doras_lengths_of_all_layers_at_once():
    adapters = attached(**DORA)
    found = dora.groups([adapter for _, adapter in adapters.items()])
    assert sorted(adapter.name for group in found for adapter in group) == sorted(adapters.ranks)
    assert 4 < len(found) < len(adapters), "some are alike"
    for group in found:
        downs, ups = (torch.stack([getattr(a, name).flatten(1) for a in group]) for name in ("lora_down", "lora_up"))
        ours = dora.inverse_norms(group, downs, ups, ups)
        for adapter, one in zip(group, ours.view(len(group), -1)):
            changed = adapter.base_weight() + adapter.delta_weight()
            exact = 1 / changed.detach().transpose(0, 1).flatten(1).norm(dim=1)
            torch.testing.assert_close(one, exact, rtol=1e-5, atol=0)


def test_dora_with_copies_is_its_definition():
    """Outputs and gradients, in a format in which nothing is rounded; also of a weight that was bound anew."""
    ours, plain = attached(torch.float64, **DORA), by_definition(attached(torch.float64, **DORA))
    copies = ours.working_copies(torch.float64)
    for _ in range(2):
        found = {}
        for adapters in (ours, plain):
            adapters.zero_grad(set_to_none=True)
            with copies.computing() if adapters is ours else nullcontext():
                made = outputs(adapters, torch.float64)
                total(made).backward()
                copies.gather()
            found[adapters is ours] = {name: value.detach() for name, value in made.items()}, gradients(adapters)
        for one, other in zip(found[True], found[False]):
            for name, exact in other.items():
                torch.testing.assert_close(one[name], exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
        generator = torch.Generator().manual_seed(4)
        for (target, _), (same, _) in zip(ours.items(), plain.items()):
            weight = torch.randn(target.module.weight.shape, generator=generator, dtype=torch.float64)
            for module in (target.module, same.module):
                module.weight = nn.Parameter(weight.clone(), requires_grad=False)


def test_dora_finds_lengths_layer_by_layer_where_weights_lie_elsewhere():
    """A host may bring a weight to the device when its layer runs."""
    adapters = attached(torch.bfloat16, **DORA)
    copies, (_, first) = adapters.working_copies(torch.bfloat16), next(iter(adapters.items()))
    with copies.computing():
        assert len(first.working) == 3
        expected = outputs(adapters, torch.bfloat16)
    layer, weight = first.layer, first.layer.weight
    layer.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
    layer.register_forward_pre_hook(lambda *_: setattr(layer, "weight", weight))
    with copies.computing():
        assert len(first.working) == 2
        found = outputs(adapters, torch.bfloat16)
        total(found).backward()
        copies.gather()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.02)
    assert all(parameter.grad.any() for parameter in adapters.parameters())
