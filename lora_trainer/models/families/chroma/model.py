"""The ``LentModel`` of Chroma."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_trainer.devices import to_device
from lora_trainer.models.base import Conditioning
from lora_trainer.models.families.flow.model import FlowModel, plain
from lora_trainer.models.families.flux.network import patches, unpatched
from lora_trainer.models.families.parts import needs

LENGTHS = "lengths"
"""In ``Conditioning.extra``: how many tokens of each caption count, (B,) int64; not there where all do."""


class ChromaModel(FlowModel):
    """See ``LentModel``. The text encoder is T5."""

    # Captions -----------------------------------------------------------------------------------------------------

    def _text_salt(self) -> str:
        return "t5 unpadded"

    @needs("text_encoders")
    @torch.no_grad()
    def encode_prompts(
        self, captions: Sequence[str], max_tokens: int = 225, weighted: bool = False, rows: slice = slice(None)
    ) -> Conditioning:
        """Captions -> T5's encoding of each by itself (B, L, D), without padding, as WebUIs prompt; shorter ones are
        filled up with zeros that do not count. Emphasis is left out."""
        (t5,) = self._needed(self.text_encoders, "text_encoders")
        tokens = [self._tokenizer.t5_tokens(text, max_tokens) for text in plain(captions, weighted)]
        encoded = [t5(to_device(torch.tensor([row]), self.device)).to(self.compute_dtype) for row in tokens[rows]]
        return filled_up([Conditioning(one) for one in encoded], max(map(len, tokens)))

    # The transformer ----------------------------------------------------------------------------------------------

    @needs("unet")
    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, time_ids: Tensor | None
    ) -> Tensor:
        """ε - x0, (B, 16, h, w) in fp32. timesteps: σ in [0, 1], (B,)."""
        conditioning = conditioning.to(self.device, self.compute_dtype)
        size = noisy_latents.shape[-2] // 2, noisy_latents.shape[-1] // 2
        tokens = patches(noisy_latents.to(self.device, self.compute_dtype))
        sigmas, lengths = timesteps.to(self.device, torch.float32), conditioning.extra.get(LENGTHS)
        return unpatched(self.unet(tokens, conditioning.context, sigmas, size, lengths), size).float()


def filled_up(items: Sequence[Conditioning], longest: int) -> Conditioning:
    """One batch of captions, each B = 1, filled up to ``longest`` tokens."""
    contexts = [one.context for one in items]
    counts = [int(one.extra[LENGTHS]) if LENGTHS in one.extra else one.context.shape[1] for one in items]
    filled = [torch.cat([c, c.new_zeros(1, longest - c.shape[1], c.shape[2])], dim=1) for c in contexts]
    lengths = torch.tensor(counts, device=contexts[0].device)
    return Conditioning(torch.cat(filled), None, {LENGTHS: lengths} if min(counts) < longest else {})
