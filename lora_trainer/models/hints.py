"""What a file's surroundings say about it: metadata, marker tensors, the .yaml beside it, a folder's configuration."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from lora_trainer.errors import UserError

HINTS_KEY = "lora_trainer.architecture"  # metadata: a JSON object with fields of ``Hints``


# Tensors by which Forge and ComfyUI tell variants whose layers are those of an SDXL.
_OTHER_VARIANTS = {
    "edm_mean": "an EDM model, such as Playground 2.5",
    "edm_std": "an EDM model, such as Playground 2.5",
    "edm_vpred.sigma_max": "an EDM model that predicts v, such as CosXL",
    "edm_vpred.sigma_min": "an EDM model that predicts v, such as CosXL",
}
_EPSILON, _V = ("epsilon", "eps", "noise"), ("v", "v_prediction", "v-prediction", "vpred", "v_pred", "velocity")
_PREDICTIONS = {**dict.fromkeys(_EPSILON, "epsilon"), **dict.fromkeys(_V, "v_prediction")}
_PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
_SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}
"""sgm's classes by which a .yaml says what the model predicts."""
_TRUE = ("true", "1", "yes")


@dataclass(frozen=True)
class Hints:
    """What shapes do not tell: from the file's metadata, a .yaml beside it, or a folder's configuration files.

    num_heads (one value, or one per level) or head_dim of the UNet's attention, text_heads one value per text encoder;
    prediction_type "epsilon" or "v_prediction"; latent_scale: see ``LatentFormat``. None where nobody says.
    """

    num_heads: int | tuple[int, ...] | None = None
    head_dim: int | None = None
    text_heads: tuple[int, ...] | None = None
    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    latent_scale: float | None = None


def file_hints(path: Path, names: Iterable[str], metadata: Mapping[str, str]) -> Hints:
    """Hints for a single file. The .yaml beside it decides over the metadata, and that over marker tensors.

    Raises:
        UserError: the .yaml is not YAML, or the model predicts something that cannot be trained here.
    """
    hints = Hints()
    # NoobAI and others ship empty tensors with these names; Forge and ComfyUI obey them.
    names = set(names)
    for marker, what in _OTHER_VARIANTS.items():
        if marker in names:
            raise _other_variant(path, what)
    if "v_pred" in names:
        hints = replace(hints, prediction_type="v_prediction")
    if "ztsnr" in names:
        hints = replace(hints, zero_terminal_snr=True)
    hints = merged(hints, _metadata_hints(path, metadata))
    config = Path(path).with_suffix(".yaml")
    return merged(hints, _yaml_hints(config)) if config.is_file() else hints


def _other_variant(path: Path, what: str) -> UserError:
    return UserError(
        f"{path.name} is {what}; only models that predict noise (epsilon) or v can be trained here.",
        field="base_model",
        remedy="Choose such a model.",
    )


def _prediction(path: Path, text: Any) -> str | None:
    """What a model predicts, from a word of its metadata; None for no word. Raises UserError for another thing."""
    word = str(text or "").strip().lower()
    if not word:
        return None
    if (known := _PREDICTIONS.get(word)) is None:
        raise _other_variant(path, f"a model that predicts {word!r}")
    return known


def folder_hints(folder: Path) -> Hints:
    """Hints from the configuration files of a diffusers folder.

    Raises:
        UserError: a file is not JSON, or the model predicts something that cannot be trained here.
    """
    unet = read_json(folder / "unet" / "config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    text = [read_json(folder / name / "config.json") for name in ("text_encoder", "text_encoder_2")]
    # diffusers' "attention_head_dim" is the number of heads in every Stable Diffusion.
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim")
    text_heads = tuple(config["num_attention_heads"] for config in text if _is_count(config.get("num_attention_heads")))
    name = str(scheduler.get("_class_name") or "")
    if name.startswith(("EDM", "FlowMatch")):
        raise _other_variant(folder, f"a model for {name}")
    return Hints(
        num_heads=_heads(heads),
        text_heads=text_heads or None,
        prediction_type=_prediction(folder, scheduler.get("prediction_type")),
        zero_terminal_snr=True if scheduler.get("rescale_betas_zero_snr") is True else None,
    )


def merged(base: Hints, over: Hints) -> Hints:
    """``base`` with everything that ``over`` says."""
    values = {field.name: getattr(over, field.name) for field in fields(Hints)}
    return replace(base, **{name: value for name, value in values.items() if value is not None})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one when the file is missing. Raises ``UserError`` when it is malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} is not a JSON object.")
    return value


def _metadata_hints(path: Path, metadata: Mapping[str, str]) -> Hints:
    said = next((text for key in _PREDICTION_KEYS if (text := metadata.get(key))), None)
    hints = Hints(prediction_type=_prediction(path, said))
    if hints.prediction_type is None and _is_true(metadata.get("ss_v_parameterization")):
        hints = replace(hints, prediction_type="v_prediction")
    if _is_true(metadata.get("ss_zero_terminal_snr")):
        hints = replace(hints, zero_terminal_snr=True)
    if hints.prediction_type is None and metadata.get("modelspec.architecture") == "stable-diffusion-v2-768-v":
        hints = replace(hints, prediction_type="v_prediction")
    try:
        ours = json.loads(metadata.get(HINTS_KEY, "{}"))
    except ValueError:
        return hints  # metadata is advice; somebody else's text under our key is none
    if not isinstance(ours, dict):
        return hints
    text_heads = ours.get("text_heads")
    return merged(
        hints,
        Hints(
            num_heads=_heads(ours.get("num_heads")),
            head_dim=_count(ours.get("head_dim")),
            text_heads=tuple(text_heads) if isinstance(text_heads, list) and all(map(_is_count, text_heads)) else None,
            prediction_type=_PREDICTIONS.get(str(ours.get("prediction_type"))),
        ),
    )


def _yaml_hints(path: Path) -> Hints:
    """The configuration that A1111 reads beside a checkpoint (ldm's and sgm's format)."""
    try:
        root = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path.name}, which describes the checkpoint beside it, cannot be read: {error}.") from error
    params = _dig(root, "model", "params")
    network = _dig(params, "unet_config", "params") or _dig(params, "network_config", "params")
    encoders = [_dig(params, "cond_stage_config"), *(_dig(params, "conditioner_config", "params", "emb_models") or [])]
    text_heads = [heads for encoder in encoders if (heads := _text_heads(_dig(encoder, "params"), path)) is not None]
    return Hints(
        num_heads=_count(_dig(network, "num_heads")),
        head_dim=_count(_dig(network, "num_head_channels")),
        text_heads=tuple(text_heads) or None,
        prediction_type=_yaml_prediction(path, params),
        zero_terminal_snr=True if _dig(params, "zero_terminal_snr") is True else None,
    )


def _yaml_prediction(path: Path, params: Any) -> str | None:
    """What a model predicts: ldm's ``parameterization``, or the class of sgm's denoiser that scales its output.

    Raises:
        UserError: it is a word or class of another kind of model.
    """
    model = path.with_suffix(".safetensors")
    denoiser = _dig(params, "denoiser_config", "params")
    for name in ("scaling_config", "discretization_config"):
        if "EDM" in _class_name(_dig(denoiser, name)):
            raise _other_variant(model, "an EDM model, as the .yaml beside it says")
    said = _prediction(model, _dig(params, "parameterization"))
    scaling = _class_name(_dig(denoiser, "scaling_config"))
    if scaling and scaling not in _SCALINGS:
        raise _other_variant(model, f"a model that predicts {scaling!r}")
    return said or _SCALINGS.get(scaling)


def _class_name(config: Any) -> str:
    """The class that a part of a .yaml names as its target, without its module."""
    return str(_dig(config, "target") or "").rpartition(".")[2]


def _text_heads(params: Any, path: Path) -> int | None:
    """Heads of a text encoder that a .yaml names by a transformers folder or an open_clip architecture."""
    arch, version = _dig(params, "arch"), _dig(params, "version")
    spec = importlib.util.find_spec("open_clip") if isinstance(arch, str) else None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        return _count(_dig(read_json(Path(folder) / "model_configs" / f"{Path(arch).name}.json"), "text_cfg", "heads"))
    if isinstance(version, str) and arch is None:
        # A folder is named relative to that of the WebUI, which is some parent of the checkpoint's.
        for parent in path.resolve().parents:
            if (config := parent / version / "config.json").is_file():
                return _count(read_json(config).get("num_attention_heads"))
    return None


def _dig(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _is_true(text: str | None) -> bool:
    return str(text or "").strip().lower() in _TRUE


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _count(value: Any) -> int | None:
    return value if _is_count(value) else None


def _heads(value: Any) -> int | tuple[int, ...] | None:
    if isinstance(value, list) and value and all(map(_is_count, value)):
        return tuple(value)
    return _count(value)
