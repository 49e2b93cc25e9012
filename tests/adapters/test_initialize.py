"""Continuing from a LoRA: the change is kept, or approximated as well as its rank allows."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.adapters.algebra import truncated_factors, truncated_product
from lora_trainer.adapters.export import save_lora
from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.errors import UserError
from tests.adapters.layers import randomize, settings, unet_targets

UNET = unet_targets()


@pytest.fixture
def saved(tmp_path):
    def save(**values):
        adapters = AdapterSet.build(UNET, settings(**values))
        randomize(adapters)
        save_lora(adapters, tmp_path / "old.safetensors", {"ss_base_model_version": "sd_v1"}, "fp32")
        return adapters, read_lora(tmp_path / "old.safetensors")

    return save


def merged(adapters):
    return {target.kohya_name: adapter.merged_weight().detach() for target, adapter in adapters.items()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"lora_rank": 4}, {"lora_rank": 4}),
        ({"lora_rank": 4, "alpha": 1.0}, {"lora_rank": 4, "alpha": 8.0}),
        ({"lora_rank": 3, "alpha": 1.0}, {"lora_rank": 5}),
        ({"lora_rank": 3}, {"lora_rank": 3, "dora": True}),
        ({"lora_rank": 3, "dora": True}, {"lora_rank": 5, "alpha": 2.0, "dora": True}),
        ({"lora_rank": 2, "adapter": "loha"}, {"lora_rank": 8, "conv_rank": 8}),
        ({"lora_rank": 1, "adapter": "lokr"}, {"lora_rank": 8, "conv_rank": 8}),
        ({"lora_rank": 3, "dora": True}, {"lora_rank": 8, "conv_rank": 8}),
        ({"lora_rank": 2, "adapter": "loha", "alpha": 1.0}, {"lora_rank": 2, "adapter": "loha", "alpha": 3.0}),
        ({"lora_rank": 1, "adapter": "lokr", "alpha": 3.0}, {"lora_rank": 1, "adapter": "lokr"}),
        ({"lora_rank": 2, "adapter": "loha"}, {"lora_rank": 2, "adapter": "loha", "dora": True}),
    ],
)
def test_the_change_is_kept(saved, old, new):
    # 8 × 8 layers: rank 8 can hold any change.
    before, lora = saved(conv_rank=2, **old)
    after = AdapterSet.build(UNET, settings(**{"conv_rank": 3 if new.get("adapter", "lora") == "lora" else 2, **new}))
    init_from(after, lora)
    for name, weight in merged(before).items():
        torch.testing.assert_close(merged(after)[name], weight, rtol=1e-4, atol=2e-5)


def test_new_ranks_can_learn(saved):
    _, lora = saved(lora_rank=2)
    after = AdapterSet.build(UNET, settings(lora_rank=6))
    init_from(after, lora)
    for _, adapter in after.items():
        assert adapter.lora_down[2:].any(1).all() and not adapter.lora_up[:, 2:].any()


def test_a_lower_rank_is_the_best_approximation(saved):
    before, lora = saved(lora_rank=6, alpha=3.0)
    after = AdapterSet.build(UNET, settings(lora_rank=2, alpha=5.0))
    warnings = init_from(after, lora)
    assert any("rank" in warning for warning in warnings)
    for (_, old), (_, new) in zip(before.items(), after.items()):
        values = torch.linalg.svdvals(old.delta_weight().detach().flatten(1))
        error = (old.delta_weight() - new.delta_weight()).norm().item()
        assert error == pytest.approx(values[2:].norm().item(), rel=1e-3)  # Eckart–Young


def test_truncated_product_is_the_svd_of_the_product():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 40, generator=generator), torch.randn(30, 6, generator=generator)
    for rank in (1, 3, 6, 9):
        for d, u in (truncated_product(down, up, rank), truncated_factors(up @ down, rank)):
            assert len(d) == u.shape[1] == min(rank, 6)
            error = (up @ down - u @ d).norm()
            torch.testing.assert_close(error, torch.linalg.svdvals(up @ down)[rank:].norm(), rtol=1e-3, atol=1e-4)
    zero_down, zero_up = truncated_factors(torch.zeros(4, 5), 3)
    assert zero_down.shape == (0, 5) and zero_up.shape == (4, 0)


def test_layers_that_do_not_match_are_told(saved):
    _, lora = saved(target_modules=["to_q", "to_k"])
    after = AdapterSet.build(UNET, settings(target_modules=["to_k", "to_v"]))
    first, second = init_from(after, lora)
    assert "4 of its layers" in first and "lacks 2 of the 6" in second
    assert [adapter.is_neutral() for _, adapter in after.items()] == [
        "to_v" in target.kohya_name for target, _ in after.items()
    ]
    with pytest.raises(UserError, match="no layer that this run trains"):
        init_from(AdapterSet.build(UNET, settings(target_modules=["proj_out"])), lora)


def test_another_family_another_kind_or_broken_weights_are_refused(saved):
    _, lora = saved(target_modules=["attn2.to_k"])
    for weights in lora.modules.values():
        weights.tensors["lora_down.weight"] = weights.tensors["lora_down.weight"][:, :5]
    with pytest.raises(UserError, match="does not fit this model") as error:
        init_from(AdapterSet.build(UNET, settings(target_modules=["attn2.to_k"])), lora)
    assert "sd_v1" in str(error.value) and error.value.field == "init_lora"

    _, lora = saved(lora_rank=2)
    with pytest.raises(UserError, match="of other sizes"):
        init_from(AdapterSet.build(UNET, settings(adapter="loha", lora_rank=2)), lora)
    _, lora = saved(adapter="loha", lora_rank=2, dora=True)
    with pytest.raises(UserError, match="dora"):
        init_from(AdapterSet.build(UNET, settings(adapter="loha", lora_rank=2)), lora)
    next(iter(lora.modules.values())).tensors["hada_w1_a"][0, 0] = float("inf")
    with pytest.raises(UserError, match="not numbers"):
        init_from(AdapterSet.build(UNET, settings(lora_rank=2)), lora)
