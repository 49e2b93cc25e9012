"""The network of kohya's scripts and LyCORIS: its kind, its layers, its ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_trainer.config.foreign.kohya import CANNOT, HARMLESS, NOTHING
from lora_trainer.config.foreign.report import Reading, is_off, is_on, number
from lora_trainer.config.schema import AdapterSettings

HIGHEST = next(one for one in dataclasses.fields(AdapterSettings) if one.name == "lora_rank").metadata["maximum"]
_ALL = ["attention", "feed_forward", "projection"]
_PRESETS: dict[str, tuple[bool, bool, list[str]]] = {
    "full": (True, True, []),
    "full-lin": (False, True, [*_ALL, "conv_linear"]),
    "attn-mlp": (False, True, []),
    "attn-only": (False, True, ["attention"]),
    "unet-only": (True, False, []),
    "unet-transformer-only": (False, False, []),
    "unet-convblock-only": (True, False, ["conv", "conv_linear"]),
}
"""LyCORIS' presets (06ba3b23: lycoris/config.py): whether the 3×3 convolutions and the text encoders learn, and
target_modules where they are others than ours."""


def lycoris_preset(reading: Reading, name: str, given: Any, family: str | None) -> tuple[bool, bool]:
    """Whether the convolutions learn with a preset of LyCORIS, and whether the UNet learns alone. name: of the
    setting. family: see ``kohya_flow.family_of``."""
    word = str(given or "full")
    if word not in _PRESETS:
        reading.unmet(name, word, "the layers of full take their place; give them as target_modules")
        word = "full"
    convolutions, text, layers = _PRESETS[word]
    if layers and (family is None or layers == ["attention"]):
        reading.set(name, "target_modules", layers)
    if word == "attn-only":
        reading.set(name, "text_encoder_target_modules", layers)
    if not text:
        reading.set(name, "train_text_encoder", False)
    return convolutions, not text


def whole_matrices(reading: Reading, name: str, value: Any, ours: str) -> None:
    """A LoKr whose larger factor is not taken apart, as LyCORIS makes it of a rank above the layer's size."""
    reading.set(name, ours, HIGHEST)
    reading.translation.settings["alpha" if ours == "lora_rank" else "conv_alpha"] = None
    reading.note(f"{name} ({value}) means whole matrices: {ours}: {HIGHEST} learns those of up to {2 * HIGHEST} rows.")


def _rank(reading: Reading, name: str, ours: str, alpha: str) -> None:
    """A rank, with the alpha that is set already; one above the highest is lowered, at the same strength."""
    rank, settings = number(reading.left.get(name)), reading.translation.settings
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank <= HIGHEST:
        reading.take(name, ours, number)
    elif settings.get("adapter") == "lokr":
        whole_matrices(reading, name, reading.pop(name), ours)
    else:
        if isinstance(settings.get(alpha), (int, float)):
            settings[alpha] = settings[alpha] * HIGHEST / rank
        settings[ours] = HIGHEST
        reading.unmet(name, rank, f"{ours}: {HIGHEST} takes its place, with alpha in the same proportion")


ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}


def network(reading: Reading, kind: str, arguments: dict[str, Any], *, convolutions: bool, name: str) -> None:
    """A LoRA of this kind with kohya's and LyCORIS' arguments.

    kind: an algorithm of LyCORIS, or lora. convolutions: whether the tool trains the 3×3 convolutions with these
    settings. name: the setting that says the kind, for the report.
    """
    settings = reading.translation.settings
    if (adapter := ALGORITHMS.get(kind.lower())) is None:
        settings["adapter"] = "lora"
        reading.unmet(name, kind, "a plain LoRA takes its place")
    elif adapter != "lora" or kind.lower() != "lora":
        reading.set(name, "adapter", adapter)
    network_alpha = number(reading.pop("network_alpha"))
    # 1 is what kohya's scripts take where none is given; 0 means the rank.
    settings["alpha"] = 1.0 if network_alpha is None else None if is_off(network_alpha) else network_alpha
    if network_alpha is not None:
        reading.set("network_alpha", "alpha", settings["alpha"])
    _rank(reading, "network_dim", "lora_rank", "alpha")
    inner = Reading(reading.translation, arguments, f"{name}.", reading.folder)
    if convolutions and is_on(arguments.get("conv_dim")):
        settings["conv_alpha"] = 1.0
        inner.take_unless_off("conv_alpha", "conv_alpha", number)
        _rank(inner, "conv_dim", "conv_rank", "conv_alpha")
    else:
        inner.ignore("conv_dim", "conv_alpha")
    _arguments(inner)


def arguments(reading: Reading, given: dict[str, Any]) -> None:
    """``network_args`` beside settings of our own names."""
    inner = Reading(reading.translation, given, "network_args.", reading.folder)
    if is_on(given.get("algo")):
        inner.unmet("algo", given["algo"], "use adapter")
    if str(reading.left.get("adapter")) == "lokr":
        inner.take("factor", "lokr_factor", number)
    inner.take_unless_off("conv_dim", "conv_rank", number)
    inner.take_unless_off("conv_alpha", "conv_alpha", number)
    _arguments(inner)


def _arguments(inner: Reading) -> None:
    adapter = inner.translation.settings.get("adapter")
    inner.take_all({"dropout": "dropout", "rank_dropout": "rank_dropout"})
    inner.take_unless_off("module_dropout", "module_dropout", number)
    if adapter == "lokr":
        inner.take("factor", "lokr_factor", number)
    inner.ignore("factor")
    for dora in ("dora_wd", "weight_decompose"):
        if is_on(inner.left.get(dora)) and adapter in ("loha", "lokr"):
            inner.unmet(dora, inner.left[dora], "it goes with adapter: lora")
        inner.take_unless_off(dora, "dora", is_on)
    _blocks(inner)
    inner.ignore("algo", "preset", *NOTHING)
    inner.cannot(CANNOT, HARMLESS)
    inner.finish()


def _blocks(inner: Reading) -> None:
    if is_on(inner.left.get("block_dims")):
        inner.take("block_dims", "block_ranks", _numbers)
    weights = [_numbers(inner.left.get(part)) for part in ("down_lr_weight", "mid_lr_weight", "up_lr_weight")]
    if any(is_on(inner.left.get(part)) for part in ("down_lr_weight", "mid_lr_weight", "up_lr_weight")):
        whole = [part or [1.0] * size for part, size in zip(weights, (12, 1, 12))]
        if [len(part) for part in whole] == [12, 1, 12]:
            inner.set(
                "down_lr_weight, mid_lr_weight, up_lr_weight", "block_lr_weights", [*whole[0], *whole[1], *whole[2]]
            )
        else:
            inner.unmet("down_lr_weight", inner.left.get("down_lr_weight"), "give 25 numbers as block_lr_weights")
    for part in ("down_lr_weight", "mid_lr_weight", "up_lr_weight"):
        inner.left.pop(part, None)


def _numbers(value: Any) -> list[Any]:
    if is_off(value):
        return []
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    return [number(part) for part in parts]
