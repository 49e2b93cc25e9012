"""Settings of ostris' ai-toolkit: a job with one process, as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_trainer.config.foreign import ai_toolkit_flow
from lora_trainer.config.foreign.kohya import resolution
from lora_trainer.config.foreign.kohya_network import whole_matrices
from lora_trainer.config.foreign.report import (
    Reading,
    Translation,
    choice,
    computed,
    entries,
    is_off,
    is_on,
    number,
    section,
    sections,
)
from lora_trainer.config.prompts import flag_names
from lora_trainer.errors import UserError

TOOL = "ai-toolkit"

_NETWORKS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "dora": "lora"}
_OPTIMIZERS = {
    "adamw": "adamw", "adam": "adamw", "adamw8bit": "adamw8bit", "adam8bit": "adamw8bit", "prodigy": "prodigy",
    "prodigy8bit": "prodigy", "lion": "lion", "lion8bit": "lion", "adafactor": "adafactor",
}  # fmt: skip
_SCHEDULERS = {
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
    "cosine_with_restarts": "cosine_with_restarts", "polynomial": "polynomial",
}  # fmt: skip
_DTYPES = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "no", "float32": "no",
           "float": "no"}  # fmt: skip
_SAVE_DTYPES = {**_DTYPES, "fp32": "fp32", "float32": "fp32", "float": "fp32"}
_LOSSES = {"mse": "mse", "l2": "mse", "pseudo_huber": "huber", "huber": "huber", "smooth_l1": "smooth_l1"}

_DATASET = {
    "shuffle_tokens": "shuffle_tags", "keep_tokens": "keep_tokens", "caption_dropout_rate": "caption_dropout",
    "token_dropout_rate": "tag_dropout", "flip_x": "flip", "random_crop": "random_crop",
    "default_caption": "default_caption", "num_repeats": "repeats",
}  # fmt: skip
_DATASET_CANNOT = {
    "flip_y": "pictures are never turned upside down",
    "scale": "use resolution",
    "random_scale": "pictures are not zoomed",
    "augments": "pictures are not changed in training, but mirrored and cropped",
    "augmentations": "pictures are not changed in training, but mirrored and cropped",
    "shuffle_augmentations": "pictures are not changed in training, but mirrored and cropped",
    "control_path": "pictures are learned without a control picture",
    "inpaint_path": "inpainting models are not trained",
    "unconditional_path": "pictures are learned alone",
    "clip_image_path": "pictures are learned alone",
    "random_triggers": "there is one trigger word",
    "network_weight": "every picture counts alike",
    "loss_multiplier": "every picture counts alike",
    "mask_min_value": "outside a mask nothing is learned",
    "invert_mask": "a mask is white where is learned",
    "prior_reg": "use reg_data_dir",
    "num_frames": "pictures are learned, not films",
    "do_i2v": "pictures are learned, not films",
    "poi": "pictures are cropped in their middle",
    "square_crop": "use enable_bucket: false",
    "standardize_images": "pictures are not changed in training, but mirrored and cropped",
    "use_short_captions": "there is one caption to a picture",
    "extra_values": "pictures are learned without further values",
}
_DATASET_HARMLESS = {"scale": 1, "network_weight": 1, "loss_multiplier": 1, "num_frames": 1, "mask_min_value": 0}
_DATASET_NOTHING = """
    cache_latents cache_latents_to_disk cache_clip_vision_to_disk cache_text_embeddings bucket_tolerance buckets
    type shrink_video_to_frames enable_ar_bucket num_workers prefetch_factor dataset_path caption_type controls
    full_size_control_images fast_image_size fps auto_frame_count
""".split()

_TRAIN_CANNOT = {
    "loss_target": "the loss is that of the model's own prediction",
    "content_or_style": "noise levels are drawn evenly; use min_timestep and max_timestep",
    "weight_jitter": "weights are not disturbed",
    "noise_multiplier": "the noise has its usual strength",
    "img_multiplier": "pictures have their usual contrast",
    "latent_multiplier": "pictures have their usual contrast",
    "random_noise_multiplier": "the noise has its usual strength",
    "noise_scale": "the noise has its usual strength",
    "inverted_mask_prior": "outside a mask nothing is learned",
    "diff_output_preservation": "use preserve",
    "blank_prompt_preservation": "use preserve",
    "short_and_long_captions": "there is one caption to a picture",
    "do_cfg": "training follows no guidance",
    "do_random_cfg": "training follows no guidance",
    "do_prior_divergence": "use reg_data_dir",
    "reg_weight": "use prior_loss_weight",
    "prompt_saturation_chance": "captions are learned as they are written",
    "correct_pred_norm": "the loss is that of the model's own prediction",
    "snr_gamma": "use min_snr_gamma",
    "learnable_snr_gos": "use min_snr_gamma",
    "train_turbo": "a distilled model is trained as any other",
    "ema_config": "it is switched off",
    "start_step": "a run begins at its first step",
    "lr_scheduler_params": "the schedules have no further arguments",
    "adapter_assist_name_or_path": "no adapter helps",
    "target_norm_std": "the loss is that of the model's own prediction",
    "standardize_images": "pictures are not changed in training",
    "standardize_latents": "latents are not changed in training",
}
_TRAIN_HARMLESS = {
    "loss_target": "noise", "content_or_style": "balanced", "noise_multiplier": 1, "img_multiplier": 1,
    "latent_multiplier": 1, "reg_weight": 1,
}  # fmt: skip
_TRAIN_NOTHING = """
    skip_first_sample force_first_sample disable_sampling linear_timesteps linear_timesteps2 timestep_type
    noise_scheduler train_unet xformers sdp attention_backend gradient_checkpointing unload_text_encoder
    cache_text_embeddings single_item_batching merge_network_on_save auto_memory fuse_optimizer
    bypass_guidance_embedding optimal_noise_pairing_samples free_u low_vram dtype content_or_style_reg
    switch_boundary_every train_refiner refiner_lr adapter_lr embedding_lr
""".split()
_MODEL_NOTHING = """
    is_v2 is_xl is_flux is_v3 is_pixart is_pixart_sigma is_auraflow is_ssd is_vega is_lumina2 arch dtype low_vram
    quantize quantize_te qtype qtype_te quantize_kwargs use_text_encoder_1 use_text_encoder_2 experimental_xl
    split_model_over_gpus layer_offloading layer_offloading_transformer_percent
    layer_offloading_text_encoder_percent attn_masking model_kwargs compile te_name_or_path text_encoder_bits
""".split()


def is_one(values: Mapping[str, Any]) -> bool:
    config = values.get("config")
    return isinstance(config, Mapping) and "process" in config


def translate(values: Mapping[str, Any], folder: Path | None, known: set[str]) -> Translation:
    """Raises UserError where there is no process that trains, or more than one."""
    translation = Translation(TOOL)
    config = values["config"]
    processes = sections(config.get("process"), "config.process")
    if len(processes) != 1:
        raise UserError(
            f"holds {len(processes)} processes; there is one training in a file here.", field="process",
            remedy="Leave one in config.process.",
        )  # fmt: skip
    process = processes[0]
    if "network" not in process:
        raise UserError(
            "trains the whole model, not a LoRA.", field="network", remedy="Add network: {type: lora, linear: 16}."
        )
    name = str(config.get("name") or "lora")
    top = Reading(translation, {key: value for key, value in values.items() if key != "config"})
    top.ignore("job", "meta")
    top.finish(known)
    own = Reading(translation, {key: value for key, value in config.items() if key not in ("name", "process")})
    own.finish(known)
    Reading(translation, {}, "config.").set("name", "output_name", name)
    reading = Reading(translation, process)
    output = str(reading.pop("training_folder") or "output")
    reading.set("training_folder", "output_dir", f"{output.rstrip('/')}/{name}")
    _device(reading)
    reading.take("trigger_word", "trigger_word")
    family = ai_toolkit_flow.family_of(process.get("model"))
    parts = {"network": lambda inner: _network(inner, convolutions=family is None), "save": _save, "train": _train,
             "model": _model, "sample": _sample}  # fmt: skip
    of_flow = {"train": ai_toolkit_flow.read_train, "model": ai_toolkit_flow.read_model}
    for part, read in parts.items():
        inner = Reading(translation, section(reading.pop(part), part), f"{part}.")
        if family is not None and part in of_flow:
            of_flow[part](inner, family)
        read(inner)
    _datasets(sections(reading.pop("datasets"), "datasets"), translation)
    reading.ignore("type", "performance_log_every", "logging", "sqlite_db_path", "extensions")
    reading.finish(known)
    return translation


def _device(reading: Reading) -> None:
    device = str(reading.pop("device") or "auto")
    reading.set("device", "device", "auto" if device in ("cuda", "cuda:0") else device)


def _network(reading: Reading, *, convolutions: bool) -> None:
    settings = reading.translation.settings
    if str(reading.left.get("type")) == "dora":
        settings["dora"] = True
    choice(_NETWORKS, reading, "type", "adapter", "lora")
    for name in ("linear", "rank"):
        if is_on(reading.left.get(name)):
            reading.take(name, "lora_rank", number)
            break
    reading.ignore("linear", "rank")
    settings["alpha"] = 1.0  # what ai-toolkit takes where none is given
    for name in ("alpha", "linear_alpha"):
        reading.take_unless_off(name, "alpha", number)
    if is_on(reading.left.get("conv")):
        reading.take("conv", "conv_rank", number)
        reading.take_unless_off("conv_alpha", "conv_alpha", number)
    reading.ignore("conv", "conv_alpha")
    reading.take_unless_off("dropout", "dropout", number)
    if settings.get("adapter") == "lokr" and is_on(reading.left.get("lokr_full_rank", True)):  # which is on there
        given = reading.left.pop("lokr_full_rank", True)
        whole_matrices(reading, "lokr_full_rank", given, "lora_rank")
        if convolutions:
            whole_matrices(reading, "lokr_full_rank", given, "conv_rank")
    reading.take("lokr_factor", "lokr_factor", number)
    only = section(reading.pop("network_kwargs"), "network.network_kwargs")
    inner = Reading(reading.translation, only, "network.network_kwargs.")
    inner.take("lokr_factor", "lokr_factor", number)
    inner.finish()
    reading.ignore("lokr_full_rank", "old_lokr_format", "transformer_only")
    reading.take("pretrained_lora_path", "init_lora")
    reading.finish()


def _save(reading: Reading) -> None:
    choice(_SAVE_DTYPES, reading, "dtype", "save_precision", "fp16")
    reading.take_unless_off("save_every", "save_steps", number)
    reading.take_unless_off("max_step_saves_to_keep", "keep_checkpoints", number)
    reading.ignore("push_to_hub", "hf_repo_id", "hf_private", "save_format", "hf_repo_visibility")
    reading.finish()


def _train(reading: Reading) -> None:
    settings = reading.translation.settings
    settings.update({"min_snr_gamma": None, "lr_scheduler": "constant"})
    reading.take_all({"batch_size": "batch_size", "noise_offset": "noise_offset", "max_grad_norm": "max_grad_norm",
                      "optimizer_params": "optimizer_args"})  # fmt: skip
    reading.take_unless_off("gradient_accumulation_steps", "gradient_accumulation_steps", number)
    reading.take_unless_off("gradient_accumulation", "gradient_accumulation_steps", number)
    if "steps" not in reading.left:
        reading.left["steps"] = 1000
        reading.note("steps is not given: ai-toolkit takes 1000.")
    reading.take_unless_off("steps", "max_train_steps", number)
    general, unet = number(reading.pop("lr")), number(reading.pop("unet_lr"))
    if unet is not None:
        reading.set("unet_lr", "learning_rate", unet)
        if general not in (None, unet):
            reading.note(f"unet_lr ({unet}) counts, not lr ({general}).")
    elif general is not None:
        reading.set("lr", "learning_rate", general)
    settings["train_text_encoder"] = is_on(reading.left.get("train_text_encoder"))
    reading.take("train_text_encoder", "train_text_encoder", is_on)
    if settings["train_text_encoder"]:
        settings["text_encoder_lr"] = general
        reading.take("text_encoder_lr", "text_encoder_lr", number)
    reading.ignore("text_encoder_lr")
    if "train_unet" in reading.left and is_off(reading.left["train_unet"]):
        reading.set("train_unet", "target_modules", [])
    reading.take("gradient_checkpointing", "gradient_checkpointing", is_on)
    choice(_OPTIMIZERS, reading, "optimizer", "optimizer", "adamw", "; look whether the learning rate fits it")
    choice(_SCHEDULERS, reading, "lr_scheduler", "lr_scheduler", "constant")
    _warmup(reading)
    choice(_DTYPES, reading, "dtype", "mixed_precision", "auto")
    choice(_LOSSES, reading, "loss_type", "loss", "mse")
    reading.take_unless_off("min_snr_gamma", "min_snr_gamma", number)
    reading.take_unless_off("snr_gamma", "min_snr_gamma", number)
    reading.take_unless_off("min_denoising_steps", "min_timestep", number)
    reading.take_unless_off("max_denoising_steps", "max_timestep",
                            lambda value: computed(value, lambda end: end - 1))  # fmt: skip
    ema = reading.left.get("ema_config")
    if isinstance(ema, Mapping) and is_on(ema.get("use_ema")):
        reading.pop("ema_config")
        reading.set("ema_config", "ema_decay", number(ema.get("ema_decay", 0.999)))
    reading.ignore("ema_config", *_TRAIN_NOTHING)
    reading.cannot(_TRAIN_CANNOT, _TRAIN_HARMLESS)
    reading.finish()


def _warmup(reading: Reading) -> None:
    params = section(reading.left.get("lr_scheduler_params"), "train.lr_scheduler_params")
    for holder in (reading, Reading(reading.translation, params)):
        for name in ("lr_warmup_steps", "num_warmup_steps", "warmup_steps"):
            holder.take_unless_off(name, "lr_warmup_steps", number)
        if holder is not reading and not holder.left:
            reading.left.pop("lr_scheduler_params", None)


def _model(reading: Reading) -> None:
    reading.take("name_or_path", "base_model")
    reading.take_unless_off("is_v_pred", "v_prediction", is_on)
    reading.take("vae_path", "vae")
    reading.ignore(*_MODEL_NOTHING)
    reading.cannot({"assistant_lora_path": "no second LoRA helps", "lora_path": "merge it into the base model first",
                    "refiner_name_or_path": "refiners are not trained"})  # fmt: skip
    reading.finish()


def _sample(reading: Reading) -> None:
    prompts = reading.pop("prompts")
    prompts = prompts.splitlines() if isinstance(prompts, str) else list(entries(prompts, "sample.prompts"))
    samples = [{"prompt": prompt} for prompt in prompts] + sections(reading.pop("samples"), "sample.samples")
    if samples:
        shared = {name: reading.pop(name) for name in _FLAGS}
        prompts = [_with_flags(str(one.get("prompt", "")), {**shared, **one}) for one in samples]
        reading.set("prompts", "preview_prompts", prompts)
        reading.take_unless_off("sample_every", "preview_steps", number)
    reading.ignore("sampler", "walk_seed", "sample_start_step", "guidance_rescale", "format", "ext", "sample_every",
                   "network_multiplier", "num_frames", "fps", "refiner_start_at", "neg", "seed", "width", "height",
                   "guidance_scale", "sample_steps")  # fmt: skip
    reading.finish()


_FLAGS = {"width": "w", "height": "h", "sample_steps": "s", "guidance_scale": "l", "seed": "d", "neg": "n"}


def _with_flags(prompt: str, sample: Mapping[str, Any]) -> str:
    """The prompt and what its preview is drawn with as flags behind it. The flags that it has already count."""
    own = flag_names(prompt)
    given = ((flag, sample.get(name)) for name, flag in _FLAGS.items() if flag not in own)
    return prompt + "".join(f" --{flag} {value}" for flag, value in given if value is not None and value is not False)


def _datasets(datasets: list[dict[str, Any]], translation: Translation) -> None:
    training = [one for one in datasets if not one.get("is_reg")]
    regularization = [one for one in datasets if one.get("is_reg")]
    if not training:
        raise UserError("names no folder with pictures.", field="datasets", remedy="Add - folder_path: PATH.")
    if len(regularization) > 1:
        raise UserError(
            f"names {len(regularization)} folders of regularization pictures; there can be one here.",
            field="datasets", remedy="Put them into one folder.",
        )  # fmt: skip
    first, *others = training
    _one_dataset(Reading(translation, first, "datasets."))
    for name in sorted({name for one in training for name in one}):
        if name not in ("folder_path", "dataset_path", "num_repeats") and len({str(o.get(name)) for o in training}) > 1:
            translation.notes.append(f"{name} differs between the datasets; {first.get(name)} counts for all of them.")
    folders = [f"{one.get('num_repeats', 1)}_={one.get('folder_path') or one.get('dataset_path')}" for one in others]
    if folders:
        Reading(translation, {}, "datasets.").set("folder_path", "more_folders", folders)
    for one in regularization:
        Reading(translation, one, "datasets.").take("folder_path", "reg_data_dir")


def _one_dataset(reading: Reading) -> None:
    reading.take("folder_path" if "folder_path" in reading.left else "dataset_path", "train_data_dir")
    if (ending := reading.pop("caption_ext") or reading.pop("caption_type")) is not None:
        reading.set("caption_ext", "caption_extension", "." + str(ending).lstrip("."))
    for theirs, ours in _DATASET.items():
        reading.take(theirs, ours, number)
    _sizes(reading)
    reading.take_unless_off("mask_path", "mask_dir")
    if is_on(reading.left.get("alpha_mask")) or "mask_dir" in reading.translation.settings:
        reading.translation.settings["use_masks"] = True
    reading.take_unless_off("alpha_mask", "use_masks", is_on)
    if "buckets" in reading.left:
        reading.take("buckets", "enable_bucket", is_on)
    reading.ignore("is_reg", *_DATASET_NOTHING)
    reading.cannot(_DATASET_CANNOT, _DATASET_HARMLESS)
    reading.finish()


def _sizes(reading: Reading) -> None:
    """One size; of several, which ai-toolkit trains beside each other, the largest."""
    sizes = reading.pop("resolution")
    if sizes is None:
        return
    sizes = sizes if isinstance(sizes, list) else [sizes]
    if len(sizes) > 1:
        reading.note(f"Pictures are trained in one size: the largest of {', '.join(map(str, sizes))}.")
    largest = max(sizes, key=lambda size: number(size) if isinstance(number(size), (int, float)) else 0)
    reading.set("resolution", "resolution", resolution(largest))
