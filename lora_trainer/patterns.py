"""Regular expressions that a person typed: whatever the expression, it searches for two seconds at most."""

from __future__ import annotations

import time
from typing import Any

from lora_trainer.errors import UserError

SECONDS = 2.0
"""How long one expression may search, in all texts together."""


class Pattern:
    """An expression with the syntax and the meaning of Python's ``re``.

    Raises UserError, naming ``field``, for what is no expression, and for one that still searches after ``SECONDS``.
    Other threads go on meanwhile.
    """

    def __init__(self, expression: str, *, ignore_case: bool = False, field: str | None = None):
        import regex  # comes with transformers; a searching re cannot be stopped

        self.expression, self.field = expression, field
        self._left = SECONDS
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

    def sub(self, replacement: str, text: str) -> str:
        """Raises UserError also for a replacement that cannot be used."""
        try:
            return self._limited(self._compiled.sub, replacement, text)
        except (self._error, IndexError, KeyError) as error:
            raise UserError(f"The replacement cannot be used: {error}.", field="value") from error

    def _limited(self, search: Any, *texts: str) -> Any:
        begun = time.monotonic()
        try:
            if self._left <= 0:
                raise TimeoutError
            return search(*texts, timeout=self._left, concurrent=True)
        except TimeoutError:
            raise UserError(
                f"The pattern {self.expression[:80]!r} searches for too long.", field=self.field,
                remedy="Write it simpler: each .* more makes it slower.",
            ) from None  # fmt: skip
        finally:
            self._left -= time.monotonic() - begun
