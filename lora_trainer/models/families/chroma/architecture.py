"""What the transformer of a Chroma is made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from lora_trainer.models.families.flux.architecture import FluxShape


@dataclass(frozen=True)
class ChromaShape(FluxShape):
    """FLUX.1's blocks. maker_inputs, maker_width, maker_layers: of the network that makes their modulations.

    pooled_dim is 0, and guidance False: it reads neither.
    """

    maker_inputs: int
    maker_width: int
    maker_layers: int

    @property
    def modulations(self) -> int:
        """Shifts, scales and gates of all blocks, and shift and scale of the last layer."""
        return 3 * self.single + 12 * self.double + 2
