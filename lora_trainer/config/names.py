"""The names of the settings: second names that are understood, and what kind of value each one has."""

from __future__ import annotations

import typing
from functools import cache
from typing import Any

from lora_trainer.config.schema import TrainConfig

ALIASES: dict[str, str] = {
    # the articles' other spellings
    "unet_target_modules": "target_modules",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    # kohya's and diffusers' names for the same thing
    "pretrained_model_name_or_path": "base_model",
    "network_dim": "lora_rank",
    "rank": "lora_rank",
    "network_alpha": "alpha",
    "network_dropout": "dropout",
    "network_weights": "init_lora",
    "conv_dim": "conv_rank",
    "train_batch_size": "batch_size",
    "max_train_epochs": "epochs",
    "num_train_epochs": "epochs",
    "unet_lr": "learning_rate",
    "save_every_n_steps": "save_steps",
    "checkpointing_steps": "save_steps",
    "save_every_n_epochs": "save_epochs",
    "optimizer_type": "optimizer",
    "snr_gamma": "min_snr_gamma",
    "flip_aug": "flip",
    "shuffle_caption": "shuffle_tags",
    "caption_dropout_rate": "caption_dropout",
    "caption_tag_dropout_rate": "tag_dropout",
    "loss_type": "loss",
    "bucket_reso_steps": "bucket_step",
    "min_bucket_reso": "min_bucket_resolution",
    "max_bucket_reso": "max_bucket_resolution",
    "resume_from_checkpoint": "resume",
    "sample_every_n_steps": "preview_steps",
    "lr_scheduler_num_cycles": "lr_cycles",
    "lr_scheduler_power": "lr_power",
    "ip_noise_gamma": "input_perturbation",
    "debiased_estimation_loss": "debiased_estimation",
    "masked_loss": "use_masks",
    "v_parameterization": "v_prediction",
    "num_repeats": "repeats",
    "training_comment": "description",
}
"""Other names that are understood, from the articles and from the trainers people come from."""


@cache
def types() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def is_text(name: str) -> bool:
    """Whether the setting of this name, or second name, is a text."""
    return types().get(ALIASES.get(name, name)) in (str, str | None)
