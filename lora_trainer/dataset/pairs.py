"""Pairs of pictures before and after a change: ``name.png`` and ``name<suffix>.png``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from lora_trainer.dataset.caption_files import some
from lora_trainer.dataset.samples import Dataset, Sample
from lora_trainer.errors import UserError

NO_CAPTION = " "
"""Stands for the caption of pictures that have none, as a pair needs none."""


@dataclass(frozen=True)
class Pairs:
    """before, after: the pictures of each pair at the same place, under the same key and with the same caption."""

    before: Dataset
    after: Dataset
    warnings: tuple[str, ...] = ()


def pairs_of(dataset: Dataset, suffix: str, same_size: bool = True) -> Pairs:
    """The pairs among the pictures of a data set. same_size: both of a pair must have the same size.

    Raises:
        UserError: there is none, or two of a pair differ in size.
    """
    by_stem = {os.path.splitext(one.key)[0]: one for one in dataset.samples if not one.is_regularization}
    before: list[Sample] = []
    after: list[Sample] = []
    for stem, first in by_stem.items():
        second = by_stem.get(stem + suffix) if suffix else None
        if second is None:
            continue
        if same_size and first.size != second.size:
            sizes = " and ".join("×".join(map(str, one.size)) for one in (first, second))
            raise UserError(
                f"{_name(first)} and {_name(second)} have different sizes: {sizes}.",
                field="train_data_dir",
                remedy="Give both pictures of a pair the same size.",
            )
        before.append(first)
        after.append(replace(second, key=first.key, caption=first.caption, repeats=first.repeats))
    if not before:
        raise UserError(
            f"There is no pair of pictures in {dataset.root}.",
            field="train_data_dir",
            remedy=f"Name the second picture of each pair as the first one, with {suffix or 'pair_suffix'} behind it: "
            f"a.png and a{suffix or '_after'}.png.",
        )
    used = {one.path for one in (*before, *after)}
    alone = [_name(one) for one in dataset.samples if one.path not in used]
    warnings = (f"{len(alone)} pictures belong to no pair and are left out: {some(alone)}.",) if alone else ()
    return Pairs(replace(dataset, samples=tuple(before)), replace(dataset, samples=tuple(after)), warnings)


def _name(sample: Sample) -> str:
    return PurePosixPath(sample.key).name
