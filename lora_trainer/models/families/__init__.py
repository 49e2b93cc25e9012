"""Model families: one module each, found in one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_trainer import plugins
from lora_trainer.errors import UserError
from lora_trainer.models.base import LoraTarget
from lora_trainer.models.families.chroma.family import ChromaFamily
from lora_trainer.models.families.flux.family import FluxFamily
from lora_trainer.models.families.sd import SD1, SD2
from lora_trainer.models.families.sd3.family import Sd3Family
from lora_trainer.models.families.sdxl import SDXL
from lora_trainer.models.family import Family, MetaModel, Shapes

_ALL = (SD1(), SD2(), SDXL(), FluxFamily(), Sd3Family(), ChromaFamily())
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
"""By name, in the order in which they are asked whether a file is theirs."""


def families() -> dict[str, Family]:
    """Every family by name, plug-ins first."""
    return {name: plugins.get("family", name) for name in plugins.names("family")} | FAMILIES


def get_family(name: str) -> Family:
    """Raises KeyError when there is none of this name."""
    return FAMILIES.get(name) or families()[name]


def find_family(name: str | None) -> Family | None:
    """None when there is none of this name."""
    return families().get(name or "")


def claiming(shapes: Shapes) -> Family | None:
    """The family that tensors of these names and shapes belong to."""
    return next((family for family in families().values() if family.claims(shapes)), None)


def choose() -> str:
    """The remedy for a file of no family."""
    *titles, last = (family.title for family in families().values())
    return f"Choose a checkpoint (.safetensors) of {', '.join(titles)} or {last}."


def meta_model(architecture: Any) -> MetaModel:
    """The model without weights. To be called in a turn of the lender's, as everything that builds modules."""
    return get_family(architecture.family).meta_model(architecture)


def targets_of(architecture: Any) -> list[LoraTarget]:
    """The layers of a model that is not there: their names and shapes, without weights."""
    return list(meta_model(architecture).targets)


def family_of_lora(metadata: Mapping[str, str]) -> str | None:
    """The family by a LoRA's ``ss_base_model_version``; None if it does not say, "other" for none of ours."""
    version = metadata.get("ss_base_model_version", "")
    if not version:
        return None
    found = (family.name for family in families().values() if version.startswith(family.lora_versions or "\0"))
    return next(found, "other")


def refuse_other_family(metadata: Mapping[str, str], lora: str | Path, family: str) -> None:
    """Raises UserError when a LoRA says that it was made for another family than that of the base."""
    made_for = family_of_lora(metadata)
    if made_for not in (None, family):
        raise UserError(
            f"{Path(lora).name} was made for {made_for}, the base is {family}.", remedy="Choose a LoRA for it."
        )
