"""Settings to begin with, for what is to be taught: the articles' values, adapted to the pictures at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_trainer.errors import UserError

FEW_PICTURES = 100
"""Below it the articles advise dropout."""

TEXT = "text"
"""The kind that learns from rows of text instead of pictures."""

_VISITS_PER_EPOCH = 100  # with few pictures, repeats make an epoch about this long
_MAX_REPEATS = 10


_ONE_THING = {
    "lora_rank": 12, "alpha": 24, "epochs": 12, "batch_size": 4, "learning_rate": 2e-4, "preserve": 0.3,
}  # fmt: skip
"""With others of its kind left as they are."""
_WORDS = {"lora_rank": 4, "alpha": 8, "batch_size": 1, "max_train_steps": 300, "learning_rate": 5e-4}
_PAIR = {"lora_rank": 4, "alpha": 1, "batch_size": 1, "max_train_steps": 50, "learning_rate": 5e-4}


@dataclass(frozen=True)
class Preset:
    """kind: its name in the API. settings: what it changes of the defaults. task: the kind of training that it is for,
    one of the setting ``task``."""

    kind: str
    title: str
    hint: str
    settings: dict[str, Any]
    task: str = "image"


PRESETS: dict[str, Preset] = {
    preset.kind: preset
    for preset in (
        Preset(
            "style",
            "Style",
            "A way of drawing or photographing. 50 to 200 pictures that share nothing else.",
            {"lora_rank": 8, "alpha": 16, "epochs": 10, "batch_size": 4, "learning_rate": 2e-4},
        ),
        Preset(
            "character",
            "Character",
            "One person or figure. 20 or more pictures from all sides, in several clothes and places.",
            _ONE_THING,
        ),
        Preset(
            "scene",
            "Scene",
            "A place or a type of background, in several lights and from several sides.",
            {"lora_rank": 16, "epochs": 15, "batch_size": 4, "learning_rate": 2e-4, "gradient_accumulation_steps": 2},
        ),
        Preset(
            "object",
            "Object",
            "A product or a thing, on different backgrounds.",
            _ONE_THING,
        ),
        Preset(
            TEXT,
            "Language model",
            "A way of answering, or facts: 100 or more rows of prompts and answers, for a language model.",
            {"lora_rank": 16, "alpha": 32, "epochs": 5, "batch_size": 2, "gradient_accumulation_steps": 4,
             "gradient_checkpointing": True, "learning_rate": 2e-4, "lr_scheduler": "cosine", "lr_warmup_ratio": 0.1,
             "dropout": 0.05, "validation_share": 0.1},
            TEXT,
        ),
        Preset(
            "expression",
            "Expression or pose",
            "What a face or a body does, from two pictures that differ in that alone, such as open and closed eyes.",
            {**_PAIR, "min_timestep": 500, "min_scale": 0.5, "pair_mask": True},
            "pair",
        ),
        Preset(
            "look",
            "Look or style",
            "How the same scene is drawn, from two pictures with the same content, such as with and without outlines.",
            {**_PAIR, "min_timestep": 200, "max_timestep": 400},
            "pair",
        ),
        Preset(
            "opposites",
            "Two folders",
            "A slider from pictures of something and pictures of its opposite, which need not show the same scenes.",
            {"lora_rank": 4, "alpha": 4, "batch_size": 1, "max_train_steps": 500, "learning_rate": 2e-4},
            "slider",
        ),
        Preset(
            "words_slider",
            "Slider",
            "More of one thing at weight 1 and more of its opposite at -1, such as old and young.",
            {**_WORDS, "both_ways": True},
            "words",
        ),
        Preset(
            "turn",
            "One into another",
            "One thing becomes another, and at weight -1 the other becomes the first.",
            {**_WORDS, "both_ways": True, "guidance": 2},
            "words",
        ),
        Preset(
            "erase",
            "Erase",
            "The model draws no longer what is named; name beside it what must stay.",
            {**_WORDS, "guidance": 1.25, "protected_batches": 3, "max_train_steps": 400},
            "words",
        ),
    )
}  # fmt: skip


def preset(
    kind: str, pictures: int | None = None, family: str | None = None, free: int | None = None
) -> dict[str, Any]:
    """The settings of a preset for so many pictures, a model of this family and so many bytes of free memory.

    Few pictures: dropout, and repeats that make an epoch about a hundred pictures long. Little memory: batches of 1
    with gradient checkpointing, and accumulation that keeps the effective batch; very little: half the rank, as the
    articles advise. How much is little, and what else differs, the family says. What learns a change keeps its rank,
    and has neither dropout nor repeats.

    Raises:
        UserError: there is no such preset.
    """
    if kind not in PRESETS:
        raise UserError(f"There is no preset {kind!r}.", field="preset", remedy=f"Use one of {', '.join(PRESETS)}.")
    task = PRESETS[kind].task
    if task == TEXT:
        return dict(PRESETS[kind].settings)
    from lora_trainer.models.families import find_family

    model = find_family(family)
    settings = {**PRESETS[kind].settings, **(model.presets.get(kind, {}) if model else {})}
    if pictures and task == "image":
        if pictures < FEW_PICTURES:
            settings["dropout"] = 0.1
        settings["repeats"] = max(1, min(_MAX_REPEATS, round(_VISITS_PER_EPOCH / pictures)))
    if model is not None and not (model.assume_roomy if free is None else free >= model.roomy_bytes):
        accumulation = settings.get("gradient_accumulation_steps", 1) * settings["batch_size"]
        settings |= {"batch_size": 1, "gradient_accumulation_steps": accumulation, "gradient_checkpointing": True}
        if free is not None and free < model.tight_bytes and task == "image":
            settings |= {name: settings[name] // 2 for name in ("lora_rank", "alpha") if name in settings}
    return settings
