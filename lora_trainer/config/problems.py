"""The errors of several checks, told together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lora_trainer.config.names import ALIASES
from lora_trainer.errors import ConfigError, UserError


class Problems:
    """The errors of several checks, gathered; of one setting only those of the first check that finds any."""

    def __init__(self, found: UserError | None = None):
        self.found: list[UserError] = [] if found is None else _each(found)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A ``UserError`` raised inside is kept, and not raised."""
        try:
            yield
        except UserError as error:
            self.add(_each(error))

    def add(self, problems: Sequence[UserError]) -> None:
        said = {str(problem) for problem in self.found}
        named = {_name(problem) for problem in self.found} - {None}
        self.found += [one for one in problems if _name(one) not in named and str(one) not in said]

    def concern(self, *settings: str) -> bool:
        """Whether one of these settings, by our names, is wrong."""
        return any(_name(problem) in settings for problem in self.found)

    def together(self, first: UserError | None) -> UserError | None:
        """One error of all of them: ``first`` itself, which was raised, where nothing else was found."""
        known = _each(first) if first else []
        return first if len(self.found) == len(known) else ConfigError(self.found)


def _each(error: UserError) -> list[UserError]:
    return list(error.problems) if isinstance(error, ConfigError) else [error]


def _name(problem: UserError) -> str | None:
    return problem.field and ALIASES.get(problem.field, problem.field)
