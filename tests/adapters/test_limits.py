"""scale_weight_norms and module_dropout, for every kind of adapter."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.adapters.inject import AdapterSet
from tests.adapters.layers import randomize, settings, unet_targets

KINDS = {
    "lora": {"lora_rank": 4, "conv_rank": 4}, "dora": {"lora_rank": 4, "conv_rank": 4, "dora": True},
    "loha": {"adapter": "loha", "lora_rank": 4, "conv_rank": 4},
    "lokr": {"adapter": "lokr", "lora_rank": 1, "conv_rank": 1},
}  # fmt: skip


def built(kind, **values):
    adapters = AdapterSet.build(unet_targets(), settings(**KINDS[kind], **values))
    randomize(adapters)
    return adapters


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_that_is_too_large_is_scaled_down_and_others_are_not(kind):
    adapters = built(kind, alpha=2.0)
    before = {target.kohya_name: adapter.delta_weight().detach().clone() for target, adapter in adapters.items()}
    norms = sorted(float(delta.norm()) for delta in before.values())
    maximum = norms[len(norms) // 2]
    adapters.limit_norms(maximum)
    for target, adapter in adapters.items():
        old = before[target.kohya_name]
        expected = old * min(1.0, maximum / float(old.norm()))
        torch.testing.assert_close(adapter.delta_weight().detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layers_whole_lora_is_switched_off_now_and_then(kind):
    adapters = built(kind, module_dropout=0.5)
    target = next(one for one, _ in adapters.items() if one.diffusers_name.endswith("ff.net.2"))
    x = torch.randn(3, 32)
    with adapters:
        adapters.eval()
        whole = target.module(x)
        with adapters.enabled(False):
            bare = target.module(x)
        adapters.train()
        off = 0
        for step in range(60):
            adapters.begin_step(step)
            seen, again = target.module(x), target.module(x)
            assert torch.equal(seen, again)
            if kind != "dora" and torch.allclose(seen, bare, atol=1e-6):
                off += 1
            elif kind != "dora":
                torch.testing.assert_close(seen, whole, rtol=1e-4, atol=1e-5)
            elif not torch.allclose(seen, whole, atol=1e-5):
                off += 1
    assert 15 < off < 45
