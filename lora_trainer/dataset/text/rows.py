"""Rows of prompts and answers, from JSONL or JSON, in any of four forms, as conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError

ENDINGS = (".jsonl", ".json")
_ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
    "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("input", "output"))


@dataclass(frozen=True)
class Message:
    """role: "system", "user" or "assistant". extra: alpaca's ``input``, which belongs to its instruction."""

    role: str
    content: str
    extra: str = ""

    @property
    def text(self) -> str:
        return f"{self.content}\n\n{self.extra}" if self.extra else self.content


@dataclass(frozen=True)
class Row:
    """One conversation. file, line: where it stands; line counts from 1 (in a JSON list: its place in the list)."""

    file: Path
    line: int
    messages: tuple[Message, ...]

    @property
    def where(self) -> str:
        return f"{self.file.name}:{self.line}"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be learned from, and why."""

    file: Path
    line: int
    reason: str

    @property
    def where(self) -> str:
        return f"{self.file.name}:{self.line}"


class _Malformed(ValueError):
    """What is wrong with a row, in words."""


def text_files(path: Path) -> list[Path]:
    """The files with rows: ``path`` itself, or those in the folder. Raises UserError when there are none."""
    if path.is_file():
        if path.suffix.lower() not in ENDINGS:
            message = f"{path.name} is neither .jsonl nor .json."
            raise UserError(message, field="train_data_dir", remedy="Rename it if it is.")
        return [path]
    found = sorted(one for one in path.glob("*") if one.suffix.lower() in ENDINGS) if path.is_dir() else []
    if not found:
        message = f"{path.name} holds no .jsonl or .json file." if path.is_dir() else f"There is no {path}."
        remedy = 'Give a file with lines such as {"prompt": "…", "response": "…"}.'
        raise UserError(message, field="train_data_dir", remedy=remedy)
    return found


def read_rows(path: Path) -> tuple[list[Row], list[BadRow]]:
    """All rows of a file or folder, and those that cannot be read, in their order.

    Raises:
        UserError: a file cannot be read at all.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    for file in text_files(Path(path)):
        for line, value in _values(file):
            try:
                rows.append(Row(file, line, _conversation(value)))
            except _Malformed as problem:
                bad.append(BadRow(file, line, str(problem)))
    return rows, bad


def _values(file: Path) -> Iterator[tuple[int, Any]]:
    """Each row as JSON gives it, or the ``_Malformed`` that says why it is none, with its line."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.", field="train_data_dir") from error
    if file.suffix.lower() == ".json":
        whole = _parsed(data)
        if isinstance(whole, list):
            yield from enumerate(whole, 1)
            return
        if isinstance(whole, dict) and not isinstance(whole, _Malformed):
            yield 1, whole
            return
    for line, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if text.strip():
            yield line, _parsed(text)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return _Malformed("it is not UTF-8")
    except RecursionError:
        return _Malformed("it is nested too deeply")
    except ValueError as error:
        return _Malformed(f"it is no JSON ({error})")


def _conversation(value: Any) -> tuple[Message, ...]:
    if isinstance(value, _Malformed):
        raise value
    if not isinstance(value, Mapping):
        raise _Malformed("it is no JSON object")
    messages = _messages(value)
    system = _text(value, "system", optional=True)
    if system and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    turns = messages[1:] if messages[0].role == "system" else messages
    for place, message in enumerate(turns):
        if message.role != ("user", "assistant")[place % 2]:
            raise _Malformed("its messages do not alternate between user and assistant, beginning with the user")
        if not message.content.strip():
            raise _Malformed(f"its {'prompt' if message.role == 'user' else 'answer'} is empty")
    if not turns or len(turns) % 2:
        raise _Malformed("it does not end with an answer")
    return tuple(messages)


def _messages(value: Mapping[str, Any]) -> list[Message]:
    for name, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if name in value:
            return _listed(value[name], name, role, content)
    if "instruction" in value:  # alpaca
        history = [Message(role, text) for pair in _history(value) for role, text in zip(("user", "assistant"), pair)]
        extra = _text(value, "input", optional=True)
        asked = Message("user", _text(value, "instruction"), extra)
        return [*history, asked, Message("assistant", _text(value, "output" if "output" in value else "response"))]
    for prompt, answer in _PAIRS:
        if prompt in value and answer in value:
            return [Message("user", _text(value, prompt)), Message("assistant", _text(value, answer))]
    given = ", ".join(map(str, list(value)[:5])) or "nothing"
    raise _Malformed(f"it has {given}, not prompt and response, instruction and output, messages or conversations")


def _listed(entries: Any, name: str, role: str, content: str) -> list[Message]:
    if not isinstance(entries, list) or not entries:
        raise _Malformed(f"its {name} are no list")
    found = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise _Malformed(f"one of its {name} is no JSON object")
        role_key = role if role in entry else "role" if "role" in entry else "from"
        given = str(entry.get(role_key, "")).strip().lower()
        if given not in _ROLES:
            raise _Malformed(f"the role {given!r} is none of system, user and assistant")
        found.append(Message(_ROLES[given], _text(entry, content if content in entry else "content")))
    return found


def _history(value: Mapping[str, Any]) -> list[list[str]]:
    history = value.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise _Malformed("its history is no list of pairs")
    return history


def _text(value: Mapping[str, Any], name: str, optional: bool = False) -> str:
    text = value.get(name)
    if text is None and optional:
        return ""
    if not isinstance(text, str):
        raise _Malformed(f"its {name} is no text" if name in value else f"it has no {name}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _Malformed(f"its {name} is no valid Unicode")
    return text
