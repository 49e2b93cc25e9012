"""Which family a model belongs to, by the names and shapes of its tensors; or what it is that cannot be trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError
from lora_trainer.models.families import choose, claiming, families
from lora_trainer.models.family import Shapes
from lora_trainer.models.hints import Hints
from lora_trainer.models.other_files import other_file, part_of_model


def detect(
    shapes: Shapes,
    *,
    dtypes: Mapping[str, str] | None = None,
    source: str | Path = "the model",
    hints: Hints | None = None,
) -> Any:
    """The architecture of the model whose tensors have these (single-file) names and shapes.

    dtypes: the safetensors names of the number formats, where known; quantized files are recognized by them.
    source: what to call the file in messages.

    Raises:
        UserError: it is of no family that can be trained; the message says what it is.
    """
    family = claiming(shapes)
    if family is None:
        raise _refusal(shapes, dtypes or {}, source)
    return family.architecture(shapes, dtypes=dtypes or {}, source=source, hints=hints or Hints())


def _refusal(shapes: Shapes, dtypes: Mapping[str, str], source: str | Path) -> UserError:
    """What the file is, in a sentence."""
    known = other_file(shapes)
    if known is not None:
        what, remedy = known
        return UserError(f"{source} {what}.", field="base_model", remedy=remedy or choose())
    for family in families().values():
        if (refusal := family.refusal(shapes, dtypes, source, choose())) is not None:
            return refusal
    if (part := part_of_model(shapes)) is not None:
        return UserError(f"{source} {part}.", field="base_model", remedy=choose())
    return UserError(f"{source} is not a Stable Diffusion model.", field="base_model", remedy=choose())
