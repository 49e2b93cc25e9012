"""Which family a model belongs to, by the names and shapes of its tensors; or what it is that cannot be trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError
from lora_trainer.models.families import choose, claiming, families, find_family
from lora_trainer.models.family import Shapes
from lora_trainer.models.hints import Hints
from lora_trainer.models.other_files import GGUF_FAMILIES, USE_FP16, other_family, other_file, part_of_model, storage


def detect(
    shapes: Shapes,
    *,
    dtypes: Mapping[str, str] | None = None,
    source: str | Path = "the model",
    hints: Hints | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Any:
    """The architecture of the model whose tensors have these (single-file) names and shapes.

    dtypes: the safetensors names of the number formats, where known; quantized files are recognized by them.
    source: what to call the file in messages. metadata: what the file says of itself.

    Raises:
        UserError: it is of no family that can be trained; the message says what it is.
    """
    family = claiming(shapes)
    if family is None:
        raise _refusal(shapes, dtypes or {}, source, metadata or {})
    return family.architecture(shapes, dtypes=dtypes or {}, source=source, hints=hints or Hints())


def _refusal(shapes: Shapes, dtypes: Mapping[str, str], source: str | Path, metadata: Mapping[str, str]) -> UserError:
    """What the file is, in a sentence: the family first, then how its weights are stored."""
    known = other_file(shapes)
    if known is not None:
        what, remedy = known
        return UserError(what.format(source), field="base_model", remedy=remedy or choose())
    form = storage(shapes, dtypes)
    if (other := other_family(shapes)) is not None:
        return UserError(_not_trained(source, other, form), field="base_model", remedy=choose())
    for family in families().values():
        if (refusal := family.refusal(shapes, dtypes, source, choose())) is not None:
            return refusal
    name = metadata.get("general.architecture", "")
    trained = find_family(name)
    if (named := trained.title if trained else GGUF_FAMILIES.get(name)) is not None:
        remedy = USE_FP16 if trained else choose()
        return UserError(_not_trained(source, named, form), field="base_model", remedy=remedy)
    if (part := part_of_model(shapes)) is not None:
        message = part.format(source)
        return UserError(f"{message} It is {form}." if form else message, field="base_model", remedy=choose())
    return UserError(f"{source} is not a Stable Diffusion model.", field="base_model", remedy=choose())


def _not_trained(source: str | Path, family: str, form: str | None) -> str:
    if form:
        return f"{source} is {family}, {form}, which cannot be trained here."
    return f"{source} is {family}, which cannot be trained here."
