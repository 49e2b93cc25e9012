"""The convolutions of the CPU that are computed as one matrix product: torch's own sums, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.grad import conv2d_input
from torch.utils._python_dispatch import TorchDispatchMode

from lora_trainer.adapters.lora import LoraAdapter
from lora_trainer.convolution import FEW_POSITIONS, LARGE_WEIGHT, convolve, input_gradient
from lora_trainer.models.casting import cast_layers


class Convolutions(TorchDispatchMode):
    """How many of torch's own are computed."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function._schema.name in ("aten::convolution", "aten::convolution_backward")
        return function(*arguments, **keywords or {})


@pytest.fixture(scope="module")
def weight():
    torch.manual_seed(0)
    weight = torch.randn(1120, 1000, 3, 3) / 95
    assert weight.numel() >= LARGE_WEIGHT
    return weight


def other_layouts(x):
    wider = torch.empty(*x.shape[:3], x.shape[3] + 3)[..., 2:-1]
    return [x.to(memory_format=torch.channels_last), wider.copy_(x)]


CASES = [
    # batch, height, width, stride, padding
    (1, 4, 6, (1, 1), (1, 1)),
    (3, 5, 4, (1, 1), (1, 1)),
    (2, 8, 7, (2, 2), (1, 1)),
    (1, 9, 8, (2, 1), (0, 2)),
    (2, 6, 6, (1, 1), (0, 0)),
]


@pytest.mark.parametrize(("batch", "height", "width", "stride", "padding"), CASES)
def test_a_product_gives_what_torchs_convolution_does(weight, batch, height, width, stride, padding):
    torch.manual_seed(1)
    x, bias, options = torch.randn(batch, 1000, height, width), torch.randn(1120), (stride, padding, (1, 1))
    expected = functional.conv2d(x, weight, bias, *options)
    grad = torch.randn_like(expected)
    with Convolutions() as made:
        output, grad_x = convolve(x, weight, bias, *options), input_gradient(x.shape, weight, grad, *options)
        for other in other_layouts(x):
            assert torch.equal(convolve(other, weight, bias, *options), output)
        for other in other_layouts(grad):
            assert torch.equal(input_gradient(x.shape, weight, other, *options), grad_x)
    assert made.count == 0
    assert output.is_contiguous()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_x, conv2d_input(x.shape, weight, grad, *options), rtol=1e-4, atol=1e-4)


def test_a_weight_may_begin_anywhere_in_memory(weight):
    torch.manual_seed(1)
    x, options = torch.randn(1, 1000, 3, 3), ((1, 1), (1, 1), (1, 1))  # nine positions, the fewest there are
    moved = torch.empty(weight.numel() + 1)[1:].view(weight.shape).copy_(weight)
    with Convolutions() as made:
        output = convolve(x, weight, None, *options)
        assert torch.equal(convolve(x, moved, None, *options), output)
        grad_x = input_gradient(x.shape, weight, output, *options)
        assert torch.equal(input_gradient(x.shape, moved, output, *options), grad_x)
    assert made.count == 0


@pytest.mark.parametrize("case", ["small weight", "many positions", "few positions", "dilated", "half", "last"])
def test_what_torch_computes_quicker_is_left_to_it(weight, case):
    x, dilation = torch.randn(1, 1000, 4, 4), (1, 1)
    if case == "small weight":
        weight = weight[:512]
    elif case == "many positions":
        x = torch.randn(1, 1000, 1, FEW_POSITIONS + 1)
    elif case == "few positions":
        x = torch.randn(2, 1000, 2, 2)
    elif case == "dilated":
        dilation = (2, 2)
    elif case == "half":
        x, weight = x.bfloat16(), weight.bfloat16()
    else:
        weight = weight.to(memory_format=torch.channels_last)
    options = ((1, 1), dilation, dilation)
    with Convolutions() as made:
        output = convolve(x, weight, None, *options)
        input_gradient(x.shape, weight, output, *options)
    assert made.count == 2
    assert torch.equal(output, functional.conv2d(x, weight, None, *options))


def test_a_layer_with_a_locon_and_without_has_the_same_gradients_as_torch(weight):
    torch.manual_seed(1)
    layer = nn.Conv2d(1000, 1120, 3, padding=1).requires_grad_(False)
    layer.weight.copy_(weight)
    x = torch.randn(1, 1000, 4, 4, requires_grad=True)
    grad = torch.randn(1, 1120, 4, 4)
    (plain,) = torch.autograd.grad(layer(x), x, grad)
    cast_layers(layer, torch.float32)
    with Convolutions() as made:
        (cast,) = torch.autograd.grad(layer(x), x, grad)
        with torch.no_grad():
            layer(x)
    assert made.count == 0
    torch.testing.assert_close(cast, plain, rtol=1e-4, atol=1e-4)

    adapter = LoraAdapter(layer, 4, 4.0)
    with torch.no_grad():
        adapter.lora_up.normal_()
    inputs = [x, adapter.lora_down, adapter.lora_up]
    fused = torch.autograd.grad(adapter(x), inputs, grad)
    composed = functional.conv2d(functional.conv2d(x, adapter.lora_down, None, 1, 1), adapter.lora_up)
    expected = torch.autograd.grad(functional.conv2d(x, weight, layer.bias, 1, 1) + composed, inputs, grad)
    for ours, theirs in zip(fused, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
