"""An adapter is its algebra: one frozen layer, the tensors that change it, and the change as a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_trainer.adapters.algebra import column_norm, decompose
from lora_trainer.adapters.fused import ChangedLayer
from lora_trainer.adapters.masks import DropoutMasks, seed_from
from lora_trainer.devices import autocast_dtype
from lora_trainer.errors import UserError
from lora_trainer.storage import dense_weight


class Target(Protocol):
    """The attributes of ``models.base.LoraTarget`` that the adapters use."""

    @property
    def kohya_name(self) -> str: ...

    @property
    def diffusers_name(self) -> str: ...

    @property
    def checkpoint_name(self) -> str | None: ...

    @property
    def part(self) -> str: ...

    @property
    def group(self) -> str: ...

    @property
    def block(self) -> int | None: ...

    @property
    def module(self) -> nn.Module: ...

    @property
    def also_named(self) -> tuple[str, ...]: ...

    @property
    def split(self) -> tuple[tuple[str, int], ...]: ...

    @property
    def swapped(self) -> bool: ...

    @property
    def alpha(self) -> bool: ...


def is_text_encoder(target: Target) -> bool:
    """Whether the layer is one of a text encoder beside the network that is trained first of all."""
    return target.part.startswith("text_encoder")


def without_alpha(name: str, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stands for a layer in a LoRA file, by suffix, with alpha/rank multiplied into lora_up (``Target.alpha``).

    Raises:
        UserError: it is no plain LoRA, which such files cannot hold.
    """
    if set(layer) - {"lora_down.weight", "lora_up.weight", "alpha"}:
        raise UserError(
            f"The LoRA files of this model hold plain LoRAs only, and {name} is none.",
            field="adapter",
            remedy="Use adapter: lora without dora.",
        )
    down, up = layer["lora_down.weight"], layer["lora_up.weight"]
    alpha = layer.get("alpha")
    return {"lora_down.weight": down, "lora_up.weight": up if alpha is None else up * (float(alpha) / len(down))}


def kaiming_uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """``kaiming_uniform_(a=√5)`` from a private generator: uniform within ±1/√fan_in, fp32 on the CPU.

    torch's own function has no ``generator`` before 2.2, and a WebUI may have switched it off while it loads.
    """
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """(out, in) or (out, in, kh, kw), read off the layer's description: its weight may be stored in another shape."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
    return layer.out_features, layer.in_features


class Adapter(nn.Module):
    """The trained change of one frozen layer. Parameters are fp32, whatever the layer's dtype.

    ``forward(x)`` is the adapted layer: it is put in the place of the layer's own forward, which stays reachable as
    ``base``. The layer is no submodule: its weights are not ours to move, save or train.

    device: where the layer computes, and where the parameters lie; by default, where the layer's weight is now. A host
        may keep weights elsewhere until they are needed.
    multiplier: strength at which the change is applied; 1 in training, and never part of what is saved.
    masks: of dropout; those of a set share one.
    active: False gives the bare layer.
    """

    kind = ""

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        alpha: float,
        *,
        name: str = "",
        seed: int = 0,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        dora: bool = False,
        device: torch.device | None = None,
    ):
        super().__init__()
        if getattr(layer, "groups", 1) != 1:
            raise ValueError(f"{name}: adapters of grouped convolutions are not defined.")
        object.__setattr__(self, "layer", layer)
        self.base: Callable[[Tensor], Tensor] = layer.forward
        self.name = name
        self.device = layer.weight.device if device is None else device
        self.rank = rank
        self.alpha = float(alpha)
        self.multiplier = 1.0
        self.active = True
        self.dropout = dropout
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.masks = DropoutMasks()
        self._masks: dict[tuple, Tensor] = {}
        self.shape = weight_shape(layer)
        self.generator = torch.Generator().manual_seed(seed_from(seed, "adapter", name))
        self.dora_scale = self.parameter(column_norm(self.base_weight())) if dora else None

    @staticmethod
    def count(shape: Sequence[int], rank: int, **options: Any) -> int:
        """How many numbers learn for a layer whose weight has this shape, DoRA's lengths aside."""
        raise NotImplementedError

    def parameter(self, value: Tensor) -> nn.Parameter:
        """``value`` as a trainable fp32 parameter on ``device``."""
        return nn.Parameter(value.detach().to(self.device, torch.float32, copy=True))

    def base_weight(self) -> Tensor:
        """The frozen weight in fp32 on ``device``, in the layer's own shape; no copy if it is so already."""
        return dense_weight(self.layer.weight, torch.float32, self.shape, self.device)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The number format in which the layer computes on ``x``."""
        return autocast_dtype(x.device) or getattr(self.layer, "compute_dtype", x.dtype)

    @property
    def scale(self) -> float:
        """alpha / rank, by which the change is multiplied."""
        return self.alpha / self.rank

    def delta_weight(self) -> Tensor:
        """The change, in W's shape, fp32, with ``scale`` and without ``multiplier`` or DoRA's magnitudes."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """The weight with which the bare layer computes what the adapted one does (dropout aside), fp32."""
        weight, delta = self.base_weight(), self.delta_weight()
        if self.dora_scale is None:
            return weight + self.multiplier * delta
        return weight + self.multiplier * (decompose(weight, delta, self.dora_scale) - weight)

    def keep_module(self, dimensions: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """1, or 0 where the whole change is switched off in this step; nothing is scaled up for it."""
        probability = self.module_dropout
        return self.keep((1,) * dimensions, probability, "module", device, dtype) * (1 - probability)

    def keep(
        self,
        shape: Sequence[int],
        probability: float,
        what: str,
        device: torch.device,
        dtype: torch.dtype,
        by_sample: bool = False,
    ) -> Tensor:
        """See ``DropoutMasks.keep``. what: a name for the mask that no other of the layer has.

        A mask is a view of numbers that are drawn anew in place, so it is looked for once and then found by its shape
        alone: a compiled block can do that.
        """
        key = (what, tuple(shape), device, dtype, self.masks.part)
        found = self._masks.get(key)
        if found is None:
            place = f"{self.name} {what}"
            found = self.masks.keep(shape, probability, place, device, dtype, by_sample=by_sample)
            self._masks[key] = found
        return found

    @torch.no_grad()
    def limit_norm(self, maximum: float) -> None:
        """Scale the change down to this norm where it is larger; each factor takes its share (kohya's
        scale_weight_norms)."""
        factors = list(self.factors().values())
        ratio = (maximum / self.delta_norm().clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=1)
        for factor in factors:
            factor.mul_(ratio ** (1 / len(factors)))

    def delta_norm(self) -> Tensor:
        """The Frobenius norm of the change, a scalar."""
        return torch.linalg.vector_norm(self.delta_weight())

    def factors(self) -> dict[str, Tensor]:
        """The trained tensors by the suffix that they have in a LoRA file, without alpha and dora_scale."""
        raise NotImplementedError

    def export(self) -> dict[str, Tensor]:
        """Everything that stands for this layer in a LoRA file, by suffix, fp32."""
        tensors = {suffix: tensor.detach() for suffix, tensor in self.factors().items()}
        tensors["alpha"] = torch.tensor(self.alpha)
        if self.dora_scale is not None:
            tensors["dora_scale"] = self.dora_scale.detach()
        return tensors

    def is_neutral(self) -> bool:
        """Whether the adapted layer is still the bare one."""
        if self.dora_scale is not None:
            weight = self.layer.weight.view(self.shape)
            return torch.equal(self.merged_weight().to(weight.dtype), weight.to(self.device))
        return not bool(self.delta_weight().any())


class WeightAdapter(Adapter):
    """An adapter whose change is no shortcut through few channels: the layer computes once, with the changed weight.

    dropout and rank_dropout switch off rows of the change (outputs), as LyCORIS does; what is left is scaled up so
    that the change keeps its mean.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.base(x)
        layer = self.layer
        dtype = self.compute_dtype(x)
        convolution = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        return ChangedLayer.apply(x, layer.bias, self._changed_weight, convolution, dtype, *self.parameters())

    def _changed_weight(self) -> Tensor:
        """With which the layer computes now: like ``merged_weight``, and with what is switched off in this step."""
        weight, delta = self.base_weight(), self.delta_weight()
        dropped = 1 - (1 - self.dropout) * (1 - self.rank_dropout)
        if self.training and dropped:
            keep = self.masks.keep((self.shape[0],), dropped, self.name, delta.device, delta.dtype)
            delta = delta * keep.view(-1, *[1] * (delta.dim() - 1))
        if self.training and self.module_dropout:
            delta = delta * self.keep_module(delta.dim(), delta.device, delta.dtype)
        if self.dora_scale is None:
            changed = torch.add(weight, delta, alpha=self.multiplier)
        else:
            changed = torch.lerp(weight, decompose(weight, delta, self.dora_scale), self.multiplier)
        beneath = getattr(self.base, "__self__", None)
        if isinstance(beneath, Adapter) and beneath.active:  # the layer had an adapter before; both changes count
            return changed + (beneath.merged_weight() - weight)
        return changed
