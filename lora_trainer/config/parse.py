"""Settings and key=value pairs in, a checked ``TrainConfig`` out; and back."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types as python_types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_trainer import plugins
from lora_trainer.config.foreign import Translation, read_text, read_what_can_be_read
from lora_trainer.config.foreign.kohya import pairs
from lora_trainer.config.names import ALIASES, is_text, types
from lora_trainer.config.problems import Problems
from lora_trainer.config.prompts import parse_prompt
from lora_trainer.config.schema import FACTS, TrainConfig
from lora_trainer.config.yaml_text import file_text, yaml_value
from lora_trainer.errors import ConfigError, UserError, has_half_characters, shown, unusable
from lora_trainer.files import safe_name_problem

_NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_OTHER_WORDS = {
    ("lr_scheduler", "constant_with_warmup"): "constant", ("loss", "l2"): "mse", ("mixed_precision", "fp32"): "no",
    ("save_precision", "float"): "fp32", ("resume", ""): "auto",
}  # fmt: skip
_LARGEST = 2**63  # of whole numbers: what every store and every library takes
_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


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
        plugins.load(_split(named) if isinstance(named, str) else [str(path) for path in named])
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
        with contextlib.suppress(yaml.YAMLError):
            values[name] = yaml.safe_load(text)
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
    for given, value in values.items():
        name = ALIASES.get(given, given)
        if name not in known:
            problems.append(_unknown(given, known))
            continue
        if name in clean:
            problems.append(UserError(f"'{given}' is a second name of '{name}', which is set too.", field=given,
                                      remedy="Keep one of them."))  # fmt: skip
            continue
        if reason := unusable(value):
            problems.append(UserError(f"It {reason}.", field=given, remedy=f"It must be {_wanted(name)}."))
            continue
        if value is None and known[name].default == "":
            value = ""  # "trigger_word:" with nothing behind it
        if isinstance(value, str) and FACTS[name].path is not None:
            value = _unquoted(value)
        if isinstance(value, str) and (separator := FACTS[name].separator):
            value = [part.strip() for part in value.split(separator) if part.strip()]
        if (name, str(value).strip().lower()) in _OTHER_WORDS:
            value = _OTHER_WORDS[name, str(value).strip().lower()]
        elif _is_off(value, known[name]):
            value = None
        try:
            clean[name] = _check_limits(_convert(value, _kind(name)), known[name].metadata)
        except (ValueError, OverflowError) as error:
            remedy = known[name].metadata.get("remedy") or f"It must be {_wanted(name)}."
            said = "is empty" if value in (None, "") else f"{shown(value)} {error}"
            problems.append(UserError(f"{said}.", field=given, remedy=remedy))
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


def _kind(name: str) -> Any:
    """The type of a setting; the names of plug-ins are among its choices."""
    kind, plugin = types()[name], FACTS[name].plugin
    if plugin is None or typing.get_origin(kind) is not typing.Literal:
        return kind
    choices = (*typing.get_args(kind), *plugins.names(plugin))
    return typing.Literal[choices]


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
    hint = "Remove it; lora_trainer/config/schema.py lists all settings."
    if near:
        hint = f"Did you mean '{ALIASES.get(near[0], near[0])}'?"
    return UserError("There is no such setting.", field=name, remedy=hint)


def _convert(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``; strings that spell it are accepted. Raises ValueError saying what is wrong."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (python_types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "null")):
            return None
        kinds = [option for option in options if option is not type(None)]
        if typing.get_origin(kinds[0]) is typing.Literal and len(kinds) > 1:  # a word instead of a number
            word = str(value).strip().lower()
            return word if word in typing.get_args(kinds[0]) else _convert(value, kinds[1])
        return _convert(value, kinds[0])
    if origin is typing.Literal:
        return _choice(value, options)
    if origin is list:
        parts = _in_quotes(value) if isinstance(value, str) else value
        parts = parts if isinstance(parts, list) else _split(parts)
        return [_convert(part, options[0]) for part in parts]
    if origin is dict:
        value = _in_quotes(value) if isinstance(value, str) else value
        if not isinstance(value, dict):  # ["weight_decay=0.1"], as kohya's scripts take it
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or any("=" not in str(text) for text in texts):
                raise ValueError("is not a mapping of names to values")
            value = pairs(value)
        return {str(name): _convert_loose(part) for name, part in value.items()}
    converters: dict[Any, Callable[[Any], Any]] = {bool: _bool, int: _int, float: _float, str: _str}
    return converters[kind](value)


def _unquoted(path: str) -> str:
    """A path without the quotes around it, which Windows puts there when it is copied."""
    path = path.strip() if path.strip()[:1] in ("'", '"') else path
    return path[1:-1] if len(path) > 2 and path[0] == path[-1] and path[0] in "'\"" else path


def _is_off(value: Any, field: dataclasses.Field) -> bool:
    """Whether 0 stands for "not used", where nothing does: other trainers write it so."""
    if isinstance(value, bool) or type(None) not in typing.get_args(types()[field.name]):
        return False
    low = field.metadata.get("minimum", field.metadata.get("above", 0))
    zero = value == 0 or (isinstance(value, str) and _NUMBER.fullmatch(value.strip()) and float(value) == 0)
    return bool(zero) and (low > 0 or "above" in field.metadata)


def _in_quotes(text: str) -> Any:
    """A list or mapping that stands in quotes: what is inside them; other texts as they are."""
    if text.strip()[:1] not in ("[", "{"):
        return text
    return yaml_value(text)


def _choice(value: Any, options: Sequence[Any]) -> Any:
    if isinstance(value, bool):  # YAML 1.1 reads the bare word no as false
        value = "no" if not value and "no" in options else value
    text = str(value).strip().lower()
    for option in options:
        if text == str(option).lower():
            return option
    near = difflib.get_close_matches(text, [str(option) for option in options], n=1)
    raise ValueError("is not one of the choices" + (f" (did you mean {near[0]}?)" if near else ""))


def _split(value: Any) -> list[str]:
    if not isinstance(value, str):
        raise ValueError("is not a list")
    return [part.strip() for part in value.split(",") if part.strip()]


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _YES | _NO:
        return text in _YES
    raise ValueError("is neither true nor false")


def _float(value: Any) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value.strip())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("is not a number")
    if (isinstance(value, int) and abs(value) > _LARGEST) or not math.isfinite(value):
        raise ValueError("is not finite")
    return float(value)


def _int(value: Any) -> int:
    number = value if isinstance(value, int) and abs(value) <= _LARGEST else _float(value)
    if isinstance(value, bool) or number != int(number):
        raise ValueError("is not a whole number")
    return int(number)


def _str(value: Any) -> str:
    if isinstance(value, (list, dict)) or value is None:
        raise ValueError("is not text")
    text = str(value)
    if "\0" in text:
        raise ValueError("contains a NUL character")
    if has_half_characters(text):  # bytes of a name that are not UTF-8
        raise ValueError("is not valid Unicode text")
    return text


def _convert_loose(value: Any) -> Any:
    """Arguments passed through to a library: only YAML 1.1's habit of reading 1e-4 as text is mended."""
    if isinstance(value, list):
        return [_convert_loose(part) for part in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value


def _check_limits(value: Any, limits: Mapping[str, Any]) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if "minimum" in limits and value < limits["minimum"]:
            raise ValueError(f"is below {limits['minimum']}")
        if "maximum" in limits and value > limits["maximum"]:
            raise ValueError(f"is above {limits['maximum']}")
        if "above" in limits and value <= limits["above"]:
            raise ValueError(f"is not above {limits['above']}")
    return value


def _wanted(name: str) -> str:
    kind = _kind(name)
    optional = type(None) in typing.get_args(kind)
    if optional:
        kind = next(option for option in reversed(typing.get_args(kind)) if option is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        text = "one of " + ", ".join(str(option) for option in typing.get_args(kind))
    else:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        text = words.get(kind) or ("a list" if typing.get_origin(kind) is list else "a mapping")
    field = next(field for field in dataclasses.fields(TrainConfig) if field.name == name)
    limits = field.metadata
    if "minimum" in limits:
        text += f" from {limits['minimum']}" + (f" to {limits['maximum']}" if "maximum" in limits else "")
    elif "above" in limits:
        text += f" above {limits['above']}" + (f", at most {limits['maximum']}" if "maximum" in limits else "")
    return text + (" (or empty)" if optional else "")
