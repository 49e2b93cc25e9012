"""The strings in a LoRA file that say how it came to be: kohya's ``ss_*`` and Stability's ``modelspec.*``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lora_trainer.config.schema import TrainConfig


@dataclass(frozen=True)
class RunFacts:
    """What a run knows beyond its settings. Times are seconds since 1970.

    base: entries by which readers tell the kind of base model, as its family gives them (``lora_metadata``).
    prediction_type: "epsilon" | "v_prediction".
    resolution: (width, height) of the training, as resolved from "auto".
    epoch, step: how far the saved weights are; total_epochs, total_steps: how far the run goes.
    num_train_images: pictures in one epoch, repeats counted; num_reg_images the same for regularization.
    bucket_info: as kohya's: {"buckets": {"0": {"resolution": [w, h], "count": n}, …}, "mean_img_ar_error": …}.
    tag_frequency: {folder: {tag: count}}; dataset_dirs: {folder: {"n_repeats": …, "img_count": …}}.
    model_hash: SHA-256 of the base's file; model_path: to compute kohya's old short hash from.
    thumbnail: a ``data:image/…;base64,…`` URL.
    """

    base: Mapping[str, str]
    prediction_type: str
    model_name: str
    resolution: tuple[int, int]
    started_at: float
    finished_at: float
    epoch: int
    step: int
    total_epochs: int
    total_steps: int
    num_train_images: int
    num_batches_per_epoch: int
    num_reg_images: int = 0
    model_hash: str | None = None
    model_path: Path | None = None
    vae_name: str | None = None
    mixed_precision: str = "no"
    zero_terminal_snr: bool = False
    session_id: int = 0
    bucket_info: Mapping[str, Any] = field(default_factory=dict)
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    dataset_dirs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    reg_dataset_dirs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    thumbnail: str | None = None
    tags: Sequence[str] = ()
    implementation_version: str = ""


def build_metadata(config: TrainConfig, facts: RunFacts) -> dict[str, str]:
    """Every ``ss_*`` and ``modelspec.*`` entry of the file; all values are strings, "None" and "True" as kohya's."""
    entries = {**_run(config, facts), **_network(config), **_objective(config, facts), **_data(config, facts)}
    metadata = {f"ss_{key}": _text(value) for key, value in entries.items()}
    metadata.update({f"modelspec.{key}": value for key, value in _modelspec(config, facts).items() if value})
    return {**metadata, **facts.base}


def network_module(config: TrainConfig) -> str:
    """The Python module that makes this kind of network in kohya's trainer; readers tell the kind by it."""
    return "networks.lora" if config.adapter == "lora" and not config.dora else "lycoris.kohya"


def network_args(config: TrainConfig) -> dict[str, str]:
    """The arguments that kohya's trainer would have been given to make this network."""
    args: dict[str, Any] = {}
    if network_module(config) == "lycoris.kohya":
        args["algo"] = config.adapter
        if config.dora:
            args["dora_wd"] = True
        if config.adapter == "lokr":
            args["factor"] = config.lokr_factor
    if config.conv_rank:
        args.update(conv_dim=config.conv_rank, conv_alpha=config.effective_conv_alpha)
    if config.rank_dropout:
        args["rank_dropout"] = config.rank_dropout
    if config.module_dropout:
        args["module_dropout"] = config.module_dropout
    if config.block_ranks is not None:
        args["block_dims"] = ",".join(map(str, config.block_ranks))
    if config.block_lr_weights is not None:
        down, mid, up = config.block_lr_weights[:12], config.block_lr_weights[12:13], config.block_lr_weights[13:]
        for name, weights in (("down", down), ("mid", mid), ("up", up)):
            args[f"{name}_lr_weight"] = ",".join(map(str, weights))
    args["target_modules"] = ",".join(config.target_modules)
    return {key: str(value) for key, value in args.items()}


def _run(config: TrainConfig, facts: RunFacts) -> dict[str, Any]:
    trains_text = config.train_text_encoder
    optimizer_args = ",".join(f"{key}={value}" for key, value in config.optimizer_args.items())
    return {
        "output_name": config.output_name,
        "session_id": facts.session_id,
        "training_started_at": facts.started_at,
        "training_finished_at": facts.finished_at,
        "training_comment": config.description or None,
        "sd_model_name": facts.model_path.name if facts.model_path else facts.model_name,
        "sd_model_hash": legacy_file_hash(facts.model_path),
        "new_sd_model_hash": facts.model_hash,
        "vae_name": facts.vae_name,
        "learning_rate": config.learning_rate,
        "unet_lr": config.learning_rate,
        "text_encoder_lr": config.effective_text_encoder_lr if trains_text else None,
        "optimizer": config.optimizer + (f"({optimizer_args})" if optimizer_args else ""),
        "lr_scheduler": config.lr_scheduler,
        "lr_warmup_steps": config.lr_warmup_steps,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "mixed_precision": facts.mixed_precision,
        "base_precision": config.base_precision,
        "seed": config.seed,
        "epoch": facts.epoch,
        "num_epochs": facts.total_epochs,
        "steps": facts.step,
        "max_train_steps": facts.total_steps,
    }


def _network(config: TrainConfig) -> dict[str, Any]:
    return {
        "network_module": network_module(config),
        "network_dim": config.lora_rank,
        "network_alpha": config.effective_alpha,
        "network_dropout": config.dropout or None,
        "network_args": network_args(config),
    }


def _objective(config: TrainConfig, facts: RunFacts) -> dict[str, Any]:
    return {
        "loss_type": {"mse": "l2"}.get(config.loss, config.loss),
        "huber_c": config.huber_c,
        "min_snr_gamma": config.snr_gamma(facts.prediction_type, facts.zero_terminal_snr),
        "debiased_estimation": config.debiased_estimation,
        "noise_offset": config.noise_offset or None,
        "multires_noise_iterations": config.multires_noise_iterations or None,
        "multires_noise_discount": config.multires_noise_discount,
        "ip_noise_gamma": config.input_perturbation or None,
        "zero_terminal_snr": facts.zero_terminal_snr,
        "prior_loss_weight": config.prior_loss_weight,
        "clip_skip": config.clip_skip if config.clip_skip > 1 else None,
        "max_token_length": config.max_token_length,
    }


def _data(config: TrainConfig, facts: RunFacts) -> dict[str, Any]:
    return {
        "num_train_images": facts.num_train_images,
        "num_reg_images": facts.num_reg_images,
        "num_batches_per_epoch": facts.num_batches_per_epoch,
        "batch_size_per_device": config.batch_size,
        "total_batch_size": config.batch_size * config.gradient_accumulation_steps,
        "resolution": facts.resolution,
        "enable_bucket": config.enable_bucket,
        "bucket_no_upscale": config.bucket_no_upscale,
        "min_bucket_reso": config.min_bucket_resolution,
        "max_bucket_reso": config.max_bucket_resolution,
        "bucket_info": dict(facts.bucket_info),
        "flip_aug": config.flip,
        "random_crop": config.random_crop,
        "shuffle_caption": config.shuffle_tags,
        "keep_tokens": config.keep_tokens,
        "caption_dropout_rate": config.caption_dropout,
        "caption_tag_dropout_rate": config.tag_dropout,
        "tag_frequency": {folder: dict(tags) for folder, tags in facts.tag_frequency.items()},
        "dataset_dirs": {folder: dict(counts) for folder, counts in facts.dataset_dirs.items()},
        "reg_dataset_dirs": {folder: dict(counts) for folder, counts in facts.reg_dataset_dirs.items()},
    }


def _modelspec(config: TrainConfig, facts: RunFacts) -> dict[str, str]:
    """Stability's ModelSpec 1.0.1. Empty entries are left out by the caller."""
    when = datetime.fromtimestamp(int(facts.finished_at), timezone.utc)
    return {
        "sai_model_spec": "1.0.1",
        "implementation_version": facts.implementation_version,
        "title": config.output_name,
        "description": config.description,
        "resolution": f"{facts.resolution[0]}x{facts.resolution[1]}",
        "date": when.replace(tzinfo=None).isoformat(),
        "prediction_type": "v" if facts.prediction_type == "v_prediction" else "epsilon",
        "trigger_phrase": config.trigger_word,
        "thumbnail": facts.thumbnail or "",
        "tags": ",".join(facts.tags),
        "encoder_layer": str(config.clip_skip) if config.clip_skip > 1 else "",
        "timestep_range": f"{config.min_timestep},{config.max_timestep + 1}"
        if (config.min_timestep, config.max_timestep) != (0, 999)
        else "",
    }


def legacy_file_hash(path: Path | None) -> str | None:
    """The WebUI's first short hash of a checkpoint: 8 digits of the SHA-256 of 64 KiB from the first MiB on."""
    if path is None or not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return f"({', '.join(map(str, value))})"
    return str(value)
