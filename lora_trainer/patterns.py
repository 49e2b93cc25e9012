"""Regular expressions that a person typed: whatever the expression, it searches for two seconds at most, and writes no
more than a caption may hold."""

from __future__ import annotations

import time
from typing import Any

from lora_trainer.errors import UserError

SECONDS = 2.0
"""How long the expressions of one budget may search, in all texts together."""


class Budget:
    """Seconds that are left for searching; several expressions may share them."""

    def __init__(self, seconds: float | None = None):
        self.left = SECONDS if seconds is None else seconds


class Pattern:
    """An expression with the syntax and the meaning of Python's ``re``.

    Raises UserError, naming ``field``, for what is no expression, and for one that still searches when its budget is
    spent. Other threads go on meanwhile.
    """

    def __init__(
        self, expression: str, *, ignore_case: bool = False, field: str | None = None, budget: Budget | None = None
    ):
        import regex  # comes with transformers; a searching re cannot be stopped

        self.expression, self.field = expression, field
        self._budget = budget or Budget()
        try:
            self._compiled = regex.compile(expression, regex.IGNORECASE if ignore_case else 0)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise UserError(
                f"The pattern is no regular expression: {error}.", field=field,
                remedy=r"Write \( for a bracket that is meant as a bracket.",
            ) from error  # fmt: skip
        self._error = regex.error

    def search(self, text: str) -> bool:
        return self._limited(self._compiled.search, text) is not None

    def sub(self, replacement: str, text: str, longest: int = 1 << 20) -> str:
        """Raises UserError also for a replacement that cannot be used, and for a result of more than ``longest``
        characters."""
        size = 0

        def expand(match: Any) -> str:
            nonlocal size
            piece = match.expand(replacement)
            size += len(piece)
            if size > longest:
                raise UserError("A caption would become too long.", field="value", remedy="Look at the replacement.")
            return piece

        try:
            return self._limited(self._compiled.sub, expand, text)
        except (self._error, IndexError, KeyError) as error:
            raise UserError(f"The replacement cannot be used: {error}.", field="value") from error

    def _limited(self, search: Any, *arguments: Any) -> Any:
        begun = time.monotonic()
        try:
            if self._budget.left <= 0:
                raise TimeoutError
            return search(*arguments, timeout=self._budget.left, concurrent=True)
        except (TimeoutError, MemoryError, RecursionError):
            raise UserError(
                f"The pattern {self.expression[:80]!r} searches for too long.", field=self.field,
                remedy="Write it simpler: each .* more makes it slower.",
            ) from None  # fmt: skip
        finally:
            self._budget.left -= time.monotonic() - begun
