"""Settings that change nothing because of another one, in sentences: nobody is to wonder why they had no effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from lora_trainer.config.data import DataSettings
from lora_trainer.config.facts import CHANGES
from lora_trainer.config.prompts import ignored_flags
from lora_trainer.config.schema import FACTS, TrainConfig


@dataclass(frozen=True)
class _Dependence:
    """``names``: settings that count only where ``when`` holds; ``otherwise``: why they do not."""

    names: tuple[str, ...]
    when: Callable[[TrainConfig], bool]
    otherwise: str


_DEPENDENCES = (
    _Dependence(
        ("train_text_encoder", "text_encoder_target_modules"),
        lambda config: not config.train_text_encoder or config.text_encoders_learn,
        "text_encoder_lr is 0",
    ),
    _Dependence(
        ("text_encoder_lr", "text_encoder_target_modules"),
        lambda config: config.train_text_encoder,
        "train_text_encoder is off",
    ),
    _Dependence(
        ("learning_rate",),
        lambda config: bool(config.target_modules) or config.text_encoder_lr is None,
        "no layer of the UNet learns and text_encoder_lr is given",
    ),
    _Dependence(
        ("lr_cycles",),
        lambda config: config.lr_scheduler == "cosine_with_restarts",
        "only cosine_with_restarts restarts",
    ),
    _Dependence(("lr_power",), lambda config: config.lr_scheduler == "polynomial", "only polynomial has a power"),
    _Dependence(("lr_warmup_ratio",), lambda config: not config.lr_warmup_steps, "lr_warmup_steps is set"),
    _Dependence(("epochs",), lambda config: config.max_train_steps is None, "max_train_steps is set"),
    _Dependence(("conv_alpha",), lambda config: config.conv_rank > 0, "conv_rank is 0"),
    _Dependence(("lokr_factor",), lambda config: config.adapter == "lokr", "adapter is not lokr"),
    _Dependence(("sigma_shift",), lambda config: config.sigma_sampling == "shift", "sigma_sampling is not shift"),
    _Dependence(("huber_c",), lambda config: config.loss != "mse", "loss is mse"),
    _Dependence(
        ("multires_noise_discount",),
        lambda config: config.multires_noise_iterations > 0,
        "multires_noise_iterations is 0",
    ),
    _Dependence(("preserve_words", "preserve_pictures"), lambda config: config.preserve > 0, "preserve is 0"),
    _Dependence(("prior_loss_weight",), lambda config: config.reg_data_dir is not None, "there is no reg_data_dir"),
    _Dependence(
        ("keep_tokens",),
        lambda config: config.shuffle_tags or config.tag_dropout > 0,
        "captions are neither shuffled nor is anything left out of them",
    ),
    _Dependence(
        ("min_bucket_resolution", "max_bucket_resolution", "bucket_no_upscale"),
        lambda config: config.enable_bucket,
        "enable_bucket is off",
    ),
    _Dependence(("mask_dir",), lambda config: config.use_masks, "use_masks is off"),
    _Dependence(
        ("validation_steps", "early_stopping", "early_stopping_patience"),
        lambda config: config.validation_share > 0,
        "validation_share is 0",
    ),
    _Dependence(("preview_steps",), lambda config: bool(config.preview_prompts), "there are no preview_prompts"),
    _Dependence(
        ("keep_checkpoints",),
        lambda config: config.save_steps is not None or config.save_epochs is not None,
        "neither save_steps nor save_epochs is set",
    ),
    _Dependence(
        ("block_ranks", "block_lr_weights"), lambda config: bool(config.target_modules), "no layer of the UNet learns"
    ),
)

_READ_BY_WORDS = ("cache_dir", "resolution", "weighted_captions", "max_token_length")
_UNUSED_BY_WORDS = (
    *(one.name for one in fields(DataSettings) if one.name not in _READ_BY_WORDS),
    "vae", "epochs", "save_epochs", "loss", "huber_c", "min_snr_gamma", "debiased_estimation", "noise_offset",
    "multires_noise_iterations", "multires_noise_discount", "input_perturbation", "latent_sampling",
)  # fmt: skip
_UNUSED_BY_PAIRS = (
    "more_folders", "reg_data_dir", "prior_loss_weight", "preserve", "preserve_words", "loss", "huber_c",
    "min_snr_gamma", "debiased_estimation", "noise_offset", "multires_noise_iterations", "multires_noise_discount",
    "input_perturbation", "latent_sampling",
)  # fmt: skip
_UNUSED_BY_CHANGES = {
    "preserve_pictures": "the base model draws nothing for a change",
    **dict.fromkeys(
        ("validation_share", "validation_steps", "early_stopping", "early_stopping_patience"),
        "nothing is held out of a change",
    ),
}
"""Settings, each with the reason."""


def without_effect(
    config: TrainConfig, unused: Mapping[str, str] = MappingProxyType({}), task: str = "image"
) -> list[str]:
    """A sentence for each setting that is not at its default and changes nothing beside the others.

    unused: settings that the base model's family does not use, each with the reason (``Family.unused``).
    task: the kind of training, one of the setting ``task``.
    """
    default = TrainConfig()
    reasons = {name: it.otherwise for it in _DEPENDENCES if not it.when(config) for name in it.names} | dict(unused)
    reasons |= _of_other_tasks(config, task)
    idle = [
        f"{name}: {_shown(getattr(config, name))} has no effect, because {reason}."
        for name, reason in reasons.items()
        if getattr(config, name) != getattr(default, name)
    ]
    return idle + (ignored_flags(config.preview_prompts) if task != "text" else [])


def _of_other_tasks(config: TrainConfig, task: str) -> dict[str, str]:
    """The settings that mean nothing in this kind of training, each with the reason."""
    known = "a language model is trained" if task == "text" else "no language model is trained"
    reasons = {}
    for name, facts in FACTS.items():
        if not facts.applies(task):
            reasons[name] = f"task is not {facts.task}" if facts.task in CHANGES and task != "text" else known
    if task == "words":
        reasons |= dict.fromkeys(_UNUSED_BY_WORDS, "it is learned from words alone")
    elif task == "pair" and config.pair_method == "alternating":
        reasons |= dict.fromkeys(_UNUSED_BY_PAIRS, "the difference of two pictures is learned")
        reasons |= dict.fromkeys(("copy_steps", "copied_lora"), "pair_method is not copier")
    elif task == "pair":
        reasons |= dict.fromkeys(("pair_weight", "pair_mask", "saved_strength"), "pair_method is copier")
    if task in CHANGES:
        reasons = _UNUSED_BY_CHANGES | reasons
    return reasons


def unused_by(task: str) -> frozenset[str]:
    """The settings of image models that change nothing in a training of this kind, whatever the other settings are."""
    names = set(_UNUSED_BY_CHANGES) if task in CHANGES else set()
    return frozenset(names | set(_UNUSED_BY_WORDS) if task == "words" else names)


def never_reached(config: TrainConfig, steps: int, steps_per_epoch: int) -> list[str]:
    """A sentence for each interval or rise that is longer than a run of ``steps``."""
    save_epochs = config.save_epochs and config.save_epochs * steps_per_epoch
    intervals = [
        ("save_steps", config.save_steps, "nothing is saved on the way"),
        ("save_epochs", save_epochs, "nothing is saved on the way"),
        ("preview_steps", config.preview_prompts and config.preview_steps, "previews are drawn at the end alone"),
    ]
    told = [
        f"{name}: {getattr(config, name)} is more than this run has ({steps} steps): {meaning}."
        for name, interval, meaning in intervals
        if interval and interval > steps
    ]
    if (warmup := config.warmup_steps(steps)) >= steps:
        told.append(
            f"lr_warmup_steps ({warmup}) is as long as the training ({steps} steps): "
            "the learning rate never reaches learning_rate."
        )
    return told


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
