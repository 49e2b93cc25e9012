"""An adapter's forward is its merged weight's, its formula is the definition's, its gradients are right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_trainer.adapters.algebra import factorize
from lora_trainer.adapters.loha import LohaAdapter
from lora_trainer.adapters.lokr import LokrAdapter
from lora_trainer.adapters.lora import LoraAdapter
from lora_trainer.models.casting import cast_layers
from tests.adapters.layers import LAYERS, layer_and_input, randomize

KINDS = {
    "lora": (LoraAdapter, {"rank": 4, "alpha": 2}),
    "dora": (LoraAdapter, {"rank": 4, "alpha": 2, "dora": True}),
    "loha": (LohaAdapter, {"rank": 3, "alpha": 2}),
    "loha_dora": (LohaAdapter, {"rank": 3, "alpha": 2, "dora": True}),
    "lokr": (LokrAdapter, {"rank": 2, "alpha": 1}),
    "lokr_full": (LokrAdapter, {"rank": 8, "alpha": 3, "factor": 4}),
    "lokr_dora": (LokrAdapter, {"rank": 2, "alpha": 1, "dora": True}),
}


def build(kind: str, layer: nn.Module, **more):
    make, options = KINDS[kind]
    return make(layer, name="lora_unet_x", seed=3, **{**options, **more})


def with_weight(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The bare layer's own computation with another weight."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
    return F.linear(x, weight, layer.bias)


@pytest.mark.parametrize("multiplier", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("layer_kind", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_merged_weight(kind, layer_kind, multiplier):
    layer, x = layer_and_input(layer_kind)
    adapter = build(kind, layer)
    adapter.multiplier = multiplier
    randomize(adapter)
    merged = adapter.merged_weight().detach()
    assert (merged - layer.weight).abs().max() > 0.01, "the test must change something"
    torch.testing.assert_close(adapter(x), with_weight(layer, merged, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_top_of_another_begins_with_what_that_one_computes(kind):
    layer, x = layer_and_input("linear")
    first = build(kind, layer)
    randomize(first)
    layer.forward = first.forward
    expected, bare = layer(x), first.base(x)
    second = build(kind, layer)
    torch.testing.assert_close(second(x), expected, rtol=1e-5, atol=1e-5)
    first.active = False
    torch.testing.assert_close(second(x), bare, rtol=1e-5, atol=1e-5)
    first.active = True
    randomize(second, seed=2)
    second(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in second.parameters())


@pytest.mark.parametrize("layer_kind", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(kind, layer_kind):
    layer, x = layer_and_input(layer_kind)
    adapter = build(kind, layer)
    assert adapter.is_neutral() or kind.endswith("dora")
    torch.testing.assert_close(adapter(x), layer(x), rtol=1e-5, atol=1e-6)
    randomize(adapter)
    assert not adapter.is_neutral()
    adapter.active = False
    assert torch.equal(adapter(x), layer(x))


@pytest.mark.parametrize("layer_kind", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_merged_weight(kind, layer_kind):
    """Of the input and of every parameter, for the fused node, too; DoRA's norm is a constant, as the paper says."""
    layer, x = layer_and_input(layer_kind)
    adapter = build(kind, layer)
    randomize(adapter)
    names, parameters = zip(*adapter.named_parameters())

    def gradients(compute):
        source = x.clone().requires_grad_()
        output = compute(source)
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        return torch.autograd.grad((output * weights).sum(), [source, *parameters])

    def merged(source):
        weight, delta = layer.weight, adapter.delta_weight()
        if adapter.dora_scale is None:
            return with_weight(layer, weight + delta, source)
        norm = (weight + delta).transpose(0, 1).flatten(1).norm(dim=1).view(adapter.dora_scale.shape)
        if kind == "dora":
            norm = norm.detach()
        return with_weight(layer, (weight + delta) * adapter.dora_scale / norm, source)

    for name, ours, expected in zip(("x", *names), gradients(adapter), gradients(merged)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_pointwise_convolution_copies_no_picture(kind):
    """It computes on tokens, which are a view of one picture, and the gradient lies in memory as the picture does."""
    layer, x = layer_and_input("conv_1x1")
    adapter = build(kind, layer)
    randomize(adapter)
    source = x[:1].clone().requires_grad_()
    output = adapter(source)
    assert output.transpose(1, 2).transpose(2, 3).is_contiguous()
    weights, gradients = torch.linspace(-1, 1, output.numel()).view(output.shape), []
    source.register_hook(gradients.append)
    output.backward(weights)
    assert gradients[0].is_contiguous()
    merged = with_weight(layer, adapter.merged_weight().detach(), source)
    torch.testing.assert_close(gradients[0], torch.autograd.grad(merged, source, weights)[0], rtol=1e-4, atol=1e-4)


def test_no_gradient_is_computed_for_an_input_that_needs_none():
    layer, x = layer_and_input("linear")
    adapter = build("lora", layer)
    randomize(adapter)
    adapter(x).sum().backward()
    assert x.grad is None and adapter.lora_down.grad is not None and layer.weight.grad is None


def test_lora_by_definition():
    layer, x = layer_and_input("linear")
    adapter = build("lora", layer)
    randomize(adapter)
    a, b = adapter.export()["lora_down.weight"], adapter.export()["lora_up.weight"]
    expected = x @ layer.weight.T + layer.bias + 2 / 4 * (x @ a.T) @ b.T
    torch.testing.assert_close(adapter(x), expected, rtol=1e-5, atol=1e-5)


def test_locon_by_definition():
    """kohya's: down carries kernel, stride and padding, up is 1 × 1."""
    layer, x = layer_and_input("conv_stride_2")
    adapter = build("lora", layer)
    randomize(adapter)
    tensors = adapter.export()
    assert tensors["lora_down.weight"].shape == (4, 12, 3, 3) and tensors["lora_up.weight"].shape == (20, 4, 1, 1)
    hidden = F.conv2d(x, tensors["lora_down.weight"], stride=2, padding=1)
    expected = layer(x) + 2 / 4 * F.conv2d(hidden, tensors["lora_up.weight"])
    torch.testing.assert_close(adapter(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer_kind", ["linear", "conv_3x3"])
def test_dora_is_what_a1111_applies(layer_kind):
    """dora_scale (1, in[, 1, 1]): column by column, in plain loops."""
    layer, _ = layer_and_input(layer_kind)
    adapter = build("dora", layer)
    randomize(adapter)
    scale = adapter.export()["dora_scale"]
    assert scale.shape == ((1, 24) if layer_kind == "linear" else (1, 12, 1, 1))
    changed = layer.weight + adapter.delta_weight().detach()
    for column in range(changed.shape[1]):
        length = math.sqrt(sum(float(value) ** 2 for value in changed[:, column].flatten()))
        expected = changed[:, column] * float(scale.flatten()[column]) / length
        torch.testing.assert_close(adapter.merged_weight()[:, column].detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_kind", ["linear", "conv_3x3"])
def test_doras_lengths_come_without_the_changed_weight(layer_kind):
    """Also where the change cancels a column, where a column is empty, and after another weight was bound."""
    layer, x = layer_and_input(layer_kind)
    adapter = build("dora", layer)
    randomize(adapter)
    with torch.no_grad():
        layer.weight[:, 0] = 0
        layer.weight[:, 1] = -adapter.delta_weight()[:, 1]
    adapter(x)
    gain = adapter._gain(x).flatten()
    changed = adapter.base_weight() + adapter.delta_weight()
    exact = adapter.dora_scale.flatten() / changed.transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(gain[2:], exact[2:], rtol=1e-5, atol=0)
    torch.testing.assert_close(gain[0], exact[0], rtol=1e-4, atol=0)
    assert 0 < gain[1] < float("inf")
    layer.weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
    changed = adapter.base_weight() + adapter.delta_weight()
    exact = adapter.dora_scale.flatten() / changed.transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(adapter._gain(x).flatten(), exact, rtol=1e-5, atol=0)


def test_loha_by_definition():
    layer, _ = layer_and_input("conv_3x3")
    adapter = build("loha", layer)
    randomize(adapter)
    t = adapter.export()
    assert {k: tuple(v.shape) for k, v in t.items()} == {
        "hada_w1_a": (20, 3),
        "hada_w1_b": (3, 108),
        "hada_w2_a": (20, 3),
        "hada_w2_b": (3, 108),
        "alpha": (),
    }
    expected = torch.zeros(20, 108)
    for i in range(20):
        for j in range(108):
            expected[i, j] = (t["hada_w1_a"][i] @ t["hada_w1_b"][:, j]) * (t["hada_w2_a"][i] @ t["hada_w2_b"][:, j])
    torch.testing.assert_close(
        adapter.delta_weight().detach(), (expected * 2 / 3).view(20, 12, 3, 3), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("kind", "scale"), [("lokr", 1 / 2), ("lokr_full", 1.0)])
@pytest.mark.parametrize("layer_kind", ["linear", "conv_3x3"])
def test_lokr_by_definition(kind, scale, layer_kind):
    """W[a·b', c·d'] = w1[a, c] · w2[b', d'], and a LoKr without a rank has scale 1 whatever alpha says."""
    layer, _ = layer_and_input(layer_kind)
    adapter = build(kind, layer)
    randomize(adapter)
    t = adapter.export()
    w1 = t["lokr_w1"]
    w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    assert ("lokr_w2" in t) == (kind == "lokr_full")
    rows, columns = layer.weight.shape[0] // w1.shape[0], layer.weight.shape[1] // w1.shape[1]
    w2 = w2.view(rows, columns, *layer.weight.shape[2:])
    delta = adapter.delta_weight().detach()
    for out in range(delta.shape[0]):
        for column in range(delta.shape[1]):
            expected = w1[out // rows, column // columns] * w2[out % rows, column % columns] * scale
            torch.testing.assert_close(delta[out, column], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dimension", "factor", "expected"),
    # The table in LyCORIS's own documentation of this function.
    [
        (127, -1, (1, 127)),
        (128, -1, (8, 16)),
        (250, -1, (10, 25)),
        (360, 8, (8, 45)),
        (512, 16, (16, 32)),
        (1024, 4, (4, 256)),
        (250, 4, (2, 125)),
        (320, -1, (16, 20)),
        (1280, 2048, (32, 40)),
    ],
)
def test_factorize(dimension, factor, expected):
    assert factorize(dimension, factor) == expected


def test_initial_weights():
    """kaiming_uniform(a=√5) is uniform in ±1/√fan_in; (seed, name) decides, the global generator does not."""
    layer, _ = layer_and_input("conv_3x3")
    first = LoraAdapter(layer, 64, 64, name="a", seed=1)
    bound = 1 / math.sqrt(12 * 9)
    assert first.lora_down.abs().max() <= bound and not first.lora_up.any()
    assert abs(first.lora_down.std().item() - bound / math.sqrt(3)) < 0.02 * bound
    torch.manual_seed(123)
    assert torch.equal(first.lora_down, LoraAdapter(layer, 64, 64, name="a", seed=1).lora_down)
    assert not torch.equal(first.lora_down, LoraAdapter(layer, 64, 64, name="b", seed=1).lora_down)
    assert not torch.equal(first.lora_down, LoraAdapter(layer, 64, 64, name="a", seed=2).lora_down)
    reference = torch.empty(64, 12, 3, 3)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    assert abs(reference.abs().max().item() - bound) < 0.01 * bound


@pytest.mark.parametrize("option", ["dropout", "rank_dropout"])
@pytest.mark.parametrize("layer_kind", LAYERS)
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_dropout_keeps_the_mean_and_repeats(kind, layer_kind, option):
    layer, x = layer_and_input(layer_kind)
    adapter = build(kind, layer, **{option: 0.4})
    randomize(adapter)
    with pytest.raises(RuntimeError, match="begin_step"):
        adapter(x)
    outputs = []
    for seed in range(300):
        adapter.masks.begin(seed)
        outputs.append(adapter(x).detach())
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[299], adapter(x)), "the same step gives the same mask"
    adapter.eval()
    whole = adapter(x).detach()
    deviation = torch.stack(outputs).std(0) / math.sqrt(len(outputs))
    assert ((torch.stack(outputs).mean(0) - whole).abs() <= 6 * deviation + 1e-5).all()
    state = torch.get_rng_state()
    adapter.train()(x)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must be left alone"


def test_rank_dropout_drops_whole_ranks_of_a_picture():
    layer, x = layer_and_input("linear")
    adapter = build("lora", layer, rank_dropout=0.5)
    randomize(adapter)
    adapter.masks.begin(5)
    with torch.no_grad():
        change = adapter(x) - layer(x)
        hidden = x @ adapter.lora_down.T
        solved = torch.linalg.lstsq(adapter.lora_up.expand(2, -1, -1), change.transpose(1, 2)).solution.transpose(1, 2)
    ratio = solved / hidden / (2 / 4)
    for picture in range(2):
        for rank in range(4):
            values = ratio[picture, :, rank]
            assert torch.allclose(values, values[0].expand_as(values), atol=1e-3)
            assert min(abs(values[0].item()), abs(values[0].item() - 2)) < 1e-3


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_gradient_checkpointing_meets_the_same_masks(kind):
    layer, x = layer_and_input("linear")
    adapter = build(kind, layer, dropout=0.5)
    randomize(adapter)
    adapter.masks.begin(11)
    plain = torch.autograd.grad(adapter(x).square().sum(), list(adapter.parameters()))
    again = checkpoint(adapter.forward, x.clone().requires_grad_(), use_reentrant=False)
    for expected, ours in zip(plain, torch.autograd.grad(again.square().sum(), list(adapter.parameters()))):
        assert torch.equal(expected, ours)


@pytest.mark.parametrize("layer_kind", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_a_low_precision_base(kind, layer_kind):
    """Parameters stay fp32 and get fp32 gradients; the result is that of fp32 within bf16's precision."""
    layer, x = layer_and_input(layer_kind)
    adapter = build(kind, layer)
    randomize(adapter)
    expected = adapter(x).detach()
    for base_dtype in (torch.float32, torch.bfloat16):
        layer.to(base_dtype)
        with torch.autocast("cpu", torch.bfloat16):
            output = adapter(x)
            bare = layer(x)
        assert output.dtype == bare.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.1)
        adapter.zero_grad()
        output.float().sum().backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in adapter.parameters())
    low = adapter(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("dropped", [{}, {"dropout": 0.3}, {"rank_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("layer_kind", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_of_another_format_than_the_computations(kind, layer_kind, dropped):
    """As a WebUI holds it, fp16 beside a computation in fp32: outputs and gradients are those of the base in fp32."""
    results = []
    for casts in (False, True):
        layer, x = layer_and_input(layer_kind)
        layer.half()
        if casts:
            cast_layers(layer, torch.float32)
        else:
            layer.float()
        adapter = build(kind, layer, **dropped)
        randomize(adapter)
        adapter.masks.begin(5)
        x.requires_grad_()
        output = adapter(x)
        output.square().sum().backward()
        results.append([output.detach(), x.grad, *(parameter.grad for parameter in adapter.parameters())])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("layer_kind", LAYERS)
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(kind, layer_kind):
    """LoHa and LoKr change the weight itself; with every layer's copies kept, SDXL would not fit anywhere."""
    layer, x = layer_and_input(layer_kind)
    adapter = build(kind, layer)
    randomize(adapter)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        adapter(x.requires_grad_())
    assert [tensor.shape for tensor in kept] == [x.shape]


def test_a_changed_layer_gives_gradients_to_what_learns_alone():
    layer, x = layer_and_input("linear")
    adapter = build("loha", layer)
    randomize(adapter)
    adapter.hada_w1_a.requires_grad_(False)
    adapter(x).sum().backward()
    assert adapter.hada_w1_a.grad is None and adapter.hada_w2_a.grad.abs().sum() > 0 and x.grad is None


def test_a_column_of_zeros_stays_a_number_under_dora():
    layer, x = layer_and_input("linear")
    layer.weight[:, 3] = 0
    adapter = build("dora", layer)
    adapter(x).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in adapter.parameters())
