"""Settings as four other trainers write them, made for the tests: the shape of their files, with values of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def kohya_gui(base: Path, data: Path, output: Path, **changes: Any) -> str:
    """What the interface of kohya_ss saves: every field of the page, most of them off."""
    values = {
        "LoRA_type": "Standard", "LyCORIS_preset": "full", "adaptive_noise_scale": 0, "additional_parameters": "",
        "async_upload": False, "block_alphas": "", "block_dims": "", "block_lr_zero_threshold": "",
        "bucket_no_upscale": True, "bucket_reso_steps": 64, "cache_latents": True, "cache_latents_to_disk": False,
        "caption_dropout_every_n_epochs": 0.0, "caption_dropout_rate": 0.1, "caption_extension": ".txt",
        "clip_skip": "1", "color_aug": False, "conv_alpha": 2, "conv_block_dims": "", "conv_dim": 4,
        "debiased_estimation_loss": False, "decompose_both": False, "dim_from_weights": False, "dora_wd": False,
        "down_lr_weight": "", "dynamo_backend": "no", "enable_bucket": True, "epoch": 2, "factor": -1,
        "flip_aug": False, "fp8_base": False, "full_bf16": False, "gradient_accumulation_steps": 1.0,
        "gradient_checkpointing": False, "huber_c": 0.1, "huber_schedule": "snr", "huggingface_token": "hf_secret",
        "keep_tokens": "0", "learning_rate": 0.0003, "loraplus_lr_ratio": 0, "loss_type": "l2", "lowram": False,
        "lr_scheduler": "constant_with_warmup", "lr_scheduler_args": "", "lr_scheduler_num_cycles": "",
        "lr_scheduler_power": "", "lr_warmup": 10, "max_bucket_reso": 1024, "max_data_loader_n_workers": "0",
        "max_grad_norm": 1, "max_resolution": "64,64", "max_timestep": 1000, "max_token_length": "75",
        "max_train_epochs": "", "max_train_steps": "", "mem_eff_attn": False, "mid_lr_weight": "",
        "min_bucket_reso": 64, "min_snr_gamma": 0, "min_timestep": 0, "mixed_precision": "no", "module_dropout": 0,
        "multires_noise_discount": 0, "multires_noise_iterations": 0, "network_alpha": 2, "network_dim": 4,
        "network_dropout": 0, "noise_offset": 0.05, "noise_offset_type": "Original",
        "num_cpu_threads_per_process": 2, "optimizer": "AdamW", "optimizer_args": "weight_decay=0.02 betas=0.9,0.95",
        "output_dir": str(output), "output_name": "from_gui", "persistent_data_loader_workers": False,
        "pretrained_model_name_or_path": str(base), "prior_loss_weight": 1.0, "random_crop": False,
        "rank_dropout": 0, "reg_data_dir": "", "resume": "", "sample_every_n_steps": 0, "sample_prompts": "",
        "sample_sampler": "euler_a", "save_every_n_epochs": 1, "save_every_n_steps": 0, "save_model_as": "safetensors",
        "save_precision": "fp16", "scale_weight_norms": 0, "sdxl": False, "seed": "1234", "shuffle_caption": True,
        "stop_text_encoder_training": 0, "text_encoder_lr": 0.0, "train_batch_size": 2, "train_data_dir": str(data),
        "train_norm": False, "training_comment": "from a preset", "unet_lr": 0.0002, "unit": 1, "up_lr_weight": "",
        "use_cp": False, "v2": False, "v_parameterization": False, "vae": "", "wandb_api_key": "secret",
        "weighted_captions": False, "xformers": "xformers",
    }  # fmt: skip
    return json.dumps({**values, **changes}, indent=2)


def sd_scripts(base: Path, data: Path, output: Path, extra: str = "") -> str:
    """train_network.py's arguments in sections, as its config_file takes them."""
    return f"""
[model_arguments]
pretrained_model_name_or_path = '{base}'
v2 = false

[dataset_arguments]
train_data_dir = '{data}'
resolution = "64,64"
shuffle_caption = true
cache_latents = true

[network_arguments]
network_module = "lycoris.kohya"
network_dim = 4
network_args = ["algo=locon", "conv_dim=2", "conv_alpha=1", "rank_dropout=0.1", "preset=full"]

[training_arguments]
output_dir = '{output}'
output_name = "from_toml"
max_train_steps = 3
learning_rate = 1e-4
unet_lr = 2e-4
text_encoder_lr = 5e-5
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 2
lr_warmup_steps = 0.25
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1", "betas=(0.9, 0.99)"]
mixed_precision = "no"
save_precision = "float"
max_data_loader_n_workers = 4
xformers = true
lowram = true
face_crop_aug_range = "2.0,4.0"
{extra}
"""


def dataset_config(first: Path, second: Path, regularization: Path) -> str:
    return f"""
[general]
shuffle_caption = true
keep_tokens = 1
enable_bucket = true

[[datasets]]
resolution = 64
batch_size = 2

  [[datasets.subsets]]
  image_dir = '{first}'
  num_repeats = 2

  [[datasets.subsets]]
  image_dir = '{second}'
  class_tokens = 'a disc'
  num_repeats = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = '{regularization}'
"""


def ai_toolkit(base: Path, data: Path, output: Path, **train: Any) -> str:
    process = {
        "type": "sd_trainer",
        "training_folder": str(output),
        "device": "cpu",
        "trigger_word": "zwx",
        "network": {"type": "lora", "linear": 4, "linear_alpha": 2},
        "save": {"dtype": "float16", "save_every": 100, "max_step_saves_to_keep": 2, "push_to_hub": False},
        "datasets": [{
            "folder_path": str(data), "caption_ext": "txt", "caption_dropout_rate": 0.05, "shuffle_tokens": False,
            "cache_latents_to_disk": True, "resolution": [64], "flip_x": True, "num_repeats": 2, "scale": 1,
        }],
        "train": {
            "batch_size": 2, "steps": 3, "gradient_accumulation_steps": 1, "train_unet": True,
            "train_text_encoder": False, "gradient_checkpointing": False, "noise_scheduler": "ddpm",
            "optimizer": "adamw", "optimizer_params": {"weight_decay": 0.03}, "lr": 1e-4, "dtype": "fp32",
            "max_denoising_steps": 1000, "ema_config": {"use_ema": True, "ema_decay": 0.9},
            "skip_first_sample": True, "content_or_style": "style", **train,
        },
        "model": {"name_or_path": str(base), "is_xl": False, "quantize": False},
        "sample": {"sampler": "ddpm", "sample_every": 100, "width": 64, "height": 64, "prompts": ["[trigger], red"],
                   "neg": "blurry", "seed": 7, "walk_seed": True, "guidance_scale": 4, "sample_steps": 2},
    }  # fmt: skip
    config = {"job": "extension", "config": {"name": "from_toolkit", "process": [process]}}
    return yaml.safe_dump({**config, "meta": {"name": "[name]", "version": "1.0"}}, sort_keys=False)


def onetrainer(base: Path, data: Path, output: Path, **changes: Any) -> str:
    values = {
        "__version": 6, "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "debug_mode": False,
        "workspace_dir": "workspace/run", "tensorboard": False, "base_model_name": str(base),
        "output_dtype": "FLOAT_16", "output_model_format": "SAFETENSORS",
        "output_model_destination": str(output / "from_onetrainer.safetensors"),
        "concepts": [{
            "name": "discs", "path": str(data), "enabled": True, "balancing": 2.0, "balancing_strategy": "REPEATS",
            "image": {"enable_random_flip": True, "enable_random_rotate": False, "enable_random_hue": True},
            "text": {"prompt_source": "sample", "enable_tag_shuffling": True, "keep_tags_count": 2},
        }],
        "aspect_ratio_bucketing": True, "latent_caching": True, "learning_rate_scheduler": "COSINE",
        "learning_rate": 0.0003, "learning_rate_warmup_steps": 0.1, "learning_rate_cycles": 1, "epochs": 1,
        "batch_size": 2, "gradient_accumulation_steps": 1, "ema": "OFF", "ema_decay": 0.999, "train_device": "cpu",
        "temp_device": "cpu", "train_dtype": "FLOAT_32", "resolution": "64", "attention_mechanism": "SDP",
        "mse_strength": 1.0, "loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 4.0,
        "dropout_probability": 0.0, "clip_grad_norm": 1.0, "offset_noise_weight": 0.02,
        "max_noising_strength": 1.0, "min_noising_strength": 0.0, "gradient_checkpointing": "ON",
        "timestep_distribution": "LOGIT_NORMAL", "text_encoder_layer_skip": 0,
        "unet": {"train": True, "learning_rate": 0.0002, "stop_training_after_unit": "NEVER"},
        "text_encoder": {"train": False, "learning_rate": None, "dropout_probability": 0.0},
        "vae": {"model_name": ""}, "masked_training": False, "unmasked_weight": 0.1,
        "optimizer": {"optimizer": "ADAMW", "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.01},
        "optimizer_defaults": {}, "peft_type": "LORA", "lora_rank": 4, "lora_alpha": 2.0, "lora_decompose": False,
        "save_every": 1, "save_every_unit": "EPOCH", "sample_after": 10, "sample_after_unit": "MINUTE",
        "backup_after": 30, "backup_after_unit": "MINUTE", "secrets": {"huggingface_token": "hf_secret"},
    }  # fmt: skip
    return json.dumps({**values, **changes}, indent=2)
