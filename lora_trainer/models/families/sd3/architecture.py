"""What the transformer of a Stable Diffusion 3 is made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sd3Shape:
    """blocks: of image and text in one attention. dual: how many of the first of them also have an attention of the
    image alone (3.5 medium). hidden: of the blocks' MLPs. positions: side of the table of positions, in patches.
    normalized: q and k are (3.5).
    """

    blocks: int
    dual: int
    width: int
    heads: int
    hidden: int
    channels: int
    context_dim: int
    pooled_dim: int
    positions: int
    normalized: bool

    @property
    def head_dim(self) -> int:
        return self.width // self.heads
