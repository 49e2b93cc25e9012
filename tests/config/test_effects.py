"""A setting that changes nothing because of another one is said; one whose meaning is plain is done."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lora_trainer.config import from_mapping, never_reached, to_mapping, without_effect
from lora_trainer.models.families import get_family


@pytest.mark.parametrize(
    ("name", "value", "others"),
    [
        ("text_encoder_lr", 5e-5, {"train_text_encoder": True}),
        ("text_encoder_target_modules", ["attention"], {"train_text_encoder": True}),
        ("lr_cycles", 3, {"lr_scheduler": "cosine_with_restarts"}),
        ("lr_power", 2.0, {"lr_scheduler": "polynomial"}),
        ("lr_warmup_ratio", 0.1, {"lr_warmup_steps": 0}),
        ("epochs", 20, {"max_train_steps": None}),
        ("conv_alpha", 1.0, {"conv_rank": 4}),
        ("lokr_factor", 4, {"adapter": "lokr"}),
        ("huber_c", 0.2, {"loss": "huber"}),
        ("multires_noise_discount", 0.2, {"multires_noise_iterations": 6}),
        ("prior_loss_weight", 0.5, {"reg_data_dir": "reg"}),
        ("preserve_words", ["a dog"], {"preserve": 0.3}),
        ("preserve_pictures", 8, {"preserve": 0.3}),
        ("keep_tokens", 1, {"shuffle_tags": True}),
        ("keep_tokens", 1, {"tag_dropout": 0.1}),
        ("min_bucket_resolution", 320, {"enable_bucket": True}),
        ("bucket_no_upscale", True, {"enable_bucket": True}),
        ("mask_dir", "masks", {"use_masks": True}),
        ("preview_steps", 10, {"preview_prompts": ["a disc"]}),
        ("keep_checkpoints", 2, {"save_steps": 10}),
        ("block_ranks", [4] * 25, {"target_modules": ["attention"]}),
    ],
)
def test_what_depends_on_another_setting_is_said(name, value, others):
    unmet = {
        "train_text_encoder": False, "lr_scheduler": "constant", "lr_warmup_steps": 5, "max_train_steps": 9,
        "conv_rank": 0, "adapter": "lora", "loss": "mse", "multires_noise_iterations": 0, "reg_data_dir": None,
        "shuffle_tags": False, "tag_dropout": 0, "enable_bucket": False, "use_masks": False, "preview_prompts": [],
        "save_steps": None, "target_modules": [], "preserve": 0,
    }  # fmt: skip
    without = {other: unmet[other] for other in others}
    if without == {"target_modules": []}:
        without["train_text_encoder"] = True
    (said,) = without_effect(from_mapping({name: value, **without}))
    assert said.startswith(f"{name}: ") and "has no effect" in said
    assert without_effect(from_mapping({name: value, **others})) == []
    assert without_effect(from_mapping({})) == []


@pytest.mark.parametrize(("name", "silent"), [("sd1", True), ("sd2", False), ("sdxl", False)])
def test_what_the_family_of_the_model_does_not_use_is_said(name, silent):
    family = get_family(name)
    said = without_effect(from_mapping({"clip_skip": 2}), family.unused)
    assert bool(said) != silent and all(text.startswith("clip_skip: 2 has no effect, because ") for text in said)
    assert without_effect(from_mapping({}), family.unused) == []
    encoder = SimpleNamespace(text_model=SimpleNamespace(final_layer_norm=lambda layer: layer))
    output = SimpleNamespace(last_hidden_state="last", hidden_states=["a", "b", "c", "d"])
    read = [family.hidden_state(encoder, output, skip) for skip in (1, 2, 3)]
    assert (len(set(read)) == 1) != silent, "as the family's code says"


@pytest.mark.parametrize(
    ("values", "idle"),
    [
        ({"train_text_encoder": True, "text_encoder_lr": 0}, ["train_text_encoder"]),
        ({"train_text_encoder": True, "text_encoder_lr": 0, "text_encoder_target_modules": ["attention"]},
         ["train_text_encoder", "text_encoder_target_modules"]),
        ({"target_modules": [], "text_encoder_lr": 1e-5, "learning_rate": 3e-4}, ["learning_rate"]),
        ({"target_modules": [], "train_text_encoder": True, "learning_rate": 3e-4}, []),
        ({"train_text_encoder": True, "text_encoder_lr": 1e-5}, []),
    ],
)  # fmt: skip
def test_rates_that_nothing_learns_with_are_said(values, idle):
    assert [text.partition(":")[0] for text in without_effect(from_mapping(values))] == idle


def test_a_rate_for_the_text_encoders_means_training_them():
    assert from_mapping({"text_encoder_lr": 5e-5}).train_text_encoder
    assert not from_mapping({"text_encoder_lr": 0}).train_text_encoder
    refused = from_mapping({"text_encoder_lr": 5e-5, "train_text_encoder": False})
    assert not refused.train_text_encoder and from_mapping(to_mapping(refused)) == refused


def test_min_snr_is_off_where_it_would_silence_the_noise():
    default = from_mapping({})
    assert default.snr_gamma("epsilon", False) == default.snr_gamma("v_prediction", False) == 5
    assert default.snr_gamma("epsilon", True) == 5 and default.snr_gamma("v_prediction", True) is None
    assert from_mapping({"min_snr_gamma": 5}).snr_gamma("v_prediction", True) == 5
    assert from_mapping({"min_snr_gamma": "auto"}) == default
    assert from_mapping({"min_snr_gamma": None}).snr_gamma("epsilon", False) is None
    assert from_mapping({"debiased_estimation": True}).snr_gamma("epsilon", False) is None


def test_what_a_run_is_too_short_for_is_said_with_the_number():
    config = from_mapping(
        {"save_steps": 9, "save_epochs": 4, "preview_prompts": ["x"], "preview_steps": 8, "lr_warmup_steps": 7}
    )
    told = never_reached(config, 6, 2)
    assert [one.split()[0] for one in told] == ["save_steps:", "save_epochs:", "preview_steps:", "lr_warmup_steps"]
    assert all("6 steps" in one for one in told) and not never_reached(config, 9, 2)
