"""A lender's tensors, bound to modules that compute: what the ``LentModel`` of every flow model has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_trainer.models.base import Conditioning, LoraTarget, ModelInfo
from lora_trainer.models.blocks import checkpoint
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.families.flow.architecture import FlowArchitecture
from lora_trainer.models.families.flow.names import TRANSFORMER
from lora_trainer.models.families.flow.network import directly
from lora_trainer.models.families.flow.t5 import T5Encoder
from lora_trainer.models.families.flow.tokenizer import FlowTokenizer
from lora_trainer.models.families.parts import PartedModel
from lora_trainer.models.families.unet.binding import Binding, build_text_encoder, build_vae, parameters_of
from lora_trainer.models.offload import BlockOffload
from lora_trainer.models.prompts import parse_weights
from lora_trainer.models.sharding import Peers, ShardedBlocks

if TYPE_CHECKING:
    from lora_trainer.models.families.flow.family import FlowFamily


class FlowModel(PartedModel, ABC):
    """``unet`` is the transformer. The text encoders are the CLIPs, in their family's order, then T5 where it is there.
    """

    def __init__(
        self,
        family: FlowFamily,
        tensors: Mapping[str, Tensor],
        architecture: FlowArchitecture,
        tokenizer: FlowTokenizer,
        info: ModelInfo,
        device: torch.device,
        compute_dtype: torch.dtype,
        reload: bool = False,
        offload_blocks: int = 0,
        peers: Peers | None = None,
    ):
        self.family, self._tokenizer = family, tokenizer
        self.schedule = family.schedule(architecture.transformer)
        with torch.device("meta"):
            transformer = family.network(architecture.transformer)
        cast_layers(transformer, compute_dtype)
        encoders: list[tuple[nn.Module, list[Binding]]] = [build_text_encoder(shape) for shape in architecture.clips]
        for clip, _ in encoders:
            cast_layers(clip, compute_dtype)
        if (t5 := architecture.t5) is not None:
            tokenizer.need_t5()
            with torch.device("meta"):
                module = T5Encoder(t5)
            # T5's activations leave the range of fp16.
            cast_layers(module, torch.float32 if compute_dtype == torch.float16 else compute_dtype)
            encoders.append((module, _bindings(module, t5.prefix, {"shared.weight": f"{t5.embedding}.weight"})))
        blocks: BlockOffload | ShardedBlocks | None = None
        if peers is not None:
            blocks = ShardedBlocks(blocks_of(transformer), peers, device)
        elif offload_blocks > 0 and device.type == "cuda":
            blocks = BlockOffload(blocks_of(transformer), offload_blocks, device)
        super().__init__(
            tensors,
            architecture,
            info,
            device,
            compute_dtype,
            unet=(transformer, _bindings(transformer, TRANSFORMER)),
            vae=build_vae(architecture.own_vae),
            text_encoders=encoders,
            text_salt=self._text_salt(),
            reload=reload,
            blocks=blocks,
        )
        self.set_gradient_checkpointing(0)

    def _text_salt(self) -> str:
        """What, beside the text encoders' weights, decides on an encoding."""
        return f"t5 {self._tokenizer.length}"

    @abstractmethod
    def encode_prompts(
        self, captions: Sequence[str], max_tokens: int = 225, weighted: bool = False, rows: slice = slice(None)
    ) -> Conditioning: ...

    @abstractmethod
    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, time_ids: Tensor | None
    ) -> Tensor: ...

    def count_tokens(self, caption: str) -> int:
        """Tokens of the caption, without start and end token: by T5 where there is one."""
        return self._tokenizer.count(caption)

    def lora_targets(self) -> list[LoraTarget]:
        """Every layer that an adapter can attach to: the transformer's, then those of a CLIP that was not released."""
        return self.family.targets(self.unet, self.text_encoders[:1], self.architecture)

    def compilable(self) -> list[nn.Module]:
        return blocks_of(self.unet) if self.blocks is None else []

    def set_gradient_checkpointing(self, share: float) -> None:
        """Compute the first blocks of the transformer, this share, anew in the backward pass instead of keeping what is
        inside.

        It is always so with all of them where the weights that autograd would keep are elsewhere by then.
        """
        if self.blocks is not None:
            self.unet.run = partial(checkpoint, self._entered)
            return
        blocks = blocks_of(self.unet)
        first = set(blocks[: round(share * len(blocks))])
        self.unet.run = lambda block, *inputs: (checkpoint if block in first else directly)(block, *inputs)

    def _entered(self, block: nn.Module, *inputs: Tensor) -> Any:
        assert self.blocks is not None
        self.blocks.enter(block)
        return block(*inputs)


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """In the order in which they compute."""
    named = transformer.named_children()
    return [block for name, blocks in named if name.endswith("_blocks") for block in blocks.children()]


def plain(captions: Sequence[str], weighted: bool) -> list[str]:
    """The captions without their emphasis, which these text encoders do not know."""
    return ["".join(text for text, _ in parse_weights(one)) if weighted else one for one in captions]


def ends_of(ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Where the first end token of each row stands, as an index of (B, L, D)."""
    return torch.arange(len(ids), device=ids.device), (ids == end).int().argmax(dim=1)


def _bindings(module: nn.Module, prefix: str, other_names: Mapping[str, str] | None = None) -> list[Binding]:
    names = other_names or {}
    return [
        Binding(owner, name, shape, prefix + names.get(path, path))
        for owner, name, path, shape in parameters_of(module)
    ]
