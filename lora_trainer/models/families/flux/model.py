"""A lender's tensors, bound to modules that compute: the ``LentModel`` of FLUX.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_trainer.devices import to_device
from lora_trainer.models.base import Conditioning
from lora_trainer.models.families.flow.model import FlowModel, ends_of, plain
from lora_trainer.models.families.flow.tokenizer import LENGTH
from lora_trainer.models.families.flux.network import patches, unpatched
from lora_trainer.models.families.parts import needs
from lora_trainer.models.prompts import CHUNK, Chunk, chunks_of, token_ids

TRAINING_GUIDANCE = 1.0
"""What a model with distilled guidance is told in training: at 1 it predicts what was never guided (ai-toolkit, kohya's
guide)."""
GUIDANCE = "guidance"
"""In ``Conditioning.extra``: another guidance, (B,)."""


class FluxModel(FlowModel):
    """See ``LentModel``. The text encoders are CLIP-L and T5."""

    # Captions -----------------------------------------------------------------------------------------------------

    @needs("text_encoders")
    def encode_prompts(
        self, captions: Sequence[str], max_tokens: int = 225, weighted: bool = False, rows: slice = slice(None)
    ) -> Conditioning:
        """Captions -> T5's encoding (B, 256, D) and CLIP's pooled one (B, P), without a mask, as WebUIs prompt.

        T5 reads ``max_tokens`` tokens of a caption, CLIP its first 75. Emphasis is left out.
        """
        clip, t5 = self._needed(self.text_encoders, "text_encoders")
        texts = plain(captions[rows], weighted)
        ids = to_device(self._tokenizer.t5_ids(texts, max_tokens, LENGTH), self.device)
        with torch.no_grad():
            context = t5(ids).to(self.compute_dtype)
        chunks: list[Chunk] = [chunks_of(text, self._tokenizer.clip, CHUNK)[0] for text in texts]
        end = self._tokenizer.clip.eos
        ids = to_device(token_ids(chunks, self._tokenizer.clip, end), self.device)
        last = clip(input_ids=ids, output_hidden_states=True).last_hidden_state  # after the final LayerNorm
        return Conditioning(context, last[ends_of(ids, end)])

    # The transformer ----------------------------------------------------------------------------------------------

    @needs("unet")
    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, time_ids: Tensor | None
    ) -> Tensor:
        """ε - x0, (B, 16, h, w) in fp32. timesteps: σ in [0, 1], (B,)."""
        conditioning = conditioning.to(self.device, self.compute_dtype)
        sigmas = timesteps.to(self.device, torch.float32)
        guidance = conditioning.extra.get(GUIDANCE)
        if guidance is None:
            guidance = torch.full_like(sigmas, TRAINING_GUIDANCE)
        if conditioning.pooled is None:
            raise ValueError("FLUX.1 reads CLIP's pooled encoding of the captions")
        size = noisy_latents.shape[-2] // 2, noisy_latents.shape[-1] // 2
        tokens = patches(noisy_latents.to(self.device, self.compute_dtype))
        velocity = self.unet(tokens, conditioning.context, conditioning.pooled, sigmas, guidance, size)
        return unpatched(velocity, size).float()
