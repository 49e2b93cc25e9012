"""Rows that are kept out of the training, on which a run measures what it has learned."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from lora_trainer.dataset.held_out import first_shares
from lora_trainer.dataset.text.encoding import EncodedRow


@dataclass(frozen=True)
class RowSplit:
    """trained: what the run learns from. held_out: never trained. seen: as many of the trained rows, to be measured in
    the same way. In ``held_out`` and ``seen`` each row is there once."""

    trained: tuple[EncodedRow, ...]
    held_out: tuple[EncodedRow, ...]
    seen: tuple[EncodedRow, ...]


def hold_out_rows(rows: Sequence[EncodedRow], share: float, seed: int) -> RowSplit:
    """Split by prompt: rows that ask the same stay together. Which are held out depends on ``seed`` and on the prompts
    alone, so that a further row changes the choice little.

    share: of the prompts, above 0 and below 1; at least ``FEWEST`` are held out, at most half of them.

    Raises:
        UserError: there are too few different prompts.
    """
    by_prompt: dict[str, list[EncodedRow]] = {}
    for row in rows:
        prompt = [token for token, learned in zip(row.tokens, row.learned) if not learned]
        by_prompt.setdefault(hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest(), []).append(row)
    marks = sorted(by_prompt)
    out, measured = first_shares(marks, share, "rows")
    held = set(out)
    return RowSplit(
        trained=tuple(row for mark, alike in by_prompt.items() if mark not in held for row in alike),
        held_out=tuple(by_prompt[mark][0] for mark in out),
        seen=tuple(by_prompt[mark][0] for mark in measured),
    )
