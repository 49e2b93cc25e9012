"""The difference of two checkpoints as a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_trainer.adapters.algebra import truncated_factors
from lora_trainer.adapters.base import weight_shape
from lora_trainer.adapters.merge import check_output, stored_places
from lora_trainer.errors import UserError
from lora_trainer.loras.layers import Factors, Turn, holds_no_alpha
from lora_trainer.loras.resize import check_size
from lora_trainer.loras.writing import check_precision, write_factors
from lora_trainer.models.checkpoint import FileLender, single_file
from lora_trainer.models.families import get_family, targets_of
from lora_trainer.models.tensors import open_source

TINY = 1e-6
"""Relative to the weight's norm: a smaller difference is rounding of the number format, not training."""


@dataclass(frozen=True)
class Extracted:
    """layers: in the LoRA. equal: layers in which the two checkpoints do not differ. kept: share of the squared
    Frobenius norm of all differences. ranks: lowest and highest."""

    path: Path
    layers: int
    equal: int
    ranks: tuple[int, int]
    kept: float


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    rank: int,
    conv_rank: int = 0,
    share: float | None = None,
    precision: str = "fp16",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    turn: Turn = nullcontext,
) -> Extracted:
    """Write the LoRA that changes ``base`` into ``tuned`` as nearly as its rank allows (Eckart–Young, by layer).

    rank: of the layers of attention, feed-forward and projections. conv_rank: of the others; 0 leaves them out.
    share: of a layer's squared norm that is enough, so that a layer may take a lower rank.
    on_progress: told (layers done, layers in all).
    What a LoRA cannot hold (norms, biases, the VAE) is not compared.

    Raises:
        UserError: a file cannot be read, the two are of different kinds or sizes, do not differ, or ``output`` cannot
            be written.
    """
    check_size(rank, share)
    if conv_rank < 0:
        raise UserError(f"{conv_rank} is no rank.", field="conv_rank", remedy="Use 0 or more.")
    check_precision(precision)
    base, tuned, output = Path(base), Path(tuned), Path(output)
    check_output(output, (base, tuned), overwrite)
    architectures = [FileLender(path).architecture() for path in (base, tuned)]
    if architectures[0].family != architectures[1].family:
        raise UserError(
            f"{base.name} is {architectures[0].family} and {tuned} is {architectures[1].family}.", field="tuned"
        )
    before, after = (single_file(open_source(path)) for path in (base, tuned))
    with turn():
        targets = targets_of(architectures[0])
    places = stored_places(targets)
    found: dict[str, Factors] = {}
    equal, whole, kept = 0, 0.0, 0.0
    for index, target in enumerate(targets):
        on_progress(index, len(targets))
        key, rows = places[target.kohya_name]
        limit = conv_rank if target.group in ("conv", "conv_linear") else rank
        if key not in before or key not in after:
            raise UserError(f"{base if key not in before else tuned} lacks {key}.", remedy="It may be pruned.")
        if not limit:
            continue
        shape = weight_shape(target.module)
        one, other = (tensors[key][rows].float() for tensors in (before, after))
        if one.shape != other.shape:
            raise UserError(
                f"{key} has the shape {tuple(one.shape)} in {base} and {tuple(other.shape)} in {tuned}.",
                field="tuned",
                remedy="Choose two checkpoints of one kind.",
            )
        difference = (other - one).reshape(shape[0], -1)
        if not bool(torch.isfinite(difference).all()):
            raise UserError(f"{key} holds values that are not numbers.", remedy="One of the checkpoints is damaged.")
        energy = float(difference.double().square().sum())
        if energy <= (TINY * float(one.norm())) ** 2:
            equal += 1
            continue
        down, up = truncated_factors(difference, limit, 1.0 if share is None else share)
        found[target.kohya_name] = Factors.of_matrices(down, up, shape)
        whole += energy
        kept += float((down.norm(dim=1).double() * up.norm(dim=0)).square().sum())
    on_progress(len(targets), len(targets))
    if not found:
        raise UserError(f"{base.name} and {tuned} do not differ in any layer of a LoRA.", remedy="Choose another pair.")
    ranks = [factors.rank for factors in found.values()]
    prediction = FileLender(tuned).describe().prediction_type if architectures[1].vae is not None else "epsilon"
    family = get_family(architectures[0].family)
    metadata = {**family.lora_metadata(prediction, architectures[0]), "ss_sd_model_name": base.name}
    write_factors(
        found,
        output,
        without_alpha=holds_no_alpha(targets),
        sources=(base, tuned),
        metadata=metadata,
        comment=f"extracted from {tuned.name} minus {base.name}",
        precision=precision,
        overwrite=overwrite,
    )
    return Extracted(output, len(found), equal, (min(ranks), max(ranks)), kept / whole)
