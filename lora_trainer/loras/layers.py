"""The layers of a LoRA file as pairs of factors, under the names of a model's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_trainer.adapters.algebra import low_rank_squared_norm, truncated_factors
from lora_trainer.adapters.base import weight_shape
from lora_trainer.adapters.lora_file import LoraFile, ModuleWeights, read_lora
from lora_trainer.errors import UserError
from lora_trainer.models.base import LoraTarget
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import families, family_of_lora, refuse_other_family, targets_of

GIVE_BASE = "Name its base model."


@dataclass(frozen=True)
class Factors:
    """ΔW = up · down of one layer in fp32, with alpha / rank multiplied into ``up``.

    down (r, in[, kh, kw]), up (out, r[, 1, 1]).
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)

    def squared_norm(self) -> float:
        """‖ΔW‖² (Frobenius)."""
        return float(low_rank_squared_norm(self.down.double(), self.up.double()))

    @classmethod
    def of_matrices(cls, down: Tensor, up: Tensor, shape: Sequence[int]) -> Factors:
        """From down (r, in·kh·kw) and up (out, r). shape: of the layer's weight."""
        rank = len(down)
        return cls(down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *[1] * (len(shape) - 2)))


def holds_no_alpha(targets: Sequence[LoraTarget]) -> frozenset[str]:
    """kohya names of the layers whose LoRA files hold no alpha."""
    return frozenset(target.kohya_name for target in targets if not target.alpha)


@dataclass(frozen=True)
class Layers:
    """A LoRA file and whose layers its modules are.

    targets: all layers of the base. matched: modules by the target's kohya name. unmatched: names in the file that fit
    no layer.
    """

    file: LoraFile
    family: str
    targets: Sequence[LoraTarget]
    matched: dict[str, ModuleWeights]
    unmatched: list[str]

    @property
    def without_alpha(self) -> frozenset[str]:
        """See ``holds_no_alpha``."""
        return holds_no_alpha(self.targets)

    def factors(self) -> dict[str, Factors]:
        """Every layer's change as a product of two factors, exactly, by the target's kohya name.

        A LoHa or LoKr is decomposed; its rank is then as high as its change needs.

        Raises:
            UserError: a DoRA, whose change depends on the base's weights; values that are not numbers; shapes that are
                not those of the base.
        """
        return {
            target.kohya_name: self._factors(self.matched[target.kohya_name], weight_shape(target.module))
            for target in self.targets
            if target.kohya_name in self.matched
        }

    def _factors(self, weights: ModuleWeights, shape: tuple[int, ...]) -> Factors:
        path = self.file.path
        if weights.dora_scale is not None:
            raise UserError(
                f"{path.name} is a DoRA: what it adds depends on the base's weights.",
                remedy="Merge it into its base, then extract a LoRA from the two checkpoints.",
            )
        if not weights.is_finite():
            raise UserError(f"{path.name}: {weights.name} holds values that are not numbers.")
        try:
            return factors_of(weights, shape)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{path.name}: {weights.name} does not fit the layers of a usual {self.family} model ({error}).",
                remedy=GIVE_BASE,
            ) from error


def factors_of(weights: ModuleWeights, shape: Sequence[int]) -> Factors:
    """One module's change without DoRA's magnitudes. shape: of the layer's weight. Raises ValueError where it does not
    fit."""
    if weights.kind != "lora":
        return Factors.of_matrices(*truncated_factors(weights.delta(shape).flatten(1), max(shape)), shape)
    t = {name: tensor.float() for name, tensor in weights.tensors.items()}
    down, up = t["lora_down.weight"], t["lora_up.weight"]
    if (core := t.get("lora_mid.weight")) is not None:  # LoCon with a core: the core becomes part of down
        down = torch.einsum("n m k l, m j -> n j k l", core, down.flatten(1))
    down, up = down.flatten(1), up.flatten(1) * weights.scale
    if (len(up), down.shape[1]) != (shape[0], torch.Size(shape[1:]).numel()):
        raise ValueError(f"({len(up)}, {down.shape[1]}) does not fit {tuple(shape)}")
    return Factors.of_matrices(down, up, shape)


Turn = Callable[[], AbstractContextManager[Any]]
"""Entered where modules are built: a WebUI swaps torch.nn's classes while it loads a model (``Host.device_turn``)."""


def open_layers(path: str | Path, base: str | Path | None = None, turn: Turn = nullcontext) -> Layers:
    """Read a LoRA and find its layers in ``base``, or, without one, in the usual model of its family.

    Raises:
        UserError: the LoRA or the base cannot be read, they are of different families, or no layer is found.
    """
    lora = read_lora(path)
    if base is not None:
        architecture = FileLender(base).architecture()
        refuse_other_family(lora.metadata, path, architecture.family)
        candidates = {architecture.family: architecture}
    else:
        said = family_of_lora(lora.metadata)
        version = lora.metadata.get("ss_base_model_version", "")
        usual = {name: family.usual_for(version, lora.modules) for name, family in families().items()}
        usual = {name: architecture for name, architecture in usual.items() if architecture is not None}
        candidates = {said: usual[said]} if said in usual else usual
    found: list[Layers] = []
    refused: UserError | None = None
    for family, architecture in candidates.items():
        with turn():
            targets = targets_of(architecture)
        try:
            matched, unmatched = lora.match(targets)
        except UserError as error:  # names of another family's layers, in other sizes
            refused = refused or error
            continue
        found.append(Layers(lora, family, targets, matched, unmatched))
    if refused is not None and not any(layers.matched for layers in found):
        raise refused
    best = max(found, key=lambda layers: len(layers.matched))
    if not best.matched:
        of_what = f"{base}" if base is not None else " or ".join(candidates)
        raise UserError(
            f"{Path(path).name} holds no layer of {of_what}.",
            remedy="It is for another kind of model." if base else GIVE_BASE,
        )
    return best
