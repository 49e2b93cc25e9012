"""What a flow model is made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_trainer.models.families.unet.architecture import TextShape, VAEShape


@dataclass(frozen=True)
class T5Shape:
    """The encoder of a T5 v1.1. inner: channels of all heads. buckets: of relative positions. embedding: what the
    tensors call the table of tokens, which transformers knows by two names."""

    prefix: str
    width: int
    layers: int
    inner: int
    heads: int
    hidden: int
    vocabulary: int
    buckets: int
    embedding: str = "shared"


@dataclass(frozen=True)
class FlowArchitecture:
    """A whole model; a part that the tensors lack is left out and must come from another file.

    transformer: the family's own description of it. clips: those of the family's CLIPs that are there, in its order.
    """

    family: str
    transformer: Any
    vae: VAEShape | None
    clips: tuple[TextShape, ...]
    t5: T5Shape | None

    @property
    def own_vae(self) -> VAEShape:
        """The VAE of a model that has one, as every model that can be built (``Family.check_complete``)."""
        assert self.vae is not None
        return self.vae
