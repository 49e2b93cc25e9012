from __future__ import annotations

from collections import Counter

import pytest
import torch

from lora_trainer.models.detect import detect
from lora_trainer.models.families import targets_of
from tests.tiny import SD1_FULL, SD2_FULL, SDXL_FULL, sd1_shapes, sd2_shapes, sdxl_shapes

SHAPES = {"sd1": sd1_shapes(**SD1_FULL), "sd2": sd2_shapes(**SD2_FULL), "sdxl": sdxl_shapes(**SDXL_FULL)}


@pytest.fixture(scope="module")
def full_width():
    """Targets of the models at their real width, without any weights: {family: targets}."""
    return {family: targets_of(detect(shapes)) for family, shapes in SHAPES.items()}


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("sd1", {"unet": 192, "text_encoder": 72}),
        ("sd2", {"unet": 192, "text_encoder": 138}),  # 23 layers, as in kohya's: the 24th is never run
        ("sdxl", {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}),
    ],
)
def test_counts_of_kohyas_linear_layers(full_width, family, counts):
    linear = [target for target in full_width[family] if target.group in ("attention", "feed_forward", "projection")]
    assert Counter(target.part for target in linear) == counts
    names = [target.kohya_name for target in full_width[family]]
    assert len(set(names)) == len(names)


# Keys found in published LoRAs, and the block that kohya's get_block_index gives them.
KNOWN = {
    "sd1": {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": ("attention", 1),
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_ff_net_0_proj": ("feed_forward", 8),
        "lora_unet_down_blocks_3_resnets_1_conv2": ("conv", 11),
        "lora_unet_down_blocks_0_downsamplers_0_conv": ("conv", 3),
        "lora_unet_mid_block_attentions_0_proj_in": ("projection", 12),
        "lora_unet_up_blocks_0_resnets_0_time_emb_proj": ("conv_linear", 13),
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0": ("attention", 16),
        "lora_unet_up_blocks_2_upsamplers_0_conv": ("conv", 21),
        "lora_unet_up_blocks_3_attentions_2_proj_out": ("projection", 24),
        "lora_unet_up_blocks_3_resnets_2_conv_shortcut": ("conv_linear", 24),
        "lora_te_text_model_encoder_layers_11_self_attn_q_proj": ("attention", None),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": ("feed_forward", None),
    },
    "sd2": {
        "lora_unet_mid_block_attentions_0_proj_out": ("projection", 12),
        "lora_te_text_model_encoder_layers_22_self_attn_out_proj": ("attention", None),
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": ("attention", 5),
        "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_2": ("feed_forward", 9),
        "lora_unet_input_blocks_3_0_op": ("conv", 4),
        "lora_unet_input_blocks_4_0_skip_connection": ("conv_linear", 5),
        "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_v": ("attention", 11),
        "lora_unet_middle_block_2_out_layers_3": ("conv", 12),
        "lora_unet_output_blocks_0_0_in_layers_2": ("conv", 13),
        "lora_unet_output_blocks_2_2_conv": ("conv", 15),
        "lora_unet_output_blocks_5_1_proj_in": ("projection", 18),
        "lora_unet_output_blocks_8_0_emb_layers_1": ("conv_linear", 21),
        "lora_te1_text_model_encoder_layers_11_mlp_fc2": ("feed_forward", None),
        "lora_te2_text_model_encoder_layers_31_self_attn_v_proj": ("attention", None),
    },
}


@pytest.mark.parametrize("family", sorted(KNOWN))
def test_known_names_and_blocks(full_width, family):
    ours = {target.kohya_name: (target.group, target.block) for target in full_width[family]}
    assert {name: ours.get(name) for name in KNOWN[family]} == KNOWN[family]


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_checkpoint_names_are_in_the_file_and_fit(full_width, family):
    missing = []
    for target in full_width[family]:
        if target.checkpoint_name is None:
            assert target.part.startswith("text_encoder") and "self_attn" in target.kohya_name
            missing.append(target)
            continue
        shape = SHAPES[family][f"{target.checkpoint_name}.weight"]
        assert torch.Size(shape) == target.module.weight.shape
    fused = {"sd1": 0, "sd2": 3 * 23, "sdxl": 3 * 32}[family]
    assert len(missing) == fused


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_conv_groups_follow_the_kernel(full_width, family):
    for target in full_width[family]:
        kernel = getattr(target.module, "kernel_size", None)
        assert (kernel == (3, 3)) == (target.group == "conv")
        assert target.diffusers_name.startswith(target.part + ".")
