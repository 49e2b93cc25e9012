"""The errors that a person is meant to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class UserError(Exception):
    """Something the user can put right. Shown as one message, never as a traceback.

    ``message`` says what is wrong and names the file or value, ``field`` the setting it concerns (the tab shows
    the message beside it), ``remedy`` what to do about it. ``code``: the exit code; 2 says that the same command fails
    again.
    """

    code = 2

    def __init__(self, message: str, *, field: str | None = None, remedy: str | None = None):
        super().__init__(message)
        self.message = message
        self.field = field
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}" if self.field else self.message
        return f"{text} {self.remedy}" if self.remedy else text


class RetryError(UserError):
    """What the same command puts right when it is started again."""

    code = 1


class ConfigError(UserError):
    """Every problem of a configuration at once; ``problems`` holds one ``UserError`` for each.

    config: the settings that are right, the others at their defaults, so that what they name can be looked at too.
    """

    def __init__(self, problems: list[UserError], config: Any = None):
        if len(problems) == 1:
            super().__init__(problems[0].message, field=problems[0].field, remedy=problems[0].remedy)
        else:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            super().__init__(f"{len(problems)} settings need attention:\n{lines}")
        self.problems = problems
        self.config = config


class UnreadableError(ConfigError):
    """Text of settings that is not valid YAML or TOML. values: the entries of it that are."""

    def __init__(self, problems: list[UserError], values: dict[str, Any]):
        super().__init__(problems)
        self.values = values


@dataclass(frozen=True)
class Problem:
    """Something a person should read: why a job failed, or what went less well. As in ``UserError``."""

    message: str
    field: str | None = None
    remedy: str | None = None

    @classmethod
    def of(cls, error: UserError) -> Problem:
        return cls(error.message, error.field, error.remedy)

    def to_dict(self) -> dict[str, str | None]:
        return {"message": self.message, "field": self.field, "remedy": self.remedy}


def problems_of(error: UserError) -> list[Problem]:
    """Each problem of ``error`` by itself, so that the tab can put it beside its field."""
    problems = error.problems if isinstance(error, ConfigError) else [error]
    return [Problem.of(problem) for problem in problems]


_MAX_PARTS, _MAX_DEPTH, _MAX_TEXT, _MAX_NUMBER = 20_000, 20, 1 << 20, 10**40


def unusable(value: Any) -> str | None:
    """Why a value of JSON or YAML cannot be used, whatever it is for; None for one that can.

    Text with halves of characters (lone surrogates) can be written into no file and no answer. Values that are nested
    too deep, have too many parts or are too long take too much time to look at; Python writes no number of thousands
    of digits.
    """
    parts = 0
    pending = [(value, 0)]
    while pending:
        one, depth = pending.pop()
        parts += 1
        if parts > _MAX_PARTS or depth > _MAX_DEPTH:
            return "It has too many parts."
        if isinstance(one, str):
            if len(one) > _MAX_TEXT:
                return f"It is longer than {_MAX_TEXT} characters."
            if has_half_characters(one):
                return "It is not valid Unicode text."
        elif isinstance(one, int) and abs(one) > _MAX_NUMBER:
            return "It is too large a number."
        elif isinstance(one, Mapping):
            pending += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, Sequence):
            pending += [(part, depth + 1) for part in one]
    return None


def has_half_characters(text: str) -> bool:
    """Whether the text holds a lone surrogate, which UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def shown(value: Any, longest: int = 200) -> str:
    """``repr`` for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= longest else text[:longest] + " …"


@contextmanager
def concerning(field: str, instead_of: str | None = None) -> Iterator[None]:
    """A ``UserError`` raised inside is said to concern this setting, unless it names one itself, other than
    ``instead_of``."""
    try:
        yield
    except UserError as error:
        if error.field in (None, "", instead_of):
            error.field = field
        raise


class RankFailedError(Exception):
    """One of the processes of a run has failed, and the others end as well; ``str`` says which one, where and why.

    code: the exit code of all of them.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code
