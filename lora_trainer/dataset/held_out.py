"""Pictures that are kept out of the training, on which a run measures what it has learned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lora_trainer.dataset.samples import Dataset, Sample
from lora_trainer.errors import UserError

FEWEST = 2
"""So many pictures are held out at least: one alone would say more about itself than about the training."""


@dataclass(frozen=True)
class Split:
    """trained: what the run learns from, regularization pictures included. held_out: never trained. seen: as many of
    the trained pictures, to be measured in the same way. In ``held_out`` and ``seen`` each picture is there once."""

    trained: Dataset
    held_out: Dataset
    seen: Dataset


def hold_out(dataset: Dataset, share: float, seed: int) -> Split:
    """Split by content: copies of one picture stay together. Which pictures are held out depends on ``seed`` and on
    their bytes alone, so that a further picture changes the choice little.

    share: of the pictures, above 0 and below 1; at least ``FEWEST`` are held out, at most half of them.

    Raises:
        UserError: there are too few different pictures.
    """
    training = [sample for sample in dataset.samples if not sample.is_regularization]
    contents = sorted({sample.digest for sample in training}, key=lambda digest: _mark(seed, digest))
    out, measured = map(set, first_shares(contents, share, "pictures"))
    kept = tuple(one for one in dataset.samples if one.is_regularization or one.digest not in out)
    return Split(
        trained=replace(dataset, samples=kept),
        held_out=_once(dataset, (one for one in training if one.digest in out)),
        seen=_once(dataset, (one for one in training if one.digest in measured)),
    )


def first_shares(marks: Sequence[str], share: float, what: str) -> tuple[Sequence[str], Sequence[str]]:
    """The first marks, which are held out, and as many after them, which are measured as trained ones.

    what: "pictures" or "rows", which the marks stand for.

    Raises:
        UserError: there are too few.
    """
    if len(marks) < 2 * FEWEST:
        message = f"{len(marks)} different pictures are too few to hold some of them out."
        remedy = f"Add pictures, at least {2 * FEWEST} in all, or set validation_share: 0."
        if what == "rows":
            message = f"{len(marks)} rows with different prompts are too few to hold some of them out."
            remedy = f"Add rows, at least {2 * FEWEST} in all, or set validation_share: 0."
        raise UserError(message, field="validation_share", remedy=remedy)
    count = min(max(FEWEST, round(share * len(marks))), len(marks) // 2)
    return marks[:count], marks[count : 2 * count]


def _once(dataset: Dataset, samples: Iterable[Sample]) -> Dataset:
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(sample.digest, replace(sample, repeats=1))
    return replace(dataset, samples=tuple(first.values()), skipped=(), warnings=())


def _mark(seed: int, digest: str) -> str:
    return hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest()
