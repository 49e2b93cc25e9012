"""What a language model is made of, and what a training step on it computes and keeps, before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_trainer.models.base import LoraTarget, ModelInfo
from lora_trainer.models.families.causal_lm.model import LanguageModel
from lora_trainer.models.families.causal_lm.network import build_network

_NOT_SHAPE = ("_name_or_path", "torch_dtype", "dtype", "transformers_version", "auto_map", "architectures")
_PER_WIDTH, _PER_INNER = 9.0, 4.2
"""Numbers that a block keeps of each token for its backward pass, for each number of the hidden state and of the feed
forward's inner layer (counted for a LLaMA with a LoRA at every layer)."""
_ANEW = 1.3
"""What a block takes that is computed anew for its backward pass, for each number that it keeps (as
``training.forecast``)."""


@dataclass(frozen=True)
class LanguageArchitecture:
    """See ``ModelArchitecture``. settings: of config.json, as JSON, those that say nothing of the shape left out."""

    family: str
    settings: str

    @classmethod
    def from_config(cls, family: str, config: Mapping[str, Any]) -> LanguageArchitecture:
        kept = {name: value for name, value in config.items() if name not in _NOT_SHAPE}
        return cls(family, json.dumps(kept, sort_keys=True))


@dataclass(frozen=True)
class MetaLanguageModel:
    """A model without its weights.

    targets: where a LoRA attaches. weights: how many numbers; in_blocks: those of the Linear layers of all blocks.
    blocks: how many. width: of the hidden states. inner: of the feed forward. vocabulary: rows of the head.
    """

    targets: tuple[LoraTarget, ...]
    weights: int
    in_blocks: int
    blocks: int
    width: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any]) -> MetaLanguageModel:
        """Builds modules: to be called in a turn of a host's. Raises UserError when transformers cannot."""
        import torch

        network = build_network(folder, config)
        model = LanguageModel(network, ModelInfo("", "", ""), torch.device("meta"), torch.float32, "")
        targets = model.lora_targets()
        shapes = [tuple(target.module.weight.shape) for target in targets]  # (out, in)
        vocabulary, width = model.head.weight.shape
        blocks = int(getattr(network.config, "num_hidden_layers", 0) or getattr(network.config, "num_layers", 1))
        last = [shape[1] for target, shape in zip(targets, shapes) if target.group == "feed_forward"]
        weights = sum(parameter.numel() for parameter in network.parameters())
        return cls(
            tuple(targets), weights, sum(a * b for a, b in shapes), blocks, width, max(last, default=width), vocabulary
        )

    def operations(self, tokens: float, learned: float, length: float, checkpointing: float) -> float:
        """Floating-point operations of a forward and backward pass on so many tokens. length: of a row. checkpointing:
        the share of the blocks that are computed anew."""
        attention = 2 * self.blocks * self.width * length  # multiplications of each token with those before it
        block = 2 * (self.in_blocks + attention)
        passes = 2 + checkpointing  # forwards, again, backwards to the inputs alone
        return passes * block * tokens + 4 * self.vocabulary * self.width * learned

    def kept(self, tokens: float, checkpointing: float) -> float:
        """Numbers in memory at the fullest moment of a step on so many tokens at once."""
        block = _PER_WIDTH * self.width + _PER_INNER * self.inner
        kept = self.blocks * (checkpointing * self.width + (1 - checkpointing) * block)
        # What is computed anew comes beside what was kept before it: the first blocks.
        anew = checkpointing * self.blocks * self.width + _ANEW * block if checkpointing else 0
        return tokens * max(kept, anew)
