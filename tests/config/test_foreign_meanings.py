"""What other trainers' settings decide without being plain about it: layers, noise, ranks, defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lora_trainer.config import from_mapping, read_text
from tests.config import foreign_presets as presets

PLACES = Path("/models/base.safetensors"), Path("/data"), Path("/out")
_ALL = ["attention", "feed_forward", "projection"]
_FOLDER = "[[datasets.subsets]]\nimage_dir = '/a'\n"


def read(text: str):
    settings, report = read_text(text)
    assert report is not None
    return from_mapping(settings), report


def said(report) -> str:
    return report.to_text()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"additional_parameters": "--network_train_unet_only"}, {"train_text_encoder": False}),
        ({"additional_parameters": "--network_train_text_encoder_only"}, {"target_modules": []}),
        ({"noise_offset_type": "Multires", "multires_noise_iterations": 6},
         {"noise_offset": 0.0, "multires_noise_iterations": 6}),
        ({"noise_offset_type": "Original", "multires_noise_iterations": 6},
         {"noise_offset": 0.05, "multires_noise_iterations": 0}),
        ({"noise_offset_type": "Multires", "additional_parameters": "--noise_offset 0.1"}, {"noise_offset": 0.1}),
        ({"bucket_reso_steps": 1}, {"bucket_step": 8}),
        ({"bucket_reso_steps": 20, "LoRA_type": "Flux1"}, {"bucket_step": 32}),
        ({"network_dim": 100000, "network_alpha": 50000}, {"lora_rank": 1024, "alpha": 512.0}),
        ({"LoRA_type": "LyCORIS/LoKr", "network_dim": 100000, "conv_dim": 100000},
         {"lora_rank": 1024, "alpha": None, "conv_rank": 1024, "conv_alpha": None}),
        ({"debiased_estimation_loss": True, "min_snr_gamma": 5}, {"debiased_estimation": True, "min_snr_gamma": None}),
        ({"LoRA_type": "LyCORIS/LoHa", "dora_wd": True}, {"dora": False, "adapter": "loha"}),
    ],
)  # fmt: skip
def test_of_the_gui_what_decides_is_obeyed_or_said(given, expected):
    config, report = read(presets.kohya_gui(*PLACES, **{"text_encoder_lr": 1e-4, **given}))
    assert {name: getattr(config, name) for name in expected} == expected
    name = next(iter(given))
    if name not in ("additional_parameters", "LoRA_type"):
        assert name in said(report) and name not in report.ignored


@pytest.mark.parametrize(
    ("preset", "text", "conv", "layers"),
    [
        ("full", True, 4, _ALL), ("full-lin", True, 0, [*_ALL, "conv_linear"]), ("attn-mlp", True, 0, _ALL),
        ("attn-only", True, 0, ["attention"]), ("unet-only", False, 4, _ALL),
        ("unet-transformer-only", False, 0, _ALL), ("unet-convblock-only", False, 4, ["conv", "conv_linear"]),
        ("/a/preset.toml", True, 4, _ALL),
    ],
)  # fmt: skip
def test_presets_of_lycoris(preset, text, conv, layers):
    gui = presets.kohya_gui(*PLACES, LoRA_type="LyCORIS/LoHa", LyCORIS_preset=preset, text_encoder_lr=1e-4)
    script = f'''network_module = "lycoris.kohya"
network_args = ["algo=loha", "preset={preset}"]'''
    for source in (gui, script):
        config, report = read(source)
        assert (config.train_text_encoder, config.conv_rank, config.target_modules) == (text, conv, layers)
        assert {one.value for one in report.unmet} == ({preset} if preset.startswith("/") else set())


def test_layers_of_the_preset_attn_only_in_the_text_encoders_too():
    config, _ = read(presets.kohya_gui(*PLACES, LoRA_type="LyCORIS/LoHa", LyCORIS_preset="attn-only"))
    assert config.text_encoder_target_modules == ["attention"]


def test_a_lokr_of_ai_toolkit_learns_whole_matrices_unless_it_says_otherwise():
    values = yaml.safe_load(presets.ai_toolkit(*PLACES))
    process = values["config"]["process"][0]
    process["network"] = {"type": "lokr", "linear": 8, "lokr_factor": 8}
    del process["train"]["steps"]
    config, report = read(yaml.safe_dump(values))
    assert (config.lora_rank, config.alpha, config.conv_rank, config.max_train_steps) == (1024, None, 1024, 1000)
    assert "whole matrices" in said(report) and "ai-toolkit takes 1000" in said(report)
    process["network"]["lokr_full_rank"] = False
    assert read(yaml.safe_dump(values))[0].lora_rank == 8


def test_samples_of_ai_toolkit_keep_their_own_flags():
    values = yaml.safe_load(presets.ai_toolkit(*PLACES))
    values["config"]["process"][0]["sample"] = {"samples": [{"prompt": "x", "seed": 0, "neg": "q"}], "width": 64}
    assert read(yaml.safe_dump(values))[0].preview_prompts == ["x --w 64 --d 0 --n q"]


def test_flags_of_a_prompt_of_ai_toolkit_go_before_the_samples():
    values = yaml.safe_load(presets.ai_toolkit(*PLACES))
    values["config"]["process"][0]["sample"] = {"prompts": ["x --seed 5 --w 768"], "seed": 4, "width": 64, "height": 64}
    assert read(yaml.safe_dump(values))[0].preview_prompts == ["x --seed 5 --w 768 --h 64"]


def test_buckets_that_a_dataset_config_leaves_out_are_those_of_sd_scripts():
    config, report = read(f"[[datasets]]\nresolution = 64\n{_FOLDER}")
    assert not config.enable_bucket and "enable_bucket is not given" in said(report)
    config, report = read(f"[[datasets]]\nenable_bucket = true\nbucket_reso_steps = 1\n{_FOLDER}")
    assert (config.max_bucket_resolution, config.bucket_step) == (1024, 8)
    config, _ = read(f"network_dim = 8\nenable_bucket = false\n[[datasets]]\nenable_bucket = true\n{_FOLDER}")
    assert config.enable_bucket, "the dataset_config goes before the arguments"


def test_onetrainer_trains_all_layers_where_the_file_names_none():
    config, report = read(presets.onetrainer(*PLACES))
    assert config.conv_rank == 4 and "layer_filter_preset is not given" in said(report)
    assert read(presets.onetrainer(*PLACES, layer_filter_preset="attn-mlp"))[0].conv_rank == 0
    assert read(presets.onetrainer(*PLACES, lora_layer_preset="attn-mlp"))[0].conv_rank == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lr_warmup_steps: 0.1", {"lr_warmup_ratio": 0.1, "lr_warmup_steps": 0}),
        ("network_args: [conv_dim=4, conv_alpha=2]", {"conv_rank": 4, "conv_alpha": 2.0}),
        ("text_encoder_lr: [1e-5, 1e-5]", {"text_encoder_lr": 1e-5, "train_text_encoder": True}),
        ("resolution: [512, 768]", {"resolution": "512x768"}),
        ("clip_skip: 0", {"clip_skip": 1}),
    ],
)
def test_sd_scripts_way_to_write_a_value_in_a_file_of_our_own(line, expected):
    config, report = read(f"base_model: b\nlora_rank: 4\n{line}\n")
    assert {name: getattr(config, name) for name in expected} == expected and config.lora_rank == 4
    assert report.taken or report.ignored


def test_rates_of_which_one_counts_are_said():
    _, report = read("lora_rank: 4\ntext_encoder_lr: [1e-5, 2e-5]\n")
    assert "text_encoder_lr has several rates" in said(report)


@pytest.mark.parametrize(
    ("given", "value"),
    [({"trigger_word": '"zwx"'}, "zwx"), ({"learning_rate": "“1e-4”"}, 1e-4), ({"epochs": "'3'"}, 3),
     ({"train_data_dir": "“D:/a”"}, "D:/a"), ({"preview_prompts": "'a', 'b'"}, ["'a', 'b'"]),
     ({"description": '"a"'}, '"a"')],
)  # fmt: skip
def test_quotes_around_a_value(given, value):
    (name,) = given
    assert getattr(from_mapping(given), name) == value
