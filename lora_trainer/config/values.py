"""A value as its setting takes it, or a sentence on why it is none."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types as python_types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_trainer import plugins
from lora_trainer.config.foreign.kohya import pairs
from lora_trainer.config.names import types
from lora_trainer.config.schema import FACTS, TrainConfig
from lora_trainer.config.yaml_text import yaml_value
from lora_trainer.errors import has_half_characters, shown

_NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_LARGEST = 2**63  # of whole numbers: what every store and every library takes
_QUOTES = ("''", '""', "“”", "‘’")
_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


class _UnfitError(ValueError):
    """A value is not what its setting takes: a sentence with {0} for the value, and {1} for the one of ``args``."""

    def __init__(self, sentence: str, *args: object):
        super().__init__(sentence, *args)
        self.sentence = sentence


def said_of(value: Any, error: Exception) -> str:
    if isinstance(error, _UnfitError):
        return error.sentence.format(shown(value), *error.args[1:])
    return f"{shown(value)} cannot be read: {error}."


def kind_of(name: str) -> Any:
    """The type of a setting; the names of plug-ins are among its choices."""
    kind, plugin = types()[name], FACTS[name].plugin
    if plugin is None or typing.get_origin(kind) is not typing.Literal:
        return kind
    choices = (*typing.get_args(kind), *plugins.names(plugin))
    return typing.Literal[choices]


def convert(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``; strings that spell it are accepted. Raises ValueError saying what is wrong."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (python_types.UnionType, typing.Union):
        empty = value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "null"))
        if empty and type(None) in options:
            return None
        kinds = [option for option in options if option is not type(None)]
        if typing.get_origin(kinds[0]) is typing.Literal and len(kinds) > 1:  # a word instead of a number
            word = str(value).strip().lower()
            if word in typing.get_args(kinds[0]):
                return word
            kinds = kinds[1:]
            if kinds[0] is bool and len(kinds) > 1 and word not in _YES | _NO:  # a number instead of yes and no
                kinds = kinds[1:]
        return convert(value, kinds[0])
    if origin is typing.Literal:
        return _choice(value, options)
    if origin is list:
        parts = _in_quotes(value) if isinstance(value, str) else value
        parts = parts if isinstance(parts, list) else split_list(parts)
        return [convert(part, options[0]) for part in parts]
    if origin is dict:
        value = _in_quotes(value) if isinstance(value, str) else value
        if not isinstance(value, dict):  # ["weight_decay=0.1"], as kohya's scripts take it
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or any("=" not in str(text) for text in texts):
                raise _UnfitError("{0} is not a mapping of names to values.")
            value = pairs(value)
        return {str(name): _convert_loose(part) for name, part in value.items()}
    converters: dict[Any, Callable[[Any], Any]] = {bool: _bool, int: _int, float: _float, str: _str}
    return converters[kind](value)


def unquoted(path: str) -> str:
    """A path, or another value, without the quotes around it; Windows puts them there when a path is copied."""
    bare = path.strip()
    in_quotes = bare[:1] + bare[-1:] in _QUOTES and len(bare) > 2 and not {bare[0], bare[-1]} & set(bare[1:-1])
    return bare[1:-1] if in_quotes else path


def is_off(value: Any, field: dataclasses.Field) -> bool:
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
    if near:
        raise _UnfitError("{0} is not one of the choices (did you mean {1}?).", near[0])
    raise _UnfitError("{0} is not one of the choices.")


def split_list(value: Any) -> list[str]:
    if not isinstance(value, str):
        raise _UnfitError("{0} is not a list.")
    return [part.strip() for part in value.split(",") if part.strip()]


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _YES | _NO:
        return text in _YES
    raise _UnfitError("{0} is neither true nor false.")


def _float(value: Any) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value.strip())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _UnfitError("{0} is not a number.")
    if (isinstance(value, int) and abs(value) > _LARGEST) or not math.isfinite(value):
        raise _UnfitError("{0} is not finite.")
    return float(value)


def _int(value: Any) -> int:
    number = value if isinstance(value, int) and abs(value) <= _LARGEST else _float(value)
    if isinstance(value, bool) or number != int(number):
        raise _UnfitError("{0} is not a whole number.")
    return int(number)


def _str(value: Any) -> str:
    if isinstance(value, (list, dict)) or value is None:
        raise _UnfitError("{0} is not text.")
    text = str(value)
    if "\0" in text:
        raise _UnfitError("{0} contains a NUL character.")
    if has_half_characters(text):  # bytes of a name that are not UTF-8
        raise _UnfitError("{0} is not valid Unicode text.")
    return text


def _convert_loose(value: Any) -> Any:
    """Arguments passed through to a library: only YAML 1.1's habit of reading 1e-4 as text is mended."""
    if isinstance(value, list):
        return [_convert_loose(part) for part in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value


def check_limits(value: Any, limits: Mapping[str, Any]) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if "minimum" in limits and value < limits["minimum"]:
            raise _UnfitError("{0} is below {1}.", limits["minimum"])
        if "maximum" in limits and value > limits["maximum"]:
            raise _UnfitError("{0} is above {1}.", limits["maximum"])
        if "above" in limits and value <= limits["above"]:
            raise _UnfitError("{0} is not above {1}.", limits["above"])
    return value


_WANTED = {
    int: "It must be a whole number.",
    (int, "minimum"): "It must be a whole number from {0}.",
    (int, "minimum", "maximum"): "It must be a whole number from {0} to {1}.",
    float: "It must be a number.",
    (float, "minimum"): "It must be a number from {0}.",
    (float, "minimum", "maximum"): "It must be a number from {0} to {1}.",
    (float, "above"): "It must be a number above {0}.",
    (float, "above", "maximum"): "It must be a number above {0}, at most {1}.",
    bool: "It must be true or false.",
    str: "It must be text.",
    list: "It must be a list.",
    dict: "It must be a mapping.",
}


def wanted(name: str) -> str:
    """What a setting takes, as one to three sentences."""
    kind, words = kind_of(name), ""
    optional = type(None) in typing.get_args(kind)
    if typing.get_origin(kind) in (python_types.UnionType, typing.Union):
        *others, kind = (option for option in typing.get_args(kind) if option is not type(None))
        choices = (("true", "false") if option is bool else typing.get_args(option) for option in others)
        words = ", ".join(str(word) for option in choices for word in option)
    limits = next(field for field in dataclasses.fields(TrainConfig) if field.name == name).metadata
    if typing.get_origin(kind) is typing.Literal:
        text = f"It must be one of {', '.join(str(option) for option in typing.get_args(kind))}."
    else:
        given = [limit for limit in ("minimum", "above", "maximum") if limit in limits]
        kind = typing.get_origin(kind) or kind
        text = _WANTED[(kind, *given) if given else kind].format(*(limits[limit] for limit in given))
    text = f"{text} It may also be {words}." if words else text
    return f"{text} It may be empty." if optional else text
