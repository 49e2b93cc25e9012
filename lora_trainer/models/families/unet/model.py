"""A lender's tensors, bound to modules that compute: the ``LentModel`` of SD 1, SD 2 and SDXL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_trainer.devices import to_device
from lora_trainer.models.base import Conditioning, LoraTarget, ModelInfo, NoiseSchedule
from lora_trainer.models.blocks import block_forward, checkpoint
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.families.parts import PARTS, PartedModel, needs
from lora_trainer.models.families.unet.architecture import Architecture
from lora_trainer.models.families.unet.binding import build_text_encoder, build_unet, build_vae, text_body
from lora_trainer.models.families.unet.blocks import recomputable, slim
from lora_trainer.models.families.unet.layout import LayoutTimes, lay_out, layout_times, levels_of
from lora_trainer.models.prompts import Chunk, chunks_of, token_ids, token_weights, weigh
from lora_trainer.models.tokenizer import Tokenizer
from lora_trainer.storage import dense_weight

if TYPE_CHECKING:
    from lora_trainer.models.families.unet.family import UNetFamily


class DiffusionModel(PartedModel):
    """See ``LentModel``. ``architecture`` says how it is built; ``vae`` is None once released.

    reload: the tensors can be read again, so parts may leave the device where its memory does not hold them all.
    """

    def __init__(
        self,
        family: UNetFamily,
        tensors: Mapping[str, Tensor],
        architecture: Architecture,
        tokenizer: Tokenizer,
        info: ModelInfo,
        device: torch.device,
        compute_dtype: torch.dtype,
        clip_skip: int,
        schedule: NoiseSchedule,
        reload: bool = False,
    ):
        self.family = family
        self.schedule = schedule
        self.clip_skip = clip_skip
        self._tokenizer = tokenizer
        self._input_grad_hooks: list = []
        unet = build_unet(architecture.unet)
        encoders = [build_text_encoder(shape) for shape in architecture.text_encoders]
        for module, _ in (unet, *encoders):
            cast_layers(module, compute_dtype)
        slim(unet[0])
        super().__init__(
            tensors,
            architecture,
            info,
            device,
            compute_dtype,
            unet=unet,
            vae=build_vae(architecture.own_vae),
            text_encoders=encoders,
            text_salt=f"clip_skip={clip_skip}",
            reload=reload,
        )

    # Layout in memory ---------------------------------------------------------------------------------------------

    @property
    def has_layouts(self) -> bool:
        return self.residency is not None and self.device.type in ("cpu", "cuda")

    @needs("unet")
    def layout_times(self, size: tuple[int, int], batch_size: int) -> list[LayoutTimes]:
        return layout_times(self.unet, size, batch_size, self.device, self.compute_dtype)

    @needs("unet")
    def use_channels_last(self, levels: Sequence[int]) -> None:
        if self.has_layouts:
            self.channels_last = levels
            self._lay_out()

    def bind(self, tensors: Mapping[str, Tensor], parts: Sequence[str] = PARTS, move: bool = True) -> None:
        super().bind(tensors, parts, move)
        if "unet" in parts:
            self._lay_out()

    def _lay_out(self) -> None:
        levels = levels_of(self.unet)
        lay_out([part for number in self.channels_last for part in levels[number]])

    # Captions -----------------------------------------------------------------------------------------------------

    @needs("text_encoders")
    def encode_prompts(
        self, captions: Sequence[str], max_tokens: int = 225, weighted: bool = False, rows: slice = slice(None)
    ) -> Conditioning:
        """Captions -> (B, 77·chunks, D): as many chunks of 75 tokens as the longest needs, at most ``max_tokens``/75.

        Only ``rows`` of the captions are encoded, with as many chunks as all of them together would get.
        SDXL's D is that of both encoders side by side, and ``pooled`` (B, P) comes from the second one's first chunk.
        """
        encoders = self._needed(self.text_encoders, "text_encoders")
        cut = [chunks_of(caption, self._tokenizer, max_tokens, weighted) for caption in captions]
        count = max(map(len, cut))
        cut = cut[rows]
        chunks = [chunk for row in cut for chunk in [*row, *[Chunk()] * (count - len(row))]]  # B·count
        weights = to_device(token_weights(chunks), self.device)
        contexts: list[Tensor] = []
        pooled: Tensor | None = None
        for encoder, shape in zip(encoders, self.architecture.text_encoders):
            pad = 0 if shape.pad == "zero" else self._tokenizer.eos
            ids = to_device(token_ids(chunks, self._tokenizer, pad), self.device)
            output = encoder(input_ids=ids, output_hidden_states=True)
            hidden = self.family.hidden_state(encoder, output, self.clip_skip)  # (B·count, 77, D)
            if weighted:
                hidden = weigh(hidden, weights)
            contexts.append(hidden.reshape(len(cut), -1, hidden.shape[-1]))
            if shape.projection is not None:
                ends = (ids[::count] == self._tokenizer.eos).int().argmax(dim=1)
                last = output.last_hidden_state[::count]  # first chunks, after the final LayerNorm
                # open_clip's matrix is bound transposed, transformers' as it is; a product's rounding goes by the order
                # in memory, and must not depend on who lends.
                projection = dense_weight(encoder.text_projection.weight, self.compute_dtype).contiguous()
                pooled = F.linear(last[torch.arange(len(cut), device=self.device), ends], projection)
        return Conditioning(torch.cat(contexts, dim=-1), pooled)

    def count_tokens(self, caption: str) -> int:
        """Tokens of the caption, without start and end token."""
        return len(self._tokenizer.ids(caption))

    # The UNet -----------------------------------------------------------------------------------------------------

    @needs("unet")
    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, time_ids: Tensor | None
    ) -> Tensor:
        """The UNet's prediction (B, 4, h, w) in fp32.

        timesteps: (B,) int64. time_ids: (B, 6) for SDXL: original (h, w), crop (top, left), target (h, w) in pixels.
        """
        conditioning = conditioning.to(self.device, self.compute_dtype)
        added = None
        if self.architecture.unet.added_channels is not None:
            if time_ids is None or conditioning.pooled is None:
                raise ValueError("SDXL needs time_ids and a pooled encoding of the captions")
            added = {"text_embeds": conditioning.pooled, "time_ids": time_ids.to(self.device, torch.float32)}
        return self.unet(
            noisy_latents.to(self.device, self.compute_dtype),
            timesteps.to(self.device),
            encoder_hidden_states=conditioning.context,
            added_cond_kwargs=added,
            return_dict=False,
        )[0].float()

    def lora_targets(self) -> list[LoraTarget]:
        """Every layer that an adapter can attach to: the UNet's, then those of the text encoders not released."""
        return self.family.targets(self.unet, self.text_encoders, self.architecture)

    def compilable(self) -> list[nn.Module]:
        return recomputable(self.unet)

    def set_gradient_checkpointing(self, share: float) -> None:
        """Recompute activations in the backward pass instead of keeping them: in this share of the UNet's parts, and
        in the text encoders at 1."""
        parts, enabled = recomputable(self.unet), share >= 1
        for index, part in enumerate(parts):
            block_forward(part).anew = index < round(share * len(parts))
        for hook in self._input_grad_hooks:
            hook.remove()
        # transformers before 4.35 knows only the reentrant kind, which needs an input with a gradient.
        embeddings = [text_body(encoder).embeddings for encoder in self.text_encoders] if enabled else []
        self._input_grad_hooks = [module.register_forward_hook(_require_grad) for module in embeddings]
        # Set directly, since transformers' own switches differ between versions and warn about each other. They
        # checkpoint only what is in training mode; that is set on the very modules that checkpoint and on nothing
        # below them, so that it changes nothing else.
        for encoder in self.text_encoders:
            for part in encoder.modules():
                if hasattr(part, "gradient_checkpointing"):
                    part.gradient_checkpointing = part.training = enabled
                    part._gradient_checkpointing_func = checkpoint


def _require_grad(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
