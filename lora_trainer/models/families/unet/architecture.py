"""What a Stable Diffusion is made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UNetShape:
    """channels, layers, depths, heads: one value per level, from the highest resolution down.

    layers: resnets on the way down. depths: transformer blocks per attention, 0 for a level without attention.
    added_channels: width of the vector of pooled text and sizes (SDXL), else None.
    """

    channels: tuple[int, ...]
    layers: tuple[int, ...]
    depths: tuple[int, ...]
    mid_depth: int
    heads: tuple[int, ...]
    context_dim: int
    linear_projection: bool
    added_channels: int | None = None


@dataclass(frozen=True)
class VAEShape:
    """channels: per level. layers: resnets per level of the encoder.

    latents = (VAE output - shift) · scaling_factor. quant: it has the 1×1 convolutions around the latents.
    """

    channels: tuple[int, ...]
    layers: int
    scaling_factor: float
    shift: float = 0.0
    latent_channels: int = 4
    quant: bool = True


@dataclass(frozen=True)
class TextShape:
    """One text encoder.

    prefix: what its tensors' names start with in the single file. layout: "transformers" or "open_clip".
    layers: how many are run (SD 2 never uses the last one of its file). projection: width of the pooled output, or
    None where there is none. pad: "eos" or "zero", what fills a chunk after its end token.
    """

    prefix: str
    layout: str
    width: int
    layers: int
    hidden: int
    heads: int
    activation: str
    vocabulary: int
    positions: int
    projection: int | None
    pad: str


@dataclass(frozen=True)
class Architecture:
    """A whole model. ``vae`` is None where the tensors have none (a VAE file of its own must then be given)."""

    family: str
    unet: UNetShape
    vae: VAEShape | None
    text_encoders: tuple[TextShape, ...]

    @property
    def own_vae(self) -> VAEShape:
        """The VAE of a model that has one, as every model that can be built (``Family.check_complete``)."""
        assert self.vae is not None
        return self.vae


def clip_l(prefix: str) -> TextShape:
    """OpenAI's CLIP ViT-L/14, the text encoder of SD 1 and the first one of SDXL. prefix: see ``TextShape``."""
    return TextShape(prefix, "transformers", 768, 12, 3072, 12, "quick_gelu", 49408, 77, None, "eos")


def open_clip_text(prefix: str, width: int, layers: int, projection: int | None = None) -> TextShape:
    """A text encoder of open_clip with heads of 64 channels: ViT-H (SD 2) or ViT-bigG (SDXL)."""
    heads = width // 64
    return TextShape(prefix, "open_clip", width, layers, 4 * width, heads, "gelu", 49408, 77, projection, "zero")
