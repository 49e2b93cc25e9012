"""What the families whose transformer has FLUX.1's blocks share: FLUX.1 and Chroma."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lora_trainer.config.schema import TrainConfig
from lora_trainer.models.families.flow.architecture import FlowArchitecture
from lora_trainer.models.families.flow.family import FlowFamily
from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.families.flux.work import parts, trial
from lora_trainer.models.family import LatentFormat, Trial
from lora_trainer.models.work import Part


class FluxLayoutFamily(FlowFamily):
    card_version = "Flux"  # Forge shows the cards of FLUX.1's LoRAs for all of them
    latents = LatentFormat(channels=16, factor=8, multiple=16, scale=0.3611, shift=0.1159)
    roomy_bytes, tight_bytes = 60 << 30, 10 << 30
    vae_file = "ae.safetensors"

    # Files --------------------------------------------------------------------------------------------------------

    def input_channels(self, transformer: FluxShape) -> int:
        return transformer.channels // 4

    # Forecast: the modulation that Chroma has beside its blocks is small work ---------------------------------------

    def parts(self, architecture: FlowArchitecture, resolution: tuple[int, int], config: TrainConfig) -> Iterator[Part]:
        return parts(architecture, self.latents, resolution, config)

    def trial(
        self, architecture: FlowArchitecture, resolution: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Trial:
        return trial(architecture.transformer, self.latents, resolution, device, dtype)
