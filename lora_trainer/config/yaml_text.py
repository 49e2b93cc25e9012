"""Settings as YAML: read with what a person meant, written so that every reader sees the same values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import yaml

from lora_trainer.config.names import ALIASES, is_text
from lora_trainer.config.salvage import Fault, Form, parse_or_salvage
from lora_trainer.config.schema import GROUPS, TrainConfig, settings_where
from lora_trainer.errors import UserError, unusable

_SETTING = re.compile(r'\s*(?:-\s+)?"?([\w.]+)"?\s*[:=]')
_PATHS = settings_where(lambda facts: facts.path is not None)
_LONGEST, _MOST_LINES, _DEEPEST = 200_000, 10_000, 20
_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)
"""What PyYAML raises; for a value that does not fit its tag, as in ``!!timestamp x``, whatever its conversion does."""
_PATH_ENDINGS = ("_dir", "_path", "_folder", "_file", "_model", "path_or_name", "name_or_path")
_SINGLE_BACKSLASH = re.compile(r'[:=]\s*"((?:\\\\|[^"\\])*\\[^"\\][^"]*)"')
_FAULTS = (
    ("could not find expected ':'", "there is no colon behind the name", "Write name: value.", True),
    ("mapping values are not allowed", "there is a colon in the text, or the line is indented too far",
     "Put text that holds a colon in quotes; each name stands at the beginning of its line.", False),
    ("found unexpected end of stream", "the quotes are not closed", "Close them.", True),
    ("expected ',' or ']'", "the bracket is not closed, or a comma is missing", "Write [one, two].", True),
    ("expected ',' or '}'", "the bracket is not closed, or a comma is missing", "Write {name: value}.", True),
    ("cannot start any token", "it begins with a character that has a meaning of its own",
     "Put the text in quotes; indent with spaces, not with tabs.", False),
    ("expected the node content, but found '<stream end>'", "the bracket is not closed", "Write [one, two].", False),
    ("is set twice", "", "Keep one of them.", False),
    ("expected <block end>", "more follows behind the text in quotes, or the line is not indented as those before it",
     "Put the whole text in quotes, or none of it.", False),
)  # fmt: skip
"""What PyYAML says, the same in plain words ("" keeps it), the remedy, and whether the line where it began is named."""
_DRIVE = re.compile(r'(?<!\')"((?:[A-Za-z]:|\\\\\w+)(?:\\\\[^"\\]*)*\\[^"\\][^"]*)"')


def file_text(path: Path) -> str:
    """The text of a file of settings. Raises UserError when there is none, or it is too long."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_LONGEST + 1)
    except FileNotFoundError:
        raise UserError(f"There is no configuration at {path}.", remedy="Check the path after --config.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).", remedy="Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}.", remedy="Give the path of a YAML, JSON or TOML file."
        ) from None
    check_length(text, str(path))
    return text


def wrong_backslashes(text: str, source: str) -> dict[int, UserError]:
    """Lines with a Windows path in double quotes with single backslashes: \\n and \\t in it are a new line and a tab to
    YAML, TOML and JSON."""
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        named = _SETTING.match(line)
        of_a_path = named and (ALIASES.get(named[1], named[1]) in _PATHS or named[1].endswith(_PATH_ENDINGS))
        match = (of_a_path and _SINGLE_BACKSLASH.search(line)) or _DRIVE.search(line)
        if line.lstrip().startswith("#") or not match:
            continue
        path = match[1][:2] + match[1][2:].replace("\\\\", "\\")  # a server's name begins with two
        slashes = '"' + path.replace("\\", "/") + '"'
        is_json = text.lstrip().startswith("{")
        found[number] = UserError(
            f"{source}, line {number}: in double quotes a backslash means something else than in a path.",
            field=named[1] if named else None,
            remedy=f"Write {slashes}." if is_json else f"Write '{path}' in single quotes, or {slashes} with slashes.",
        )
    return found


def check_length(text: str, source: str) -> None:
    """Raises UserError for a text that is too long for settings: reading megabytes of YAML takes minutes."""
    if len(text) > _LONGEST:
        raise UserError(
            f"{source} has more than {_LONGEST} characters; that is no file of settings.",
            remedy=f"Give one of up to {_LONGEST} characters.",
        )
    if (lines := text.count("\n")) > _MOST_LINES:
        raise UserError(
            f"{source} has {lines} lines; that is no file of settings.",
            remedy=f"Give one of up to {_MOST_LINES} lines.",
        )


def yaml_value(text: str) -> Any:
    """A value in YAML ``text``, such as a list in quotes; the text itself where it is none."""
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader) if len(text) <= _LONGEST else text
    except _UNREADABLE:
        return text
    return text if unusable(value) else value


def parse_yaml(text: str, source: str = "The configuration") -> dict[str, Any]:
    """The mapping in YAML ``text``. Raises UserError naming ``source`` and each line that is wrong."""
    check_length(text, source)
    return parse_or_salvage(text, source, YAML, wrong_backslashes(text, source))


def _mapping(text: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except _UNREADABLE as error:
        problem = getattr(error, "problem", None) or "it is not valid YAML"
        mark, begun = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
        known = (row for row in _FAULTS if row[0] in problem)
        _, meaning, remedy, from_its_beginning = next(known, ("", problem, None, False))
        mark = begun if from_its_beginning and begun else mark
        alias = "undefined alias" in problem
        raise Fault(meaning or problem, mark.line + 1 if mark else None, remedy, alias) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise Fault(f"it holds a {type(values).__name__}, not a setting", 1, "Each line has the form 'name: value'.")
    return {str(key): value for key, value in values.items()}


def to_yaml(config: TrainConfig, only: Container[str] | None = None) -> str:
    """The effective configuration as YAML, grouped as the tab shows it; ``load`` reads it back to an equal one.

    only: names of the settings that are written; the others have their defaults.
    """
    values = dataclasses.asdict(config)
    blocks = []
    for title, group in GROUPS:
        names = [field.name for field in dataclasses.fields(group) if only is None or field.name in only]
        if not names:
            continue
        block = yaml.dump(
            {name: values[name] for name in names}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000
        )
        blocks.append(f"# {title}\n{block}")
    return "\n".join(blocks)


_TEXT_TAG = "tag:yaml.org,2002:str"
_GUESSED_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp")}


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice (YAML would silently keep the last) and endless alias expansion.

    What a text setting holds is read as it is written: to YAML 1.1 a trigger word ``on`` is true, a name ``007`` is 7,
    and ``1.10`` is 1.1.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Lists of aliases of lists of aliases … are a few lines here and billions of values for whoever looks at them.
        if self._depth > 1 and self.check_event(yaml.AliasEvent):
            problem = "an alias stands for a whole setting, not for a part of one"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        if self._depth > _DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "it is nested too deep", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name must be plain text", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key_node.value}' is set twice", key_node.start_mark
                )
            seen.add(key_node.value)
            if is_text(key_node.value) and value_node.tag in _GUESSED_TAGS:
                value_node.tag = _TEXT_TAG
        return super().construct_mapping(node, deep)


YAML = Form(
    "YAML",
    _mapping,
    re.compile(r"""["']?[A-Za-z_][\w.-]*["']?\s*:(\s|$)"""),
    "Each line has the form 'name: value'; quote text with special characters.",
)


class _Dumper(yaml.SafeDumper):
    """Writes lists in one line and floats so that YAML 1.1 readers see numbers (2.0e-04, not 2e-4)."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
