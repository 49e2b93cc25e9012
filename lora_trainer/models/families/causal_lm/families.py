"""Which language models can be trained with the transformers that is installed.

An older release builds some models without a word and computes something else: what config.json asks for is compared
with what the release knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_trainer.errors import UserError

REMOTE_CODE = "chatglm"
"""The model_type whose code lies in the model's own folder."""


@dataclass(frozen=True)
class LanguageFamily:
    """name: model_type in config.json. since: the release of transformers that knows it. template: how conversations
    are written where neither the settings nor the tokenizer say it."""

    name: str
    title: str
    since: tuple[int, ...]
    template: str = "plain"


_TABLE = (
    LanguageFamily("llama", "LLaMA", (4, 30, 2)),
    LanguageFamily("mistral", "Mistral", (4, 34)),
    LanguageFamily("qwen2", "Qwen 2", (4, 37), "chatml"),
    LanguageFamily("phi3", "Phi 3", (4, 41)),
    LanguageFamily("gemma2", "Gemma 2", (4, 42)),
    LanguageFamily("glm", "GLM-4", (4, 46), "glm4"),
    LanguageFamily("qwen3", "Qwen 3", (4, 51), "chatml"),
    LanguageFamily("glm4", "GLM-4-0414", (4, 51), "glm4"),
    LanguageFamily(REMOTE_CODE, "ChatGLM2 and 3", (4, 30, 2), "chatglm3"),
)
LANGUAGE_FAMILIES: dict[str, LanguageFamily] = {family.name: family for family in _TABLE}


@dataclass(frozen=True)
class _Feature:
    """Something that LLaMA's config.json can ask for, and the release of transformers that knows it."""

    words: str
    since: tuple[int, ...]
    asked: Callable[[Mapping[str, Any]], bool]


_LLAMA_FEATURES = (
    _Feature(
        "grouped-query attention (num_key_value_heads)",
        (4, 31),
        lambda c: c.get("num_key_value_heads") not in (None, c.get("num_attention_heads")),
    ),
    _Feature("rope_scaling", (4, 31), lambda c: bool(c.get("rope_scaling"))),
    _Feature("rope_theta", (4, 33), lambda c: c.get("rope_theta") not in (None, 10000, 10000.0)),
    _Feature("attention_bias", (4, 35), lambda c: bool(c.get("attention_bias"))),
    _Feature("mlp_bias", (4, 42), lambda c: bool(c.get("mlp_bias"))),
    _Feature(
        "rope_scaling of the kind llama3, yarn or longrope",
        (4, 45),
        lambda c: (
            isinstance(c.get("rope_scaling"), dict)
            and c["rope_scaling"].get("rope_type", c["rope_scaling"].get("type")) in ("llama3", "yarn", "longrope")
        ),
    ),
    _Feature(
        "head_dim",
        (4, 46),
        lambda c: c.get("head_dim") not in (None, c.get("hidden_size", 0) // (c.get("num_attention_heads") or 1)),
    ),
)


def transformers_release() -> tuple[int, ...]:
    """Of the transformers that is installed: (4, 30, 2)."""
    import transformers

    return tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:3])


def family_of(config: Mapping[str, Any], source: str, trust_remote_code: bool) -> LanguageFamily:
    """The family of a model by its config.json. ``source``: its name in messages.

    Raises:
        UserError: it cannot be trained here; says which release of transformers it takes.
    """
    name, installed = str(config.get("model_type", "")), transformers_release()
    family = LANGUAGE_FAMILIES.get(name)
    if family is None:
        raise UserError(
            f"{source} is a language model of the kind {name!r}, which cannot be trained here.",
            field="base_model",
            remedy=f"Choose one of {', '.join(one.title for one in _TABLE)}.",
        )
    if installed < family.since:
        raise _too_old(source, family.title, family.since, installed)
    known = readable_config(config)
    lacking = [one for one in _LLAMA_FEATURES if name == "llama" and installed < one.since and one.asked(known)]
    if lacking:
        newest = max(lacking, key=lambda feature: feature.since)
        raise _too_old(source, newest.words, newest.since, installed)
    if "auto_map" in config and name == REMOTE_CODE and not trust_remote_code:
        raise UserError(
            f"{source} brings Python code of its own, which would be run.",
            field="trust_remote_code",
            remedy="Set it to true if you trust whoever made the folder.",
        )
    return family


def readable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as older releases understand it: since transformers 5 rope's settings stand in a table of their
    own."""
    known, rope = dict(config), config.get("rope_parameters")
    if isinstance(rope, dict) and transformers_release() < (5,):
        if "rope_theta" in rope:
            known.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default" and not known.get("rope_scaling"):
            known["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        if "partial_rotary_factor" in rope:
            known.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    return known


def _too_old(source: str, what: str, since: tuple[int, ...], installed: tuple[int, ...]) -> UserError:
    needed, there = (".".join(map(str, version)) for version in (since, installed))
    return UserError(
        f"{source} needs transformers {needed} or newer, for {what}; {there} is installed.",
        field="base_model",
        remedy="Train it with a newer transformers, or choose another model.",
    )
