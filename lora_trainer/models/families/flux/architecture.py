"""What the transformer of a FLUX.1 is made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FluxShape:
    """The transformer. double, single: number of blocks. hidden: of the blocks' MLPs. axes: channels of a head that
    tell the position on each axis. guidance: it reads how strongly it is to be guided (dev), schnell does not.
    """

    double: int
    single: int
    width: int
    heads: int
    hidden: int
    channels: int
    context_dim: int
    pooled_dim: int
    axes: tuple[int, ...]
    guidance: bool

    @property
    def head_dim(self) -> int:
        return self.width // self.heads
