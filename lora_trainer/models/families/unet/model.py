"""A lender's tensors, bound to modules that compute: the ``LentModel`` of SD 1, SD 2 and SDXL."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_trainer.devices import to_device, without_autocast
from lora_trainer.models.base import Conditioning, LoraTarget, ModelInfo, NoiseSchedule
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.families.unet.architecture import Architecture
from lora_trainer.models.families.unet.binding import Binding, build_text_encoder, build_unet, build_vae, text_body
from lora_trainer.models.families.unet.blocks import slim
from lora_trainer.models.prompts import Chunk, chunks_of, token_ids, token_weights, weigh
from lora_trainer.models.residency import Residency
from lora_trainer.models.tokenizer import Tokenizer
from lora_trainer.storage import dense_weight

if TYPE_CHECKING:
    from lora_trainer.models.families.unet.family import UNetFamily

PARTS = ("unet", "vae", "text_encoders")
VAE_DTYPE = torch.float32  # SDXL's gives NaN in fp16; the pictures go through it once, so the others get the same

# The model draws no random numbers, and their state cannot be read while a CUDA graph is recorded.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

Method = TypeVar("Method", bound=Callable[..., Any])


def _needs(part: str) -> Callable[[Method], Method]:
    """A method that computes with ``part``, which is brought to the device first where nobody else does that."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def run(self: DiffusionModel, *arguments: Any, **named: Any) -> Any:
            if self.residency is None:
                return method(self, *arguments, **named)
            return self.residency.run(part, lambda: method(self, *arguments, **named))

        return cast(Method, run)

    return decorate


class DiffusionModel:
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
        self.info = info
        self.schedule = schedule
        self.device = device
        self.architecture = architecture
        self.compute_dtype = compute_dtype
        self.clip_skip = clip_skip
        self._tokenizer = tokenizer
        self.unet, self._unet_bindings = build_unet(architecture.unet)
        self.vae, self._vae_bindings = build_vae(architecture.own_vae)
        built = [build_text_encoder(shape) for shape in architecture.text_encoders]
        self.text_encoders = [encoder for encoder, _ in built]
        self._text_bindings = [binding for _, bindings in built for binding in bindings]
        self._input_grad_hooks: list = []
        for module in (self.unet, *self.text_encoders):
            cast_layers(module, compute_dtype)
        slim(self.unet)
        cast_layers(self.vae, VAE_DTYPE)
        for module in (self.unet, self.vae, *self.text_encoders):
            module.requires_grad_(False).eval()
        self.residency = Residency(lambda part: self.bind(tensors, [part]), self._unbind) if reload else None
        # One after the other: where memory lacks, each takes the place of those before it.
        self._load(tensors, "vae")
        self.vae_key = weights_digest(self._vae_bindings, f"{architecture.family} vae")
        self._load(tensors, "text_encoders")
        self.text_key = weights_digest(self._text_bindings, f"{architecture.family} text clip_skip={clip_skip}")
        for encoder in self.text_encoders:
            for name, buffer in encoder.named_buffers():
                if buffer.is_meta:
                    raise RuntimeError(f"the buffer {name} was left on meta")
            encoder.to(device)  # buffers only: the parameters are there already
        self._load(tensors, "unet")
        self.network_key = weights_digest(self._unet_bindings, f"{architecture.family} unet")

    # Weights ------------------------------------------------------------------------------------------------------

    def bind(self, tensors: Mapping[str, Tensor], parts: Sequence[str] = PARTS, move: bool = True) -> None:
        """Bind the weights of these parts again, after the lender moved them. What was released is not asked for.

        Parts of the model stay the same module objects, so that attached adapters stay attached.

        move: bring what lies elsewhere to ``device``. A lender who does that himself, when a part is about to run,
        has it bound where it lies.
        """
        bindings = dict(zip(PARTS, (self._unet_bindings, self._vae_bindings, self._text_bindings)))
        for part in parts:
            for binding in bindings[part]:
                binding.bind(tensors, self.device if move else None)

    def _load(self, tensors: Mapping[str, Tensor], part: str) -> None:
        if self.residency is None:
            self.bind(tensors, [part])
        else:
            self.residency.load(part)

    def unbind(self) -> None:
        """Let go of all weights until ``bind`` is called, so that their memory is not held while others need it."""
        for part in PARTS:
            self._unbind(part)

    def _unbind(self, part: str) -> None:
        for binding in dict(zip(PARTS, (self._unet_bindings, self._vae_bindings, self._text_bindings)))[part]:
            binding.unbind()

    def compute_on(self, device: torch.device) -> None:
        """Compute there from now on; the lender sees to it that the weights are there when they are needed."""
        self.device = device
        for encoder in self.text_encoders:
            for module in encoder.modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.to(device)

    def bound(self) -> dict[str, Tensor]:
        """Diffusers or transformers name -> the parameter bound to it."""
        modules = {"unet": self.unet, "vae": self.vae}
        modules.update(zip(("text_encoder", "text_encoder_2"), self.text_encoders))
        return {
            f"{part}.{name}": parameter
            for part, module in modules.items()
            if module is not None
            for name, parameter in module.named_parameters()
        }

    def addresses(self) -> tuple[int, ...]:
        """Where the UNet's weights lie; other addresses mean that the lender moved them."""
        return tuple(binding.owner._parameters[binding.name].data_ptr() for binding in self._unet_bindings)

    def release(self, *parts: str) -> None:
        """Drop "vae", "text_encoders" or, in the end, "unet": their weights are let go and cannot be used any more."""
        for part in parts:
            if part == "vae":
                released, self._vae_bindings, self.vae = self._vae_bindings, [], None
            elif part == "text_encoders":
                released, self._text_bindings, self.text_encoders = self._text_bindings, [], []
            elif part == "unet":
                released, self._unet_bindings = self._unet_bindings, []
            else:
                raise ValueError(f"no part is called {part!r}")
            for binding in released:
                binding.unbind()
            if self.residency is not None:
                self.residency.forget(part)

    def hold(self, *parts: str) -> None:
        """Keep these parts on the device for the rest of the run, because they learn."""
        if self.residency is not None:
            for part in parts:
                self.residency.hold(part)

    def make_room(self) -> None:
        """Take what a training step does not need off the device; it comes back when it is needed."""
        if self.residency is not None:
            self.residency.make_room(["unet"])

    # Pictures -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @_needs("vae")
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> VAE moments (B, 8, H/8, W/8) fp32: mean and log-variance, unscaled."""
        vae = self._needed(self.vae, "vae")
        with without_autocast(self.device):
            x = vae.encoder.conv_in(pixels.to(self.device, VAE_DTYPE))
            for block in vae.encoder.down_blocks:
                x = block(x)
            x = vae.encoder.mid_block(x)
            x = vae.encoder.conv_out(vae.encoder.conv_act(vae.encoder.conv_norm_out(x)))
            return vae.quant_conv(x)

    def sample_latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """Moments (B, 8, h, w) -> scaled latents (B, 4, h, w) fp32; a draw with ``generator``, the mean without.

        The noise is drawn on the CPU, so that every device gives the same.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        if generator is not None:
            noise = to_device(torch.randn(mean.shape, generator=generator), mean.device)
            mean = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
        return mean * self.architecture.own_vae.scaling_factor

    @torch.no_grad()
    @_needs("vae")
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> pictures (B, 3, 8h, 8w) in [-1, 1], fp32."""
        vae = self._needed(self.vae, "vae")
        # The decoder's own forward would cast to the dtype of its weights.
        with without_autocast(self.device):
            latents = latents.to(self.device, VAE_DTYPE) / self.architecture.own_vae.scaling_factor
            x = vae.decoder.mid_block(vae.decoder.conv_in(vae.post_quant_conv(latents)))
            for block in vae.decoder.up_blocks:
                x = block(x)
            x = vae.decoder.conv_out(vae.decoder.conv_act(vae.decoder.conv_norm_out(x)))
            return x.clamp(-1, 1)

    # Captions -----------------------------------------------------------------------------------------------------

    @_needs("text_encoders")
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

    @_needs("unet")
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

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them, in the UNet and the text encoders."""
        for hook in self._input_grad_hooks:
            hook.remove()
        # transformers before 4.35 knows only the reentrant kind, which needs an input with a gradient.
        embeddings = [text_body(encoder).embeddings for encoder in self.text_encoders] if enabled else []
        self._input_grad_hooks = [module.register_forward_hook(_require_grad) for module in embeddings]
        # Set directly, since the libraries' own switches differ between versions and warn about each other. They
        # checkpoint only what is in training mode; that is set on the very modules that checkpoint and on nothing
        # below them, so that it changes nothing else.
        for module in (self.unet, *self.text_encoders):
            for part in module.modules():
                if hasattr(part, "gradient_checkpointing"):
                    part.gradient_checkpointing = part.training = enabled
                    part._gradient_checkpointing_func = _checkpoint

    def _needed(self, part, name: str):
        if not part:
            raise RuntimeError(f"{name} was released")
        return part


def _require_grad(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


@torch.no_grad()
def weights_digest(bindings: Sequence[Binding], salt: str) -> str:
    """SHA-256 over names, shapes and up to 32 values of every bound tensor: cheap, and other weights give another."""
    digest = hashlib.sha256(salt.encode())
    samples = []
    for binding in bindings:
        tensor = binding.owner._parameters[binding.name]
        digest.update(f"{binding.source} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // 32)][:32].float())
    for device in dict.fromkeys(sample.device for sample in samples):  # one copy from each, not one for each tensor
        digest.update(torch.cat([sample for sample in samples if sample.device == device]).cpu().numpy().tobytes())
    return digest.hexdigest()
