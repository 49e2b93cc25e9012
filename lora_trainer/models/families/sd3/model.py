"""The ``LentModel`` of Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_trainer.devices import to_device
from lora_trainer.models.base import Conditioning
from lora_trainer.models.families.flow.model import FlowModel, ends_of, plain
from lora_trainer.models.families.parts import needs
from lora_trainer.models.prompts import Chunk, chunks_of, token_ids
from lora_trainer.storage import dense_weight

T5_CONTEXT = "t5"
"""In ``Conditioning.extra``: T5's encoding, (B, L, D); not there where no T5 reads."""
SAYS = "says"
"""In ``Conditioning.extra``: (B,), 0 for captions that the transformer reads as zeros, else 1; where there are such."""
T5_LENGTH = 256
"""Tokens of T5 that WebUIs fill up to, or put zeros for."""


class Sd3Model(FlowModel):
    """See ``LentModel``. The text encoders are CLIP-L, CLIP-G and, where it is there, T5."""

    # Captions -----------------------------------------------------------------------------------------------------

    def _text_salt(self) -> str:
        tokenizer = self._tokenizer
        return f"{super()._text_salt()} hidden {tokenizer.hidden} says {tokenizer.zero_empty}"

    @needs("text_encoders")
    @torch.no_grad()
    def encode_prompts(
        self, captions: Sequence[str], max_tokens: int = 225, weighted: bool = False, rows: slice = slice(None)
    ) -> Conditioning:
        """Captions -> what both CLIPs make of them side by side (B, 77·chunks, D), pooled (B, P), and T5's encoding.

        As many chunks of 75 tokens as the longest needs, at most ``max_tokens``/75; shorter captions are filled up with
        encoded empty chunks. Emphasis is left out. An empty caption, too, is encoded: ``predict`` takes zeros for it
        where the tokenizer says so, and nothing else can fill up the others of its batch.
        """
        clips = self._needed(self.text_encoders, "text_encoders")[:2]
        tokenizer, end = self._tokenizer.clip, self._tokenizer.clip.eos
        texts = plain(captions, weighted)
        cut = [chunks_of(text, tokenizer, max_tokens) for text in texts]
        count = max(map(len, cut))
        texts, cut = texts[rows], cut[rows]
        chunks = [chunk for row in cut for chunk in [*row, *[Chunk()] * (count - len(row))]]  # B·count
        contexts, pooled = [], []
        for clip, shape in zip(clips, self.architecture.clips):
            ids = to_device(token_ids(chunks, tokenizer, 0 if shape.pad == "zero" else end), self.device)
            output = clip(input_ids=ids, output_hidden_states=True)
            hidden = output.hidden_states[self._tokenizer.hidden]  # without the final LayerNorm
            contexts.append(hidden.reshape(len(cut), -1, hidden.shape[-1]))
            first = output.last_hidden_state[::count][ends_of(ids[::count], end)]  # after the final LayerNorm
            if shape.projection is not None:
                first = F.linear(first, dense_weight(clip.text_projection.weight, self.compute_dtype))
            pooled.append(first)
        extra = {}
        if len(self.text_encoders) > len(clips):
            length = self._tokenizer.length or contexts[0].shape[1]
            ids = to_device(self._tokenizer.t5_ids(texts, max_tokens, length), self.device)
            extra[T5_CONTEXT] = self.text_encoders[-1](ids).to(self.compute_dtype)
        if self._tokenizer.zero_empty:
            extra[SAYS] = torch.tensor([float(text != "") for text in texts], device=self.device)
        return Conditioning(torch.cat(contexts, dim=-1), torch.cat(pooled, dim=-1), extra)

    def count_tokens(self, caption: str) -> int:
        """Tokens of the caption by CLIP, without start and end token."""
        return len(self._tokenizer.clip.ids(caption))

    # The transformer ----------------------------------------------------------------------------------------------

    @needs("unet")
    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, time_ids: Tensor | None
    ) -> Tensor:
        """ε - x0, (B, 16, h, w) in fp32. timesteps: σ in [0, 1], (B,)."""
        conditioning = conditioning.to(self.device, self.compute_dtype)
        if conditioning.pooled is None:
            raise ValueError("Stable Diffusion 3 reads the CLIPs' pooled encoding of the captions")
        clip, t5 = conditioning.context, conditioning.extra.get(T5_CONTEXT)
        width = self.architecture.transformer.context_dim
        if t5 is None:
            t5 = clip.new_zeros(len(clip), self._tokenizer.length or clip.shape[1], width)
        context = torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5.to(clip.dtype)], dim=1)
        pooled = conditioning.pooled
        if (says := conditioning.extra.get(SAYS)) is not None:
            says = says.to(context.dtype)[:, None]
            context, pooled = context * says[..., None], pooled * says
        latents = noisy_latents.to(self.device, self.compute_dtype)
        return self.unet(latents, context, pooled, timesteps.to(self.device, torch.float32)).float()
