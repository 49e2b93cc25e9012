"""What a model is to the rest of the package: who lends it, what it can compute, where a LoRA attaches.

What differs between model families stands in ``models.family``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn


class ModelArchitecture(Protocol):
    """What a model is made of, as plain data that can be hashed: read from names and shapes, before weights are."""

    @property
    def family(self) -> str: ...


@dataclass(frozen=True)
class ModelInfo:
    """Which model is lent.

    family: a name in ``models.families``. prediction_type: what the model predicts, "epsilon", "v_prediction" or
        "flow" (ε - x0).
    architecture: as far as it is known before the model is loaded.
    stored: bytes of its parts ("unet", "vae", "text_encoders") in their files, where they are used as they are stored.
    """

    family: str
    prediction_type: str
    name: str
    path: Path | None = None
    zero_terminal_snr: bool = False
    architecture: Any = field(default=None, compare=False)  # the family's ModelArchitecture, or None
    stored: Mapping[str, int] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process. ``alphas_cumprod``: (T,) fp32 on the CPU, T = 1000."""

    alphas_cumprod: Tensor
    prediction_type: str

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def takes_negative(self, cfg: float | None = None) -> bool:
        """Whether guidance of strength ``cfg`` (None: the usual one) takes a second prediction, for the negative
        prompt."""
        return cfg != 1

    @property
    def key(self) -> list[float]:
        """What a run is known by."""
        return self.alphas_cumprod.tolist()


@dataclass(frozen=True)
class FlowSchedule:
    """The straight way from a picture to noise, x_σ = (1-σ)·x0 + σ·ε with σ in [0, 1]; the model predicts ε - x0.

    sampling: how training draws σ where the settings do not say (see ``objectives.flow``). mu: of the host's sampler,
    whose σ are shifted by e^mu. guidance: that pictures are drawn with, of a model that reads one; None where guidance
    takes a second prediction, and ``cfg`` is its usual strength.
    """

    sampling: str
    mu: float
    guidance: float | None = None
    cfg: float = 1.0
    prediction_type: str = "flow"

    @property
    def key(self) -> list[float]:
        """What a run is known by."""
        return []

    def takes_negative(self, cfg: float | None = None) -> bool:
        """Whether guidance of strength ``cfg`` (None: the usual one) takes a second prediction, for the negative
        prompt."""
        return self.guidance is None and (self.cfg if cfg is None else cfg) != 1


@dataclass(frozen=True)
class Conditioning:
    """Encoded captions: what the model reads beside latents and timestep.

    context: (B, L, D), one vector per token. pooled: (B, P), one vector per caption, where the family has it.
    extra: further tensors of the family, (B, …) each, by name; they keep their dtype.
    """

    context: Tensor
    pooled: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.context.shape[0]

    def __getitem__(self, rows: int | slice) -> Conditioning:
        if isinstance(rows, int):
            rows = slice(rows, rows + 1)
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        extra = {name: tensor.to(device) for name, tensor in self.extra.items()}
        return Conditioning(self.context.to(device, dtype), pooled, extra)

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """``function`` applied to every tensor."""
        return Conditioning.from_tensors({name: function(tensor) for name, tensor in self.tensors.items()})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, as it is cached."""
        named = {"context": self.context, "pooled": self.pooled, **self.extra}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Conditioning:
        rest = dict(tensors)
        return Conditioning(rest.pop("context"), rest.pop("pooled", None), rest)

    @staticmethod
    def stack(items: Sequence[Conditioning], empty: Conditioning) -> Conditioning:
        """One batch of ``items`` (each B = 1); shorter ones are filled up with the encoding of the empty caption.

        ``empty``: (1, L, D), of which every item's length is a multiple; WebUIs pad prompts of unequal length so.
        """
        length = max(item.context.shape[1] for item in items)
        rows = []
        for item in items:
            missing = (length - item.context.shape[1]) // empty.context.shape[1]
            rows.append(torch.cat([item.context, *[empty.context.to(item.context)] * missing], dim=1))
        rest = [{name: tensor for name, tensor in item.tensors.items() if name != "context"} for item in items]
        joined = {name: torch.cat([tensors[name] for tensors in rest]) for name in rest[0]}
        return Conditioning.from_tensors({"context": torch.cat(rows), **joined})


@dataclass(frozen=True)
class LoraTarget:
    """One layer of the lent model that an adapter can attach to.

    kohya_name: key stem in the LoRA file, e.g. ``lora_unet_down_blocks_0_attentions_0_…_attn1_to_q``.
    diffusers_name: dotted module path, e.g. ``unet.down_blocks.0.attentions.0.….attn1.to_q`` or
        ``text_encoder.text_model.encoder.layers.0.self_attn.q_proj`` (``text_encoder_2.…`` for SDXL's second).
    checkpoint_name: key stem of the weight in the base's own file, e.g. ``model.diffusion_model.input_blocks.1.1.…``;
        None where the file stores the layer in another shape (open_clip's fused q, k, v).
    part: "unet" (the denoiser, whatever it is built of) | "text_encoder" | "text_encoder_2" | "language_model".
    group: "attention" | "feed_forward" | "projection" | "conv" (3×3) | "conv_linear" (a resnet's 1×1 conv and Linear).
    block: kohya's count of UNet blocks, None in text encoders. SD 1 and 2: 0…11 in, 12 middle, 13…24 out; SDXL: 1…9 in,
        10…12 middle, 13…21 out.
    also_named: what a person may call it as well: a fused query_key_value is q_proj, k_proj and v_proj in one.
    split: where diffusers has several layers for the one, their names and how many of its outputs each one gives.
    swapped: diffusers has the two halves of its outputs the other way round. alpha: LoRA files may hold one for it;
        where a reader fails at it, alpha/rank is multiplied into lora_up.
    """

    kohya_name: str
    diffusers_name: str
    checkpoint_name: str | None
    part: str
    group: str
    block: int | None
    module: nn.Module
    also_named: tuple[str, ...] = ()
    split: tuple[tuple[str, int], ...] = ()
    swapped: bool = False
    alpha: bool = True


class LentNetwork(Protocol):
    """What every lent model is: frozen weights that belong to the lender, to which adapters attach.

    All modules are in eval mode and need no gradient; gradients flow through them to what is attached.
    """

    info: ModelInfo
    device: torch.device
    compute_dtype: torch.dtype  # number format of the computation
    network_key: str  # changes when the weights of the network that is trained change; a run is known by it

    def lora_targets(self) -> list[LoraTarget]:
        """Every layer that an adapter can attach to, in the order of the file format (UNet, then text encoders)."""
        ...

    def addresses(self) -> tuple[int, ...]:
        """Where the weights lie that a step reads; other addresses mean that the lender moved them."""
        ...

    def set_gradient_checkpointing(self, share: float) -> None:
        """Compute this share of the model's parts anew in the backward pass instead of keeping what is inside them:
        none at 0, all at 1. Between them a model may take its parts in an order of its own (``models.work.Part``)."""
        ...


class LentModel(LentNetwork, Protocol):
    """A lent image model, and the computations on it."""

    vae_key: str  # changes when the VAE's weights change; part of cache keys
    text_key: str  # the same for the text encoders and clip_skip

    @property
    def schedule(self) -> NoiseSchedule | FlowSchedule: ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> VAE moments (B, 2C, h, w) fp32: mean and log-variance, unscaled.

        C, and the pixels per side of a latent, are the family's ``latents``.
        """
        ...

    def sample_latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """Moments (B, 2C, h, w) -> scaled latents (B, C, h, w) fp32; a sample with ``generator``, the mean without.

        The noise is drawn on the CPU, so that every device gives the same.
        """
        ...

    def latent_moments(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> the moments (B, 2C, h, w) fp32 of which ``sample_latents`` makes them, to
        1e-6."""
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W) in [-1, 1], fp32."""
        ...

    def encode_prompts(
        self, captions: Sequence[str], max_tokens: int = 225, weighted: bool = False, rows: slice = slice(None)
    ) -> Conditioning:
        """Captions of at most ``max_tokens`` tokens -> Conditioning. weighted: they hold the WebUI's emphasis.

        Only ``rows`` of the captions are encoded, as long as all of them together would be.
        Differentiable when text encoders carry adapters; wrap in ``torch.no_grad`` otherwise.
        """
        ...

    def count_tokens(self, caption: str) -> int:
        """Tokens of the caption by the (first) tokenizer, without BOS and EOS."""
        ...

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, time_ids: Tensor | None
    ) -> Tensor:
        """The model's prediction (B, C, h, w) in fp32.

        timesteps: (B,), of a flow model σ. time_ids: what the family's ``time_ids`` makes of the pictures' sizes.
        """
        ...

    def release(self, *parts: str) -> None:
        """ "vae" or "text_encoders" are not needed any more in this run; a lender that owns them frees the memory."""
        ...

    def hold(self, *parts: str) -> None:
        """Keep these parts, "unet" or "text_encoders", on the device for the rest of the run, because they learn.

        Raises:
            UserError: the device's memory does not hold all of them.
        """
        ...

    def make_room(self) -> None:
        """Take what a training step does not need off the device; it comes back when it is needed."""
        ...


class ModelAwayError(Exception):
    """Raised on entering ``Lender.turn``: the lender cannot give the model right now (the user switched checkpoint,
    say). Whoever asked waits and asks again.

    reason: a sentence for the user, which also says what ends it. returns: ``Lender.switch_back`` ends it.
    """

    def __init__(self, reason: str, returns: bool = False):
        super().__init__(reason)
        self.reason, self.returns = reason, returns


ModelT = TypeVar("ModelT", bound=LentNetwork, covariant=True)


@dataclass(frozen=True)
class Room:
    """Memory of a device before a model is borrowed.

    free: bytes that nobody has. there: bytes that a model takes which is the lent one, or makes room for it. together:
    all parts of the lent model are always on the device; else, where memory lacks, only the one that computes is.
    """

    free: int
    there: int = 0
    together: bool = False


class Lender(Protocol[ModelT]):
    """Where a model comes from: a file, or a running WebUI.

    Lenders derive from it. What has a body here is right for one that shares its device with nobody.

    is_shared: somebody waits while a turn lasts, as the users of a WebUI do.
    """

    is_shared: bool = False

    def describe(self) -> ModelInfo:
        """Says what would be lent, without loading weights. Raises UserError when it cannot be trained."""
        ...

    def borrow(self) -> AbstractContextManager[ModelT]:
        """Lends the model until the context ends; then everything lent is as it was, whatever happened inside."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Inside, the device is ours and the weights are resident, pristine and bound; outside, the host may work.

        Wraps one optimizer step or one batch of encoding. Does not nest. Raises ModelAwayError on entering.
        """
        ...

    def rest(self) -> AbstractContextManager[None]:
        """What a run waits in between two turns: a lender that keeps the device for the whole run gives it back
        inside."""
        return nullcontext()

    def switch_back(self) -> None:
        """Have the host choose again what it had chosen when the model was lent. Called between two turns."""
        return None

    def device_turn(self) -> AbstractContextManager[Any]:
        """The device without the model, for what comes before ``borrow``, such as writing captions."""
        return nullcontext()

    def make_room(self) -> None:
        """Memory was short in a turn: whoever else keeps things on the device, the host first, sends them away.

        Called inside a turn. What was sent away comes back when it is needed, or at the end of ``borrow``.
        """
        return None

    def room(self) -> Room | None:
        """What a training would find on the device; None where that is not known. Called before ``borrow``, outside a
        turn."""
        return None

    def room_for_blocks(self) -> int | None:
        """Bytes that are free on the device, before ``borrow``, where blocks of the model can wait in main memory."""
        return None

    def offload(self, blocks: int) -> None:
        """So many of them are to wait there. Called before ``borrow``, where ``room_for_blocks`` gave a number."""
        return None

    def model_hash(self) -> str | None:
        """SHA-256 of the base checkpoint's file, if there is one."""
        ...
