"""A lender's tensors, bound to a denoiser, a VAE and text encoders: what every image model of ours has in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lora_trainer.devices import to_device, without_autocast
from lora_trainer.models.base import ModelInfo
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.families.unet.binding import Binding
from lora_trainer.models.families.unet.layout import LayoutTimes
from lora_trainer.models.offload import BlockOffload
from lora_trainer.models.residency import Residency
from lora_trainer.models.sharding import ShardedBlocks

PARTS = ("unet", "vae", "text_encoders")
LEAST_LOG_VARIANCE = -30.0
"""Of a latent; diffusers' ``DiagonalGaussianDistribution`` has the same limit."""
VAE_DTYPE = torch.float32  # SDXL's gives NaN in fp16; the pictures go through it once, so the others get the same
Method = TypeVar("Method", bound=Callable[..., Any])


def needs(part: str) -> Callable[[Method], Method]:
    """A method that computes with ``part``, which is brought to the device first where nobody else does that."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def run(self: PartedModel, *arguments: Any, **named: Any) -> Any:
            if self.residency is None:
                return method(self, *arguments, **named)
            return self.residency.run(part, lambda: method(self, *arguments, **named))

        return cast(Method, run)

    return decorate


class PartedModel:
    """The parts of an image model, the denoiser as ``unet``; ``vae`` is None once released.

    unet, vae, text_encoders: modules on meta, each with what binds it. They are to be cast by ``cast_layers`` already,
    but for the VAE. text_salt: what, beside the text encoders' weights, decides on an encoding.
    reload: the tensors can be read again, so parts may leave the device where its memory does not hold them all.
    blocks: the denoiser's, where they come to the device as they compute; None where all of them stay there.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        architecture: Any,
        info: ModelInfo,
        device: torch.device,
        compute_dtype: torch.dtype,
        *,
        unet: tuple[nn.Module, list[Binding]],
        vae: tuple[nn.Module, list[Binding]],
        text_encoders: Sequence[tuple[nn.Module, list[Binding]]],
        text_salt: str,
        reload: bool,
        blocks: BlockOffload | ShardedBlocks | None = None,
    ):
        self.blocks = blocks
        self.info, self.architecture, self.device, self.compute_dtype = info, architecture, device, compute_dtype
        self.unet, self._unet_bindings = unet
        self.vae, self._vae_bindings = vae
        self.text_encoders = [encoder for encoder, _ in text_encoders]
        self._text_bindings = [binding for _, bindings in text_encoders for binding in bindings]
        cast_layers(self.vae, VAE_DTYPE)
        for module in (self.unet, self.vae, *self.text_encoders):
            module.requires_grad_(False).eval()
        self.residency = Residency(lambda part: self.bind(tensors, [part]), self._unbind) if reload else None
        # One after the other: where memory lacks, each takes the place of those before it.
        self._load(tensors, "vae")
        self.vae_key = weights_digest(self._vae_bindings, f"{architecture.family} vae")
        self._load(tensors, "text_encoders")
        self.text_key = weights_digest(self._text_bindings, f"{architecture.family} text {text_salt}")
        for encoder in self.text_encoders:
            for name, buffer in encoder.named_buffers():
                if buffer.is_meta:
                    raise RuntimeError(f"the buffer {name} was left on meta")
            encoder.to(device)  # buffers only: the parameters are there already
        self._load(tensors, "unet")
        sharded = self.blocks if isinstance(self.blocks, ShardedBlocks) else None
        if sharded is not None:
            self.hold("unet")  # other processes compute with what this one has of it
        bring = None if sharded is None else sharded.enter_block_of
        self.network_key = weights_digest(self._unet_bindings, f"{architecture.family} unet", bring)

    def compilable(self) -> list[nn.Module]:
        """The blocks that torch.compile takes one by one, without a break; none of a model for which that is not so."""
        return []

    # Layout in memory ---------------------------------------------------------------------------------------------

    channels_last: Sequence[int] = ()
    """Levels whose convolutions lie so."""

    @property
    def has_layouts(self) -> bool:
        """Whether the methods below do anything."""
        return False

    def layout_times(self, size: tuple[int, int], batch_size: int) -> list[LayoutTimes]:
        """Of each level, on ``batch_size`` latents of ``size`` (width, height). Raises RuntimeError where memory is
        short."""
        return []

    def use_channels_last(self, levels: Sequence[int]) -> None:
        """Bring the weights of these levels' convolutions into channels last; they come back to the device so."""

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
                if self.blocks is not None:
                    self.blocks.take(binding.owner)

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
        if part == "unet" and self.blocks is not None:
            self.blocks.clear()

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
        modules.update(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), self.text_encoders))
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
                self._unbind(part)
                released, self._unet_bindings = [], []
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
    @needs("vae")
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> VAE moments (B, 2C, H/8, W/8) fp32: mean and log-variance, unscaled."""
        vae = self._needed(self.vae, "vae")
        with without_autocast(self.device):
            x = vae.encoder.conv_in(pixels.to(self.device, VAE_DTYPE))
            for block in vae.encoder.down_blocks:
                x = block(x)
            x = vae.encoder.mid_block(x)
            x = vae.encoder.conv_out(vae.encoder.conv_act(vae.encoder.conv_norm_out(x)))
            return x if vae.quant_conv is None else vae.quant_conv(x)

    def sample_latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """Moments (B, 2C, h, w) -> scaled latents (B, C, h, w) fp32; a draw with ``generator``, the mean without.

        The noise is drawn on the CPU, so that every device gives the same.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        if generator is not None:
            noise = to_device(torch.randn(mean.shape, generator=generator), mean.device)
            mean = mean + torch.exp(0.5 * log_variance.clamp(LEAST_LOG_VARIANCE, 20)) * noise
        shape = self.architecture.own_vae
        return (mean - shape.shift if shape.shift else mean) * shape.scaling_factor

    def latent_moments(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> the moments (B, 2C, h, w) fp32 of which ``sample_latents`` makes them, to
        1e-6."""
        mean = self._unscaled(latents.float())
        return torch.cat([mean, torch.full_like(mean, LEAST_LOG_VARIANCE)], dim=1)

    def _unscaled(self, latents: Tensor) -> Tensor:
        shape = self.architecture.own_vae
        return latents / shape.scaling_factor + shape.shift

    @torch.no_grad()
    @needs("vae")
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pictures (B, 3, 8h, 8w) in [-1, 1], fp32."""
        vae = self._needed(self.vae, "vae")
        # The decoder's own forward would cast to the dtype of its weights.
        with without_autocast(self.device):
            latents = self._unscaled(latents.to(self.device, VAE_DTYPE))
            if vae.post_quant_conv is not None:
                latents = vae.post_quant_conv(latents)
            x = vae.decoder.mid_block(vae.decoder.conv_in(latents))
            for block in vae.decoder.up_blocks:
                x = block(x)
            x = vae.decoder.conv_out(vae.decoder.conv_act(vae.decoder.conv_norm_out(x)))
            return x.clamp(-1, 1)

    def _needed(self, part, name: str):
        if not part:
            raise RuntimeError(f"{name} was released")
        return part


@torch.no_grad()
def weights_digest(bindings: Sequence[Binding], salt: str, bring: Callable[[nn.Module], None] | None = None) -> str:
    """SHA-256 over names, shapes and up to 32 values of every bound tensor: cheap, and other weights give another.

    bring: called with a module whose weights are read next.
    """
    digest = hashlib.sha256(salt.encode())
    samples = []
    for binding in bindings:
        if bring is not None:
            bring(binding.owner)
        tensor = binding.owner._parameters[binding.name]
        digest.update(f"{binding.source} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // 32)][:32].to(torch.float32, copy=True))
    for device in dict.fromkeys(sample.device for sample in samples):  # one copy from each, not one for each tensor
        there = [index for index, sample in enumerate(samples) if sample.device == device]
        copies = torch.cat([samples[index] for index in there]).cpu()
        for index, copy in zip(there, copies.split([len(samples[index]) for index in there])):
            samples[index] = copy
    digest.update(torch.cat(samples).numpy().tobytes())
    return digest.hexdigest()
