"""Other trainers' settings of FLUX.1, Chroma and Stable Diffusion 3: what each of them becomes here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lora_trainer.config import read_text
from tests.config import foreign_presets as presets
from tests.config.test_foreign import changed, read, unmet

BASE, DATA, OUTPUT = Path("/models/flux1-dev.safetensors"), Path("/data/discs"), Path("/out")

FLUX_TOML = """
pretrained_model_name_or_path = "/models/flux1-dev.safetensors"
clip_l = "/models/clip_l.safetensors"
t5xxl = "/models/t5xxl_fp16.safetensors"
ae = "/models/ae.safetensors"
train_data_dir = "/data/discs"
output_dir = "/out"
network_module = "networks.lora_flux"
network_dim = 16
network_alpha = 16
network_train_unet_only = true
network_args = ["train_blocks=single", "split_qkv=True", "img_attn_dim=8", "verbose=True"]
optimizer_type = "adamw8bit"
learning_rate = 1e-4
max_train_epochs = 16
mixed_precision = "bf16"
gradient_checkpointing = true
enable_bucket = true
fp8_base = true
blocks_to_swap = 19
cache_text_encoder_outputs = true
timestep_sampling = "shift"
discrete_flow_shift = 3.1582
model_prediction_type = "raw"
guidance_scale = 1.0
loss_type = "l2"
"""


def test_a_toml_of_flux_train_network():
    config, report = read(FLUX_TOML)
    assert changed(config) == {
        "base_model": "/models/flux1-dev.safetensors", "vae": "/models/ae.safetensors",
        "text_encoders": ["/models/clip_l.safetensors", "/models/t5xxl_fp16.safetensors"],
        "train_data_dir": "/data/discs", "output_dir": "/out", "alpha": 16.0, "target_modules": ["/single_blocks/"],
        "optimizer": "adamw8bit", "epochs": 16, "mixed_precision": "bf16", "gradient_checkpointing": True,
        "base_precision": "fp8", "offload_blocks": 29, "sigma_sampling": "shift", "sigma_shift": 3.1582,
        "lr_scheduler": "constant", "min_snr_gamma": None, "max_bucket_resolution": 1024,
    }  # fmt: skip
    assert unmet(report) == {"network_args.split_qkv", "network_args.img_attn_dim", "t5xxl_max_token_length"}
    assert {"guidance_scale", "model_prediction_type", "cache_text_encoder_outputs"} <= set(report.ignored)


_AS_HERE = "guidance_scale = 1\nt5xxl_max_token_length = 256\n"


@pytest.mark.parametrize(
    ("lines", "sampling", "shift", "cannot"),
    [
        ('timestep_sampling = "flux_shift"', "flux_shift", 3.0, set()),
        ('timestep_sampling = "sigmoid"\nsigmoid_scale = 1.0', "sigmoid", 3.0, set()),
        ('timestep_sampling = "sigmoid"\nsigmoid_scale = 0.5', "sigmoid", 3.0, {"sigmoid_scale"}),
        ('timestep_sampling = "uniform"', "uniform", 3.0, set()),
        ('timestep_sampling = "sigma"\nweighting_scheme = "logit_normal"\ndiscrete_flow_shift = 2.5', "shift", 2.5,
         set()),
        ('timestep_sampling = "sigma"\nweighting_scheme = "logit_normal"\ndiscrete_flow_shift = 1\nlogit_mean = 0.5',
         "logit_normal", 3.0, {"logit_mean"}),
        ('timestep_sampling = "sigma"\ndiscrete_flow_shift = 1', "uniform", 3.0, set()),
        ("", "shift", 3.0, {"weighting_scheme"}),
        ('timestep_sampling = "sigma"\nweighting_scheme = "cosmap"\ndiscrete_flow_shift = 1', "uniform", 3.0,
         {"weighting_scheme"}),
        ('timestep_sampling = "beta"', "auto", 3.0, {"timestep_sampling"}),
    ],
)  # fmt: skip
def test_how_noise_levels_are_drawn_in_sd_scripts(lines, sampling, shift, cannot):
    text = f'network_module = "networks.lora_flux"\nmodel_prediction_type = "raw"\n{_AS_HERE}{lines}\n'
    config, report = read(text)
    assert (config.sigma_sampling, config.sigma_shift) == (sampling, shift)
    assert unmet(report) == cannot
    assert ("timestep_sampling is not given: sd-scripts takes sigma." in report.notes) == (not lines)


def test_what_is_not_given_for_flux_is_what_sd_scripts_takes():
    config, report = read('network_module = "networks.lora_flux"\nguidance_scale = 3.5\nt5xxl_max_token_length = 512\n'
                          'apply_t5_attn_mask = true\nblocks_to_swap = 10\n')  # fmt: skip
    assert unmet(report) == {"guidance_scale", "t5xxl_max_token_length", "apply_t5_attn_mask", "blocks_to_swap",
                             "model_prediction_type", "weighting_scheme"}  # fmt: skip
    assert config.offload_blocks == "auto" and config.max_token_length == 225 and config.train_text_encoder


def test_guidance_and_length_that_are_not_given_for_flux_are_those_of_dev():
    _, report = read('network_module = "networks.lora_flux"\n')
    said = {one.theirs: one.value for one in report.unmet}
    assert (said["guidance_scale"], said["t5xxl_max_token_length"]) == (3.5, 512)
    assert "guidance_scale is not given: sd-scripts takes 3.5 for FLUX.1 dev." in report.notes


def test_steps_of_buckets_in_a_dataset_config_for_flux():
    folder = '[[datasets]]\nbucket_reso_steps = 8\n[[datasets.subsets]]\nimage_dir = "/data/discs"\n'
    assert read(f'network_module = "networks.lora_flux"\n{folder}')[0].bucket_step == 16
    assert read(f'network_module = "networks.lora"\n{folder}')[0].bucket_step == 8


def test_chroma_in_sd_scripts():
    text = FLUX_TOML.replace("guidance_scale = 1.0", "guidance_scale = 0.0\napply_t5_attn_mask = true")
    text = text.replace("network_train_unet_only = true", 'model_type = "chroma"').replace('"shift"', '"sigmoid"')
    config, report = read(text)
    assert config.text_encoders == ["/models/t5xxl_fp16.safetensors"] and config.sigma_sampling == "sigmoid"
    assert not config.train_text_encoder  # T5 is its only one
    assert unmet(report) == {"network_args.split_qkv", "network_args.img_attn_dim"}


@pytest.mark.parametrize(
    ("lines", "sampling", "shift", "cannot"),
    [
        ("", "uniform", 3.0, set()),
        ('weighting_scheme = "logit_normal"', "logit_normal", 3.0, set()),
        ('weighting_scheme = "logit_normal"\ntraining_shift = 2.0', "shift", 2.0, set()),
        ('weighting_scheme = "mode"', "logit_normal", 3.0, {"weighting_scheme"}),
        ("training_shift = 3.0", "shift", 3.0, {"weighting_scheme"}),
    ],
)
def test_a_toml_of_sd3_train_network(lines, sampling, shift, cannot):
    text = f"""
pretrained_model_name_or_path = "/models/sd3_medium.safetensors"
clip_g = "/models/clip_g.safetensors"
clip_l = "/models/clip_l.safetensors"
t5xxl = "/models/t5xxl_fp16.safetensors"
network_module = "networks.lora_sd3"
network_args = ["train_block_indices=0-3", "emb_dims=[1,2,3,4,5,6]"]
gradient_checkpointing = true
blocks_to_swap = 12
t5xxl_max_token_length = 256
t5_dropout_rate = 0.1
apply_lg_attn_mask = true
enable_scaled_pos_embed = true
{lines}
"""
    config, report = read(text)
    assert (config.sigma_sampling, config.sigma_shift, config.offload_blocks) == (sampling, shift, 12)
    assert [Path(path).stem for path in config.text_encoders] == ["clip_l", "clip_g", "t5xxl_fp16"]
    assert not config.train_text_encoder and "Stable Diffusion 3 do not learn" in report.to_text()
    assert unmet(report) == cannot | {"network_args.train_block_indices", "network_args.emb_dims", "t5_dropout_rate",
                                      "apply_lg_attn_mask", "enable_scaled_pos_embed"}  # fmt: skip


_OF_THE_PAGE = {
    "flux1_checkbox": True, "sd3_checkbox": False, "ae": "/m/ae.safetensors", "clip_l": "/m/clip_l.safetensors",
    "t5xxl": "/m/t5.safetensors", "sd3_clip_l": "/m/other.safetensors", "timestep_sampling": "flux_shift",
    "model_prediction_type": "raw", "discrete_flow_shift": 3, "sigmoid_scale": 1, "guidance_scale": 1,
    "t5xxl_max_token_length": 512, "apply_t5_attn_mask": False, "split_mode": True, "train_blocks": "all",
    "train_double_block_indices": "all", "train_single_block_indices": "all", "split_qkv": False, "single_dim": "",
    "img_attn_dim": "", "in_dims": "", "blocks_to_swap": 0, "mem_eff_save": False, "weighting_scheme": "logit_normal",
    "logit_mean": 0, "logit_std": 1, "mode_scale": 1.29, "fp8_base": True, "gradient_checkpointing": True,
}  # fmt: skip


def test_a_flux_preset_of_kohyas_gui_and_the_same_fields_of_another_model():
    config, report = read(presets.kohya_gui(BASE, DATA, OUTPUT, LoRA_type="Flux1", **_OF_THE_PAGE))
    assert config.text_encoders == ["/m/clip_l.safetensors", "/m/t5.safetensors"] and config.vae == "/m/ae.safetensors"
    assert (config.sigma_sampling, config.base_precision, config.offload_blocks) == ("flux_shift", "fp8", 27)
    assert config.max_token_length == 225 and unmet(report) == {"t5xxl_max_token_length"}
    others = {**_OF_THE_PAGE, "flux1_checkbox": False}
    config, report = read(presets.kohya_gui(BASE, DATA, OUTPUT, **others))
    assert (config.text_encoders, config.vae, config.base_precision) == ([], None, "stored")
    assert not report.unmet and {"ae", "t5xxl", "timestep_sampling"} <= set(report.ignored)


def test_where_the_number_of_blocks_is_not_known_as_many_wait_as_must():
    found = [
        read('network_module = "networks.lora_flux"\ngradient_checkpointing = true\ndouble_blocks_to_swap = 6\n'),
        toolkit({"is_v3": True, "layer_offloading": True}),
        onetrainer(model_type="STABLE_DIFFUSION_35", transformer={"offload_fraction": 0.5}),
    ]
    for _, report in found:
        (taken,) = (one for one in report.taken if one.ours == "offload_blocks")
        assert taken.value == "auto" and taken.theirs.split(".")[-1] not in {one.theirs for one in report.unmet}


def test_a_yaml_of_ours_with_kohyas_words_is_told_ours():
    settings, report = read_text("base_model: b\nlora_rank: 4\ntimestep_sampling: sigmoid\nblocks_to_swap: 4\nae: x\n")
    assert settings == {"base_model": "b", "lora_rank": 4}
    assert {one.theirs: one.reason for one in report.unmet} == {
        "timestep_sampling": "use sigma_sampling", "blocks_to_swap": "use offload_blocks", "ae": "use vae",
    }  # fmt: skip


def toolkit(model: dict, **train) -> tuple:
    values = yaml.safe_load(presets.ai_toolkit(BASE, DATA, OUTPUT))
    process = values["config"]["process"][0]
    process["model"] = {"name_or_path": str(BASE), **model}
    process["train"] = {"batch_size": 1, "steps": 10, "lr": 1e-4, "noise_scheduler": "flowmatch", **train}
    return read(yaml.safe_dump(values))


@pytest.mark.parametrize(
    ("model", "train", "expected", "cannot"),
    [
        ({"is_flux": True, "quantize": True, "low_vram": True}, {},
         {"base_precision": "fp8", "sigma_sampling": "sigmoid", "gradient_checkpointing": True}, set()),
        ({"arch": "flux:dev", "quantize": True, "qtype": "uint4|/ara.safetensors", "layer_offloading": True,
          "layer_offloading_transformer_percent": 0.5}, {"timestep_type": "flux_shift"},
         {"base_precision": "nf4", "offload_blocks": 28, "sigma_sampling": "flux_shift"},
         {"model.qtype", "train.timestep_type"}),
        ({"arch": "chroma", "quantize_te": True}, {"timestep_type": "linear", "train_text_encoder": True},
         {"base_precision": "stored", "sigma_sampling": "uniform", "train_text_encoder": False},
         {"train.train_text_encoder"}),
        ({"is_v3": True, "layer_offloading": True}, {"timestep_type": "weighted", "gradient_checkpointing": False},
         {"sigma_sampling": "sigmoid", "offload_blocks": "auto", "gradient_checkpointing": False},
         {"model.layer_offloading", "train.timestep_type"}),
        ({"is_flux": True, "attn_masking": True, "use_flux_cfg": True}, {"linear_timesteps": True},
         {"sigma_sampling": "uniform"}, {"model.attn_masking", "model.use_flux_cfg", "train.linear_timesteps"}),
        ({"is_xl": True, "quantize": True}, {"timestep_type": "linear"},
         {"sigma_sampling": "auto", "base_precision": "stored", "gradient_checkpointing": False}, set()),
    ],
)  # fmt: skip
def test_flow_models_of_ai_toolkit(model, train, expected, cannot):
    config, report = toolkit(model, **train)
    assert {name: getattr(config, name) for name in expected} == expected
    assert unmet(report) == cannot


def onetrainer(**changes) -> tuple:
    values = {
        "training_method": "LORA", "base_model_name": str(BASE), "concepts": [{"path": str(DATA)}],
        "model_type": "FLUX_DEV_1", "learning_rate": 3e-4, "resolution": "768", "train_dtype": "BFLOAT_16",
        "transformer": {"train": True, "weight_dtype": "NFLOAT_4"}, "text_encoder": {"train": False},
        "text_encoder_2": {"train": False, "weight_dtype": "NFLOAT_4"}, "timestep_distribution": "LOGIT_NORMAL",
        "dynamic_timestep_shifting": True, **changes,
    }  # fmt: skip
    return read(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "expected", "cannot"),
    [
        ({}, {"base_precision": "nf4", "sigma_sampling": "flux_shift", "learning_rate": 3e-4, "conv_rank": 0,
              "gradient_checkpointing": True, "train_text_encoder": False}, set()),
        ({"transformer": {"weight_dtype": "INT_W8A8", "learning_rate": 1e-4, "offload_fraction": 0.4,
                          "guidance_scale": 3.5, "attention_mask": True}, "text_encoder_2": {"train": True},
          "layer_filter_preset": "attn-mlp", "layer_filter": "attn,ff.net"},
         {"base_precision": "fp8", "learning_rate": 1e-4, "offload_blocks": 23,
          "target_modules": ["attention", "feed_forward"]},
         {"transformer.weight_dtype", "transformer.guidance_scale", "transformer.attention_mask",
          "text_encoder_2.train"}),
        ({"model_type": "CHROMA_1", "timestep_distribution": "INVERTED_PARABOLA", "noising_weight": 7.7,
          "text_encoder": {"train": True}, "transformer": {"weight_dtype": "FLOAT_8"},
          "quantization": {"layer_filter": "transformer_block"}},
         {"base_precision": "fp8", "sigma_sampling": "auto", "train_text_encoder": False}, {"timestep_distribution"}),
        ({"model_type": "STABLE_DIFFUSION_3", "timestep_shift": 3.0, "text_encoder_2_sequence_length": 77},
         {"sigma_sampling": "shift", "sigma_shift": 3.0, "train_text_encoder": False}, set()),
        ({"model_type": "STABLE_DIFFUSION_35", "timestep_distribution": "UNIFORM", "transformer": {}},
         {"sigma_sampling": "uniform", "base_precision": "stored"}, set()),
        ({"dynamic_timestep_shifting": False, "noising_bias": 0.5, "text_encoder_2_sequence_length": 77},
         {"sigma_sampling": "logit_normal"}, {"noising_bias", "text_encoder_2_sequence_length"}),
        ({"model_type": "STABLE_DIFFUSION_15"}, {"base_precision": "stored", "sigma_sampling": "auto"},
         {"timestep_distribution"}),
    ],
)  # fmt: skip
def test_flow_models_of_onetrainer(changes, expected, cannot):
    config, report = onetrainer(**changes)
    assert {name: getattr(config, name) for name in expected} == expected
    assert unmet(report) == cannot
