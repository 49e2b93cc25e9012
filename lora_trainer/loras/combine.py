"""Several LoRAs as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_trainer.errors import UserError
from lora_trainer.loras.layers import Factors, Turn, open_layers
from lora_trainer.loras.resize import check_size, truncated
from lora_trainer.loras.writing import check_precision, precision_of, write_factors


@dataclass(frozen=True)
class Combined:
    """ranks: lowest and highest. unmatched: names in the files that fit no layer and are left out."""

    path: Path
    layers: int
    ranks: tuple[int, int]
    unmatched: tuple[str, ...]


def combine(
    loras: Sequence[tuple[str | Path, float]],
    output: str | Path,
    *,
    rank: int | None = None,
    share: float | None = None,
    base: str | Path | None = None,
    precision: str | None = None,
    overwrite: bool = False,
    turn: Turn = nullcontext,
) -> Combined:
    """Write one LoRA that at strength 1 changes the model as all of ``loras`` do, each at its strength.

    Without ``rank`` and ``share`` the result is exact: the factors are concatenated, and the ranks add up. With them it
    is brought to that size as by ``resize``.

    Raises:
        UserError: fewer than two LoRAs, a strength that is no number, LoRAs of different families, or as ``resize``.
    """
    if len(loras) < 2:
        raise UserError("Fewer than two LoRAs are given.", field="loras", remedy="Name two or more.")
    for path, strength in loras:
        if not math.isfinite(strength) or strength == 0:
            raise UserError(
                f"{Path(path).name}: a strength of {strength} adds nothing.",
                field="loras",
                remedy="Use one such as 0.7.",
            )
    if rank is not None or share is not None:
        check_size(rank, share)
    check_precision(precision)
    opened = [open_layers(path, base, turn) for path, _ in loras]
    families = {layers.family for layers in opened}
    if len(families) > 1:
        raise UserError(
            "The LoRAs are for different kinds of model: "
            + ", ".join(f"{layers.file.path} for {layers.family}" for layers in opened)
            + ".",
            field="loras",
            remedy="Combine those of one kind.",
        )
    parts: dict[str, list[Factors]] = {}
    for layers, (_, strength) in zip(opened, loras):
        for name, factors in layers.factors().items():
            parts.setdefault(name, []).append(Factors(factors.down, factors.up * strength))
    joined = {name: _joined(pieces) for name, pieces in parts.items()}
    if rank is not None or share is not None:
        joined = {name: truncated(factors, rank, share) for name, factors in joined.items()}
    ranks = [factors.rank for factors in joined.values()]
    said = " + ".join(f"{strength:g} × {layers.file.path.stem}" for layers, (_, strength) in zip(opened, loras))
    write_factors(
        joined,
        Path(output),
        without_alpha=opened[0].without_alpha,
        sources=[layers.file.path for layers in opened],
        metadata=_common([layers.file.metadata for layers in opened]),
        comment=f"combined: {said}",
        precision=precision or precision_of(opened[0].file),
        overwrite=overwrite,
    )
    unmatched = tuple(name for layers in opened for name in layers.unmatched)
    return Combined(Path(output), len(joined), (min(ranks), max(ranks)), unmatched)


def _joined(pieces: Sequence[Factors]) -> Factors:
    """The sum of several changes, exactly."""
    return Factors(torch.cat([piece.down for piece in pieces]), torch.cat([piece.up for piece in pieces], dim=1))


def _common(metadata: Sequence[dict[str, str]]) -> dict[str, str]:
    """The entries in which all files agree: the base model, but not the training of one of them."""
    first, *others = metadata
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
