from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.adapters.inject import AdapterSet, rank_and_alpha
from lora_trainer.adapters.selection import GROUPS, select_targets
from lora_trainer.errors import UserError
from tests.adapters.layers import settings, text_targets, unet_targets

UNET, TEXT = unet_targets(), text_targets()


def picked(patterns, conv_rank=0, targets=UNET):
    return [target.diffusers_name.split(".", 1)[1] for target in select_targets(targets, patterns, conv_rank)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("attention", r"attn\d\.to_"),
        ("feed_forward", r"ff\.net"),
        ("projection", r"proj_(in|out)$"),
        ("to_q", r"to_q$"),
        ("q_proj", r"to_q$"),
        ("v_proj", r"to_v$"),
        ("out_proj", r"to_out\.0$"),
        ("to_out", r"to_out"),
        ("ff.net", r"ff\.net"),
        ("ff.net.0.proj", r"net\.0\.proj$"),
        ("ff_net_0_proj", r"net\.0\.proj$"),
        ("ff.net.2", r"net\.2$"),
        ("attn2", r"attn2"),
        ("attn1.to_q", r"attn1\.to_q"),
        ("attn1.q_proj", r"attn1\.to_q"),
        ("attn1_to_q", r"attn1\.to_q"),
        ("proj_in", r"proj_in$"),
        ("down_blocks.0", r"^down_blocks\.0\.attentions"),
        (" to_k ", r"to_k$"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", r"^down_blocks.*proj_in$"),
        ("/up_blocks.*to_[qk]$/", r"^up_blocks.*to_[qk]$"),
        ("/lora_unet_up_.*attn1_to_v/", r"^up_blocks.*attn1\.to_v$"),
        ("time_emb_proj", r"time_emb_proj$"),
    ],
)
def test_a_pattern_names_layers(pattern, expected):
    paths = [target.diffusers_name.removeprefix("unet.") for target in UNET]
    wanted = [path for path in paths if re.search(expected, path)]
    assert wanted and picked([pattern]) == wanted


def test_clip_names_and_unet_names_in_text_encoders():
    assert picked(["to_q"], targets=TEXT) == picked(["q_proj"], targets=TEXT)
    assert picked(["q_proj", "fc1"], targets=TEXT) == [
        f"text_model.encoder.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.fc1")
    ]


def test_conv_rank_adds_the_resnets_unless_patterns_name_some():
    without = picked(list(GROUPS))
    everything = picked(list(GROUPS), conv_rank=4)
    assert len(without) == 20 and len(everything) == len(UNET) == 24
    some = picked([*GROUPS, "/up_blocks.*conv1/"], conv_rank=4)
    assert set(some) - set(without) == {"up_blocks.1.resnets.0.conv1"}
    with pytest.raises(UserError, match="conv_rank") as error:
        picked(["conv1"])
    assert error.value.field == "target_modules"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["to_qq"], "'to_q'"),
        (["attentoin"], "'attention'"),
        (["q_prj"], "'q_proj'"),
        (["/nothing/"], "names no layer"),
        (["/(/"], "regular expression"),
        ([""], "names no layer"),
        ([], "no layer would learn"),
        (["."], "names no layer"),
        (["to_q", "xyzzy"], "'xyzzy'"),
        (["to"], "names no layer"),
        (["//"], None),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(patterns, message):
    if message is None:
        assert len(picked(patterns)) == 20  # the empty expression is in every name
        return
    with pytest.raises(UserError) as error:
        picked(patterns)
    assert error.value.field == "target_modules" and message in str(error.value)


@given(st.lists(st.text(max_size=12) | st.sampled_from(["to_q", "ff.net", *GROUPS, "/to_/", "conv1"]), max_size=5))
def test_any_patterns_select_in_order_or_are_refused(patterns):
    try:
        chosen = select_targets(UNET, patterns, 0)
    except UserError as error:
        assert error.field == "target_modules"
        return
    positions = [UNET.index(target) for target in chosen]
    assert positions == sorted(set(positions)) and positions
    assert all(target.group != "conv" for target in chosen)


@given(st.lists(st.sampled_from(["to_q", "k_proj", "ff.net", "proj_out", *GROUPS]), min_size=1, max_size=4))
def test_a_selection_is_the_union_of_its_patterns(patterns):
    assert set(picked(patterns)) == set().union(*(picked([pattern]) for pattern in patterns))


# -- AdapterSet.build, ranks, groups -------------------------------------------------------------------------


def test_text_encoders_only_when_they_are_trained():
    def parts(**values):
        return {target.part for target, _ in AdapterSet.build([*UNET, *TEXT], settings(**values)).items()}

    assert parts() == {"unet"}
    assert parts(train_text_encoder=True) == {"unet", "text_encoder"}
    assert parts(train_text_encoder=True, text_encoder_lr=0.0) == {"unet"}
    assert parts(train_text_encoder=True, target_modules=[]) == {"text_encoder"}
    with pytest.raises(UserError, match="no layer"):
        parts(train_text_encoder=True, text_encoder_lr=0.0, target_modules=[])


def test_ranks_and_alphas():
    config = settings(lora_rank=8, alpha=4.0, conv_rank=2)
    found = {t.group: (a.rank, a.alpha) for t, a in AdapterSet.build(UNET, config).items()}
    assert found["conv"] == (2, 2.0) and found["conv_linear"] == (8, 4.0) == found["attention"]
    ranks = [0] * 25
    ranks[1], ranks[16] = 3, 0
    config = settings(block_ranks=ranks, conv_rank=2)
    built = AdapterSet.build(UNET, config)
    assert {target.block for target, _ in built.items()} == {1}
    assert rank_and_alpha(UNET[0], config) == (3, 3.0)
    for field, values in (("block_ranks", [4] * 24), ("block_ranks", [0] * 25), ("block_lr_weights", [0.0] * 25)):
        with pytest.raises(UserError) as error:
            config = settings(**{field: values})
            AdapterSet.build(UNET, config).param_groups(config)
        assert error.value.field == field


def test_param_groups():
    weights = [1.0] * 25
    weights[1], weights[16] = 0.5, 0.0
    config = settings(train_text_encoder=True, learning_rate=1e-3, block_lr_weights=weights)
    adapters = AdapterSet.build([*UNET, *TEXT], config)
    groups = adapters.param_groups(config)
    assert [(group["name"], group["lr"]) for group in groups] == [("unet_block_01", 5e-4), ("text_encoder", 5e-4)]
    listed = {id(parameter) for group in groups for parameter in group["params"]}
    assert listed == {id(parameter) for parameter in adapters.parameters() if parameter.requires_grad}
    assert not any("up_blocks" in key for key in adapters.export()), "frozen layers that change nothing are not saved"
    plain = settings(train_text_encoder=True, text_encoder_lr=3e-5)
    groups = AdapterSet.build([*UNET, *TEXT], plain).param_groups(plain)
    assert [(group["name"], group["lr"]) for group in groups] == [("unet", 1e-4), ("text_encoder", 3e-5)]


def test_attach_and_detach_leave_no_trace():
    def host_forward(x):
        return x

    UNET[1].module.forward = host_forward
    try:
        before = [dict(vars(target.module)) for target in UNET]
        adapters = AdapterSet.build(UNET, settings(conv_rank=2))
        with pytest.raises(ZeroDivisionError), adapters:
            assert UNET[1].module.forward == adapters._modules[UNET[1].kohya_name].forward
            with pytest.raises(RuntimeError, match="attached already"):
                adapters.attach()
            raise ZeroDivisionError
        adapters.detach()
        assert [dict(vars(target.module)) for target in UNET] == before
        assert UNET[1].module.forward is host_forward
    finally:
        del UNET[1].module.forward


def test_state_dict_holds_the_trained_tensors_only():
    adapters = AdapterSet.build(UNET, settings(target_modules=["to_q"], dora=True))
    names = {name.rpartition(".")[2] for name in adapters.state_dict()}
    assert names == {"lora_down", "lora_up", "dora_scale"}
    assert len(adapters.state_dict()) == 3 * 4
