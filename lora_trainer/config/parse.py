"""Settings and key=value pairs in, a checked ``TrainConfig`` out; and back."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_trainer import plugins
from lora_trainer.config.foreign import Translation, read_text, read_what_can_be_read
from lora_trainer.config.names import ALIASES, is_text
from lora_trainer.config.problems import Problems
from lora_trainer.config.prompts import parse_prompt
from lora_trainer.config.schema import FACTS, TrainConfig
from lora_trainer.config.values import check_limits, convert, is_off, kind_of, said_of, split_list, unquoted, wanted
from lora_trainer.config.yaml_text import file_text, yaml_value
from lora_trainer.errors import ConfigError, UserError, unusable
from lora_trainer.files import safe_name_problem

_MOST_UNKNOWN = 20
"""So many settings that do not exist are told, each with the name that is nearest, which takes time to find."""
_FREE_TEXT = ("default_caption", "description", "preview_prompts", "secondary_separator", "system_prompt")
"""Settings that may begin and end with quotes."""
_OTHER_WORDS = {
    ("lr_scheduler", "constant_with_warmup"): "constant", ("loss", "l2"): "mse", ("mixed_precision", "fp32"): "no",
    ("save_precision", "float"): "fp32", ("resume", ""): "auto", ("offload_blocks", ""): "auto",
}  # fmt: skip


def load(
    path: Path | str, overrides: Sequence[str] = (), report: Callable[[Translation], None] = lambda translation: None
) -> TrainConfig:
    """Read a file of settings, ours or another tool's, apply ``key=value`` overrides, check everything.

    report: gets what became of another tool's settings.

    Raises:
        ConfigError: with every problem found, each naming field, value and remedy.
        UserError: the file cannot be read or holds no settings.
    """
    path = Path(path)
    values, translation, problems = read_what_can_be_read(file_text(path), str(path), folder=path.parent)
    if translation is not None:
        report(translation)
    given = parse_overrides(overrides)
    replaced = {ALIASES.get(name, name) for name in given}
    kept = {name: value for name, value in values.items() if ALIASES.get(name, name) not in replaced}
    return from_own({**kept, **given}, problems)


def from_own(values: Mapping[str, Any], before: Sequence[UserError] = ()) -> TrainConfig:
    """``from_mapping`` for settings of the person who runs the trainer: the ``plugins`` that they name are loaded.

    Raises:
        ConfigError: see ``from_mapping``; or a plug-in cannot be loaded.
    """
    named = values.get("plugins") or []
    problems = Problems()
    with problems.gathered():
        plugins.load(split_list(named) if isinstance(named, str) else [str(path) for path in named])
    return from_mapping(values, [*before, *problems.found])


def read_file(path: Path) -> tuple[dict[str, Any], Translation | None]:
    """The settings in a file, by our names, and what became of another tool's. Raises UserError."""
    return read_text(file_text(path), str(path), folder=path.parent)


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """``["epochs=3", "target_modules=[to_q]"]`` -> values as YAML would read them.

    A text is taken as it stands, unless it is quoted: the shell has read it already, and to YAML ``./set #2`` would be
    a path and a comment.
    """
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name, text = name.strip().lstrip("-"), text.strip()
        if not equals:
            raise UserError(f"'{pair}' is not a setting.", remedy="Write name=value, such as epochs=3.")
        values[name] = text
        if _stands_as_it_is(name, text):
            continue
        values[name] = yaml_value(text)
    return values


def from_mapping(values: Mapping[str, Any], before: Sequence[UserError] = ()) -> TrainConfig:
    """Check ``values`` and build the configuration.

    before: problems that were found while the values were read.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[UserError] = []
    clean: dict[str, Any] = {}
    known = {field.name: field for field in dataclasses.fields(TrainConfig)}
    unknown = [given for given in values if ALIASES.get(given, given) not in known]
    problems += [_unknown(given, known) for given in unknown[:_MOST_UNKNOWN]]
    if len(unknown) > _MOST_UNKNOWN:
        message = f"{len(unknown) - _MOST_UNKNOWN} more settings do not exist."
        problems.append(UserError(message, remedy="This is no file of settings."))
    for given, value in values.items():
        name = ALIASES.get(given, given)
        if name not in known:
            continue
        if name in clean:
            problems.append(UserError(f"'{given}' is a second name of '{name}', which is set too.", field=given,
                                      remedy="Keep one of them."))  # fmt: skip
            continue
        if reason := unusable(value):
            problems.append(UserError(reason, field=given, remedy=wanted(name)))
            continue
        if value is None and known[name].default == "":
            value = ""  # "trigger_word:" with nothing behind it
        if isinstance(value, str) and name not in _FREE_TEXT:
            value = unquoted(value)
        if isinstance(value, str) and (separator := FACTS[name].separator):
            value = [part.strip() for part in value.split(separator) if part.strip()]
        if (name, str(value).strip().lower()) in _OTHER_WORDS:
            value = _OTHER_WORDS[name, str(value).strip().lower()]
        elif is_off(value, known[name]):
            value = None
        try:
            clean[name] = check_limits(convert(value, kind_of(name)), known[name].metadata)
        except (ValueError, OverflowError) as error:
            remedy = known[name].metadata.get("remedy") or wanted(name)
            message = "is empty." if value in (None, "") else said_of(value, error)
            problems.append(UserError(message, field=given, remedy=remedy))
    if clean.get("text_encoder_lr"):  # a rate of its own means that they are to learn
        clean.setdefault("train_text_encoder", True)
    config = TrainConfig(**clean)
    broken = {problem.field and ALIASES.get(problem.field, problem.field) for problem in problems}
    problems += [problem for problem in _across_fields(config) if problem.field not in broken]
    found = Problems()
    found.add(before)
    found.add(problems)
    if found.found:
        raise ConfigError(found.found, config)
    return config


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """Plain values by field name, every field named."""
    return dataclasses.asdict(config)


def _across_fields(config: TrainConfig) -> list[UserError]:
    """What is wrong between fields that are each fine alone."""
    problems = []

    def require(field: str, fine: bool, message: str, remedy: str) -> None:
        if not fine:
            problems.append(UserError(message, field=field, remedy=remedy))

    for field in ("block_ranks", "block_lr_weights"):
        blocks = getattr(config, field)
        require(
            field,
            blocks is None or (len(blocks) == 25 and min(blocks) >= 0),
            f"These are {len(blocks or [])} numbers, or one is below 0.",
            "Give 25 numbers of 0 or more: 12 in, the middle, 12 out.",
        )
    gpus = config.gpus or []
    require(
        "gpus",
        len(set(gpus)) == len(gpus) and min(gpus, default=0) >= 0,
        "A number is below 0, or there twice.",
        "Give each GPU's number once, such as 0, 1.",
    )
    require(
        "gpus",
        not gpus or ":" not in config.device,
        f"device names one of them ({config.device}).",
        "Set device: auto.",
    )
    for low, high in (("min_timestep", "max_timestep"), ("min_bucket_resolution", "max_bucket_resolution")):
        require(
            low,
            getattr(config, low) <= getattr(config, high),
            f"{getattr(config, low)} is above {high} ({getattr(config, high)}).",
            "Make it the smaller one.",
        )
    require(
        "target_modules",
        bool(config.target_modules) or config.train_text_encoder,
        "It names no layer.",
        "Leave it out to train attention, feed_forward and projection.",
    )
    require(
        "resolution",
        parse_resolution(config.resolution) is not None,
        f"{config.resolution!r} is no size.",
        "Write 512, or 768x512 (width x height), each from 64 to 8192, or auto.",
    )
    require(
        "debiased_estimation",
        not (config.debiased_estimation and isinstance(config.min_snr_gamma, float)),
        "It cannot be combined with min_snr_gamma.",
        "Leave min_snr_gamma out to use it.",
    )
    require(
        "dora",
        not config.dora or config.adapter == "lora",
        f"It does not exist for {config.adapter}.",
        "Use adapter: lora, or dora: false.",
    )
    require(
        "offload_blocks",
        not config.given_offload_blocks or config.given_gradient_checkpointing == 1,
        "What a block computes must not be kept while its weights are elsewhere.",
        "Set gradient_checkpointing: true, or offload_blocks: auto.",
    )
    require(
        "shard_base",
        not config.shard_base or config.given_gradient_checkpointing == 1,
        "What a block computes must not be kept when its weights are let go of.",
        "Set gradient_checkpointing: true, or shard_base: false.",
    )
    require(
        "shard_base",
        not (config.shard_base and (config.given_offload_blocks or config.quantize == "nf4")),
        "It cannot be combined with offload_blocks, nor with quantize: nf4.",
        "Leave out one of them.",
    )
    for prompt in config.preview_prompts:
        try:
            parse_prompt(prompt)
        except UserError as error:
            problems.append(error)
    for kind, field in (("augmentation", "augmentations"), ("regulariser", "regularisers")):
        for name in getattr(config, field):
            try:
                plugins.need(kind, name, field)
            except UserError as error:
                problems.append(error)
    for name, weight in config.regularisers.items():
        fine = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
        require("regularisers", fine, f"{weight!r}, the weight of {name}, is no number.", "Write name: 0.01.")
    name_problem = safe_name_problem(config.output_name) if config.output_name else None
    require(
        "output_name",
        name_problem is None,
        f"{config.output_name!r} cannot be a file name: {name_problem}.",
        "Choose another name.",
    )
    return problems


def parse_folder(text: str) -> tuple[int | None, str, str]:
    """An entry of more_folders: ``"10_dog=PATH"`` -> (10, "dog", "PATH"), ``"PATH"`` -> (None, "", "PATH")."""
    if match := re.fullmatch(r"(\d{1,5})_([^=/\\]*)=(.+)", text.strip()):
        return int(match[1]), match[2].strip(), match[3].strip()
    return None, "", text.strip()


def with_folder(text: str, change: Callable[[str], str]) -> str:
    """The entry of more_folders with another path."""
    repeats, words, path = parse_folder(text)
    return change(path) if repeats is None else f"{repeats}_{words}={change(path)}"


def parse_resolution(text: str) -> tuple[int, int] | str | None:
    """``"512"`` -> (512, 512); ``"768x512"`` -> (768, 512) (width, height); ``"auto"`` -> "auto"; else None."""
    if text == "auto":
        return "auto"
    match = re.fullmatch(r"(\d{1,9})(?:\s*[x×,*]\s*(\d{1,9}))?", text.strip().lower())
    if not match:
        return None
    width = int(match[1])
    height = int(match[2] or width)
    return (width, height) if all(64 <= side <= 8192 for side in (width, height)) else None


def _stands_as_it_is(name: str, text: str) -> bool:
    """Whether ``text`` is the value of a text setting, neither YAML's nothing nor quoted for it."""
    if text in ("", "null") or text.startswith(("'", '"')):
        return False
    facts = FACTS.get(ALIASES.get(name, name))
    return is_text(name) or (facts is not None and facts.separator is not None and not text.startswith("["))


def _unknown(name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name.lower().replace("-", "_"), [*known, *ALIASES], n=1, cutoff=0.6)
    hint = "Remove it; the README says where all settings stand."
    if near:
        hint = f"Did you mean '{ALIASES.get(near[0], near[0])}'?"
    return UserError("There is no such setting.", field=name, remedy=hint)
