"""Text to a mapping, whichever of JSON, TOML and YAML it is."""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from typing import Any

from lora_trainer.config.salvage import Fault, Form, parse_or_salvage
from lora_trainer.config.yaml_text import check_length, parse_yaml, wrong_backslashes
from lora_trainer.errors import UnreadableError, UserError, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TOML_PLACE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$")
_TOML_LINE = re.compile(r'\s*(\[{1,2}\s*[\w."-]+\s*\]{1,2}|["\w.-]+\s*=.*)\s*(#.*)?')


_LONG_NAME = re.compile(r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){50}""")
"""A name of so many parts that tomllib takes minutes."""


def parse_any(text: str, source: str = "The configuration") -> dict[str, Any]:
    """The mapping in ``text``. Raises UserError naming ``source`` and each line that is wrong."""
    text = text.removeprefix("\ufeff")
    check_length(text, source)
    if text.lstrip().startswith("{"):
        return _json(text, source)
    if is_toml(text):
        return parse_or_salvage(text, source, _TOML, wrong_backslashes(text, source))
    return parse_yaml(text, source)


def form_of(text: str) -> str:
    """JSON, TOML or YAML: what ``parse_any`` reads the text as first."""
    text = text.removeprefix("\ufeff")
    return "JSON" if text.lstrip().startswith("{") else "TOML" if is_toml(text) else "YAML"


def is_toml(text: str) -> bool:
    """Whether the first line that says anything is TOML's (``name = value`` or ``[section]``) and not YAML's."""
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            return _TOML_LINE.fullmatch(line) is not None
    return False


def _json(text: str, source: str) -> dict[str, Any]:
    if wrong := wrong_backslashes(text, source):
        rest = "\n".join("" if number in wrong else line for number, line in enumerate(text.splitlines(), start=1))
        values = {}
        with suppress(UserError):
            values = parse_yaml(rest, source)  # which minds no comma at the end
        raise UnreadableError(list(wrong.values()), values)
    try:
        values = json.loads(text)
    except RecursionError:
        raise UserError(f"{source} is nested too deep.", remedy="Give the file as its program wrote it.") from None
    except ValueError as json_error:
        try:
            return parse_yaml(text, source)  # {a: 1} is YAML in one line
        except UserError:
            line = getattr(json_error, "lineno", 1)
            said = shown(text.splitlines()[line - 1].strip(), 80)
            raise UserError(
                f"{source} cannot be read as JSON (line {line}): {getattr(json_error, 'msg', json_error)}, in {said}.",
                remedy="Give the file as its program wrote it.",
            ) from None
    return {str(name): value for name, value in values.items()}


def _toml(text: str) -> dict[str, Any]:
    if found := _LONG_NAME.search(text):
        raise Fault("a name has too many parts", text.count("\n", 0, found.start()) + 1)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        place = _TOML_PLACE.search(str(error))
        what = _TOML_PLACE.sub("", str(error)).rstrip()
        at_end = len(text.rstrip().splitlines()) or None
        raise Fault(what, int(place[1]) if place and place[1] else at_end) from None


_TOML = Form(
    "TOML",
    _toml,
    re.compile(r"""\s*(["']?[A-Za-z_][\w.-]*["']?\s*=|\[{1,2}\s*[A-Za-z_"][\w."-]*\s*\]{1,2}\s*(#|$))"""),
    "Each line has the form 'name = value'; text stands in quotes.",
)
