"""Text to a mapping, whichever of JSON, TOML and YAML it is."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from lora_trainer.config.yaml_text import check_backslashes, check_length, parse_yaml
from lora_trainer.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TOML_LINE = re.compile(r'\s*(\[{1,2}\s*[\w."-]+\s*\]{1,2}|["\w.-]+\s*=.*)\s*(#.*)?')


def parse_any(text: str, source: str = "The configuration") -> dict[str, Any]:
    """The mapping in ``text``. Raises UserError naming ``source`` and the line."""
    text = text.removeprefix("\ufeff")
    check_length(text, source)
    check_backslashes(text, source)
    if text.lstrip().startswith("{"):
        return _json(text, source)
    if is_toml(text):
        return _toml(text, source)
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
    try:
        values = json.loads(text)
    except RecursionError:
        raise UserError(f"{source} is nested too deep.", remedy="Give the file as its program wrote it.") from None
    except ValueError as json_error:
        try:
            return parse_yaml(text, source)  # {a: 1} is YAML in one line
        except UserError:
            raise UserError(
                f"{source} cannot be read as JSON: {json_error}.", remedy="Give the file as its program wrote it."
            ) from None
    return {str(name): value for name, value in values.items()}


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = "Each line has the form 'name = value'; text stands in quotes."
        raise UserError(f"{source} cannot be read as TOML: {error}.", remedy=remedy) from None
