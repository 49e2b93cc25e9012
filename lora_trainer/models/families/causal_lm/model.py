"""A lent language model: what adapters attach to, hidden states for training, logits for writing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_trainer.models.base import LentNetwork, LoraTarget, ModelInfo
from lora_trainer.models.families.causal_lm.network import decoder_layers, head_of
from lora_trainer.models.sharding import ShardedBlocks

_ATTENTION = {"self_attn", "self_attention", "attention"}
_ALSO_NAMED = {
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "dense": ("o_proj", "out_proj"),
    "o_proj": ("out_proj",),
}


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: ``softcap · tanh((W h + b) / softcap)``, or ``W h + b`` without a softcap.

    weight: (V, D). bias: (V) or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


class LanguageModel(LentNetwork):
    """See ``LentNetwork``. network: transformers', in eval mode, with frozen weights. blocks: its own, where several
    processes keep them together."""

    def __init__(
        self,
        network: nn.Module,
        info: ModelInfo,
        device: torch.device,
        compute_dtype: torch.dtype,
        network_key: str,
        blocks: ShardedBlocks | None = None,
    ):
        self._blocks = blocks
        self.network, self.info, self.device = network, info, device
        self.compute_dtype, self.network_key = compute_dtype, network_key
        self._prefix, self._layers = decoder_layers(network)
        self._head = head_of(network)
        # Its name in late releases of transformers 5, and before.
        known = inspect.signature(network.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        self.set_gradient_checkpointing(0)
        self._softcap = getattr(network.config, "final_logit_softcapping", None)

    @property
    def head(self) -> Head:
        return Head(self._head.weight, getattr(self._head, "bias", None), self._softcap)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) -> what the head reads (B, L, D).

        Rows that are shorter are filled up at their end with any token: none attends to what comes behind it, so no
        mask is needed, and attention takes its fastest way.
        """
        hidden = self.network.base_model(input_ids=tokens, use_cache=False, return_dict=True)[0]
        # ChatGLM2 and 3 compute with the sequence in front.
        return hidden if hidden.shape[:2] == tokens.shape else hidden.transpose(0, 1)

    def next_logits(self, tokens: Tensor, cache: Any = None, past: int = 0) -> tuple[Tensor, Any]:
        """Tokens (1, n) behind ``past`` earlier ones -> logits (V) fp32 of what follows, and the cache for the next
        call."""
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        output = self.network(
            input_ids=tokens, position_ids=positions, use_cache=True, return_dict=True, **{self._cache_name: cache}
        )
        return output.logits[0, -1].float(), output[self._cache_name]

    def lora_targets(self) -> list[LoraTarget]:
        """The Linear layers of all blocks. Embeddings and head stay as they are."""
        found = []
        for name, module in self._layers.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            full, last = f"{self._prefix}.{name}", name.rpartition(".")[2]
            group = "attention" if _ATTENTION & set(name.split(".")) else "feed_forward"
            kohya = f"lora_{full.replace('.', '_')}"
            also = _ALSO_NAMED.get(last, ())
            found.append(LoraTarget(kohya, full, full, "language_model", group, None, module, also))
        return found

    def addresses(self) -> tuple[int, ...]:
        return tuple(parameter.data_ptr() for parameter in self.network.parameters())

    def set_gradient_checkpointing(self, share: float) -> None:
        """Ours, around whole blocks, the first ones: transformers' own works in training mode only, and differs between
        releases."""
        for index, layer in enumerate(self._layers):
            vars(layer).pop("forward", None)
            if self._blocks is not None:
                layer.forward = _recomputed(partial(self._entered, layer, layer.forward))
            elif index < round(share * len(self._layers)):
                layer.forward = _recomputed(layer.forward)

    def _entered(self, layer: nn.Module, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        assert self._blocks is not None
        self._blocks.enter(layer)
        return forward(*arguments, **named)

    def send(self, device: torch.device | str) -> None:
        """Keep the weights on this device for now; steps need them on ``device``."""
        self.network.to(device)

    def release(self) -> None:
        """Let go of all weights."""
        self._blocks, blocks = None, self._blocks
        if blocks is not None:
            blocks.clear()
        self.set_gradient_checkpointing(0)
        for module in self.network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)


def _recomputed(forward: Any) -> Any:
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return run
