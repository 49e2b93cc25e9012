"""What a FLUX.1 is made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from lora_trainer.models.families.flow.architecture import T5Shape
from lora_trainer.models.families.unet.architecture import TextShape, VAEShape


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


@dataclass(frozen=True)
class FluxArchitecture:
    """A whole model; a part that the tensors lack is None and must come from another file."""

    family: str
    transformer: FluxShape
    vae: VAEShape | None
    clip: TextShape | None
    t5: T5Shape | None

    @property
    def own_vae(self) -> VAEShape:
        """The VAE of a model that has one, as every model that can be built (``Family.check_complete``)."""
        assert self.vae is not None
        return self.vae
