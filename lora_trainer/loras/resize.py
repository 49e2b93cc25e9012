"""Another rank for a finished LoRA."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.adapters.algebra import truncated_product
from lora_trainer.errors import UserError
from lora_trainer.loras.layers import Factors, Turn, open_layers
from lora_trainer.loras.writing import check_precision, precision_of, write_factors


@dataclass(frozen=True)
class Resized:
    """ranks: lowest and highest of the new file. kept: share of the squared Frobenius norm of all changes together.
    unmatched: names in the file that fit no layer and are left out."""

    path: Path
    layers: int
    ranks: tuple[int, int]
    kept: float
    unmatched: tuple[str, ...]


def resize(
    lora: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    share: float | None = None,
    base: str | Path | None = None,
    precision: str | None = None,
    overwrite: bool = False,
    turn: Turn = nullcontext,
) -> Resized:
    """Write the best approximation of a LoRA (Eckart–Young, by layer) of a rank, or that keeps a share of its change.

    rank: of every layer; a layer of a lower one keeps its own. share: of each layer's squared Frobenius norm, above 0
        and at most 1; with both, the smaller rank counts.
    base: its base model, needed where it is not a usual one. precision: fp16, bf16 or fp32; by default the file's.

    Raises:
        UserError: a wrong value, or as ``open_layers``, ``Layers.factors`` and ``write_factors``.
    """
    check_size(rank, share)
    check_precision(precision)
    layers = open_layers(lora, base, turn)
    small, before, after = {}, 0.0, 0.0
    for name, factors in layers.factors().items():
        small[name] = truncated(factors, rank, share)
        before += factors.squared_norm()
        after += small[name].squared_norm()
    if before == 0:
        raise UserError(f"{Path(lora).name} changes nothing: all its layers are zero.", remedy="Choose another LoRA.")
    ranks = [factors.rank for factors in small.values()]
    wanted = [f"rank {rank}"] if rank is not None else []
    wanted += [f"{share:.6g} of each layer's change"] if share is not None else []
    write_factors(
        small,
        Path(output),
        without_alpha=layers.without_alpha,
        sources=(layers.file.path,),
        metadata=layers.file.metadata,
        comment=f"resized to {' and '.join(wanted)}",
        precision=precision or precision_of(layers.file),
        overwrite=overwrite,
    )
    return Resized(Path(output), len(small), (min(ranks), max(ranks)), after / before, tuple(layers.unmatched))


def check_size(rank: int | None, share: float | None) -> None:
    """Raises UserError unless at least one is given, and each is possible."""
    if rank is None and share is None:
        raise UserError("Neither a rank nor a share is given.", field="rank", remedy="Give one, such as 8 or 0.95.")
    if rank is not None and rank < 1:
        raise UserError(f"{rank} is no rank.", field="rank", remedy="Use 1 or more.")
    if share is not None and not 0 < share <= 1:
        raise UserError(
            f"{share} is no share.", field="share", remedy="Use a number above 0 and up to 1, such as 0.95."
        )


def truncated(factors: Factors, rank: int | None, share: float | None) -> Factors:
    """The best approximation of ``factors`` of this rank, or with this share of the change; at least rank 1."""
    shape = (factors.up.shape[0], *factors.down.shape[1:])
    down, up = factors.down.flatten(1).double(), factors.up.flatten(1).double()
    limit = factors.rank if rank is None else rank
    small_down, small_up = truncated_product(down, up, limit, 1.0 if share is None else share)
    if not len(small_down):  # a change of zero: a file cannot hold a layer without ranks
        small_down, small_up = down[:1], up[:, :1]
    return Factors.of_matrices(small_down.float(), small_up.float(), shape)
