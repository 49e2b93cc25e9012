"""Convolutions whose weights lie channels last compute the same, in the levels that were asked for."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import TrainConfig
from lora_trainer.models.families.unet.layout import levels_of
from tests.adapters.layers import randomize
from tests.models.test_blocks import answer, model  # noqa: F401 - a fixture


def laid_out(module: torch.nn.Module) -> list[bool]:
    """Of each convolution with a kernel larger than 1 × 1, whether its weight lies channels last."""
    layers = [one for one in module.modules() if isinstance(one, torch.nn.Conv2d) and one.kernel_size != (1, 1)]
    assert layers
    return [one.weight.is_contiguous(memory_format=torch.channels_last) for one in layers]


def test_only_the_chosen_level_changes_and_the_answer_stays(model):  # noqa: F811
    expected, expected_gradient = answer(model.unet)
    model.use_channels_last([1])
    for _ in range(2):
        high, low = levels_of(model.unet)
        assert all(all(laid_out(part)) for part in low) and not any(any(laid_out(part)) for part in high)
        output, gradient = answer(model.unet)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
        model.residency.make_room([])  # it leaves and is read again
        model.residency.load("unet")


def test_measuring_leaves_the_weights_as_they_are(model):  # noqa: F811
    before = {name: (parameter.data_ptr(), parameter.stride()) for name, parameter in model.unet.named_parameters()}
    times = model.layout_times((8, 12), 2)
    assert len(times) == 2 and all(one.stored > 0 and one.channels_last > 0 for one in times)
    after = {name: (parameter.data_ptr(), parameter.stride()) for name, parameter in model.unet.named_parameters()}
    assert after == before


ADAPTERS = {"locon": {}, "dora": {"dora": True}, "loha": {"adapter": "loha"}, "lokr": {"adapter": "lokr"}}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_on_them_learn_the_same(model, kind):  # noqa: F811
    config = TrainConfig(lora_rank=2, conv_rank=2, **ADAPTERS[kind])

    def learned():
        with AdapterSet.build([target for target in model.lora_targets() if target.part == "unet"], config) as adapters:
            randomize(adapters, deviation=0.05)
            return answer(model.unet, list(adapters.parameters()))

    expected = torch.cat([tensor.flatten() for tensor in learned()])
    model.use_channels_last([0, 1])
    found = torch.cat([tensor.flatten() for tensor in learned()])
    assert (found - expected).norm() <= 1e-4 * expected.norm()
