"""A lender's tensors, bound to modules that compute: the ``LentModel`` of FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_trainer.devices import to_device
from lora_trainer.models.base import Conditioning, FlowSchedule, LoraTarget, ModelInfo
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.families.flow.names import TRANSFORMER
from lora_trainer.models.families.flow.network import directly
from lora_trainer.models.families.flow.t5 import T5Encoder
from lora_trainer.models.families.flow.tokenizer import FlowTokenizer
from lora_trainer.models.families.flux.architecture import FluxArchitecture
from lora_trainer.models.families.flux.network import Flux, patches, unpatched
from lora_trainer.models.families.parts import PartedModel, checkpoint, needs
from lora_trainer.models.families.unet.binding import Binding, build_text_encoder, build_vae, parameters_of
from lora_trainer.models.prompts import CHUNK, Chunk, chunks_of, parse_weights, token_ids

if TYPE_CHECKING:
    from lora_trainer.models.families.flux.family import FluxFamily

TRAINING_GUIDANCE = 1.0
"""What a model with distilled guidance is told in training: at 1 it predicts what was never guided (ai-toolkit, kohya's
guide)."""
GUIDANCE = "guidance"
"""In ``Conditioning.extra``: another guidance, (B,)."""


class FluxModel(PartedModel):
    """See ``LentModel``. ``unet`` is the transformer; the text encoders are CLIP-L and T5."""

    def __init__(
        self,
        family: FluxFamily,
        tensors: Mapping[str, Tensor],
        architecture: FluxArchitecture,
        tokenizer: FlowTokenizer,
        info: ModelInfo,
        device: torch.device,
        compute_dtype: torch.dtype,
        schedule: FlowSchedule,
        reload: bool = False,
    ):
        assert architecture.clip is not None and architecture.t5 is not None, "see check_complete"
        self.family, self.schedule, self._tokenizer = family, schedule, tokenizer
        with torch.device("meta"):
            transformer, t5 = Flux(architecture.transformer), T5Encoder(architecture.t5)
        clip, clip_bindings = build_text_encoder(architecture.clip)
        cast_layers(transformer, compute_dtype)
        cast_layers(clip, compute_dtype)
        # T5's activations leave the range of fp16.
        self._t5_dtype = torch.float32 if compute_dtype == torch.float16 else compute_dtype
        cast_layers(t5, self._t5_dtype)
        super().__init__(
            tensors,
            architecture,
            info,
            device,
            compute_dtype,
            unet=(transformer, _bindings(transformer, TRANSFORMER)),
            vae=build_vae(architecture.own_vae),
            text_encoders=[(clip, clip_bindings), (t5, _bindings(t5, architecture.t5.prefix))],
            text_salt=f"t5 {tokenizer.length}",
            reload=reload,
        )

    # Captions -----------------------------------------------------------------------------------------------------

    @needs("text_encoders")
    def encode_prompts(
        self, captions: Sequence[str], max_tokens: int = 225, weighted: bool = False, rows: slice = slice(None)
    ) -> Conditioning:
        """Captions -> T5's encoding (B, 256, D) and CLIP's pooled one (B, P), without a mask, as WebUIs prompt.

        T5 reads ``max_tokens`` tokens of a caption, CLIP its first 75. Emphasis is left out.
        """
        clip, t5 = self._needed(self.text_encoders, "text_encoders")
        texts = ["".join(text for text, _ in parse_weights(one)) if weighted else one for one in captions[rows]]
        ids = to_device(self._tokenizer.t5_ids(texts, max_tokens), self.device)
        with torch.no_grad():
            context = t5(ids).to(self.compute_dtype)
        chunks: list[Chunk] = [chunks_of(text, self._tokenizer.clip, CHUNK)[0] for text in texts]
        end = self._tokenizer.clip.eos
        ids = to_device(token_ids(chunks, self._tokenizer.clip, end), self.device)
        last = clip(input_ids=ids, output_hidden_states=True).last_hidden_state  # after the final LayerNorm
        ends = (ids == end).int().argmax(dim=1)
        return Conditioning(context, last[torch.arange(len(texts), device=self.device), ends])

    def count_tokens(self, caption: str) -> int:
        """Tokens of the caption by T5, without the end token."""
        return self._tokenizer.count(caption)

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

    def lora_targets(self) -> list[LoraTarget]:
        """Every layer that an adapter can attach to: the transformer's, then CLIP-L's, if that was not released."""
        return self.family.targets(self.unet, self.text_encoders[:1], self.architecture)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Compute each block of the transformer anew in the backward pass instead of keeping what is inside."""
        self.unet.run = checkpoint if enabled else directly


def _bindings(module: nn.Module, prefix: str) -> list[Binding]:
    return [Binding(owner, name, shape, prefix + path) for owner, name, path, shape in parameters_of(module)]
