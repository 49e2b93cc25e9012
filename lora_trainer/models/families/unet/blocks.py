"""diffusers' blocks without the work that changes nothing: divisions by one, an activation made in every block anew.

The same numbers, bit for bit, with fewer passes over them and less kept for the backward pass. Only the class of a
module changes, and only of one that is configured as Stable Diffusion's are; every other is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_trainer.devices import is_compiling


def slim(module: nn.Module) -> None:
    """Give the blocks under ``module`` the shorter computations below. Adapters may be attached before or after."""
    for part in module.modules():
        for base, replacement, fits in _REPLACEMENTS:
            if type(part) is base and fits(part):
                part.__class__ = replacement
                break
    if getattr(module, "time_embed_act", 0) is None and _all_resnets_are_slim(module):
        module.time_embed_act = nn.SiLU()  # once, instead of in every resnet
        for part in module.modules():
            if isinstance(part, SlimResnet):
                part.skip_time_act = True


def recomputable(unet: nn.Module) -> list[nn.Module]:
    """The parts that gradient checkpointing computes anew, those first that give back most memory for their time.

    Transformer blocks come before resnets, and larger pictures before smaller ones: counted at full size (``python -m
    tests.benchmarks.count_step``), a transformer block of SD 1 frees 131 MiB for each millisecond of a 4090 at 64x64,
    73 at 16x16; a resnet 72 and 20.
    """
    down, up = list(unet.down_blocks), list(unet.up_blocks)
    levels = [*enumerate(down), (len(down) - 1, unet.mid_block), *zip(reversed(range(len(up))), up)]
    return [
        part
        for kind in (BasicTransformerBlock, ResnetBlock2D)
        for _, block in sorted(levels, key=lambda one: one[0])
        for part in block.modules()
        if isinstance(part, kind)
    ]


def _all_resnets_are_slim(module: nn.Module) -> bool:
    return all(isinstance(part, SlimResnet) for part in module.modules() if hasattr(part, "time_emb_proj"))


class SlimResnet(ResnetBlock2D):
    def forward(self, x: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            temb = temb if self.skip_time_act else functional.silu(temb)
            hidden = hidden + self.time_emb_proj(temb)[:, :, None, None]
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        # The first operand's layout in memory is the sum's; an adapted shortcut gives another.
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def _resnet_fits(block: ResnetBlock2D) -> bool:
    return (
        block.time_embedding_norm == "default"
        and block.output_scale_factor == 1
        and block.upsample is None
        and block.downsample is None
        and block.dropout.p == 0
        and isinstance(block.nonlinearity, nn.SiLU)
    )


class SlimTransformer(Transformer2DModel):
    """Between picture (B, C, h, w) and tokens (B, h·w, C) nothing is copied: each is a view of the other."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        if return_dict or any(value is not None for value in kwargs.values()):
            return super().forward(hidden_states, encoder_hidden_states, return_dict=return_dict, **kwargs)
        sides, x = hidden_states.shape[2:], self.norm(hidden_states)
        tokens = self.proj_in(_tokens(x)) if self.use_linear_projection else _tokens(self.proj_in(x))
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
        if self.use_linear_projection:
            return (hidden_states + _picture(self.proj_out(tokens), sides),)
        return (hidden_states + self.proj_out(_picture(tokens, sides)),)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _picture(tokens: Tensor, sides: Sequence[int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, tuple(sides))


def _transformer_fits(block: Transformer2DModel) -> bool:
    return block.is_input_continuous


class SlimAttention(Attention):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None or kwargs or type(self.processor) is not AttnProcessor2_0:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if encoder_hidden_states is None:
            query, key, value = project((self.to_q, self.to_k, self.to_v), hidden_states)
        else:
            query = self.to_q(hidden_states)
            key, value = project((self.to_k, self.to_v), encoder_hidden_states)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value)  # (B, heads, tokens, width)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


def _attention_fits(block: Attention) -> bool:
    absent = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
    return (
        all(getattr(block, name, None) is None for name in absent)
        and not block.residual_connection
        and block.rescale_output_factor == 1
        and not block.only_cross_attention
        and len(block.to_out) == 2
        and block.to_out[1].p == 0
    )


def project(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """The output of each layer for ``x``.

    What computes several layers on one input at once (adapters can) stands as ``joint`` on the first of them:
    ``joint.layers`` says which, and ``joint(x)`` gives the outputs.
    """
    joint = vars(layers[0]).get("joint")
    if joint is not None and joint.layers == layers:
        return joint(x)
    return [layer(x) for layer in layers]


class SlimGEGLU(GEGLU):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self.proj(hidden_states)
        if is_compiling():  # the compiler chooses what to make again for the backward pass
            hidden, gate = x.chunk(2, dim=-1)
            return hidden * functional.gelu(gate)
        return _Gated.apply(x)


class _Gated(torch.autograd.Function):
    """(…, 2·n) -> (…, n): the first half times the gelu of the second, which is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * functional.gelu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        hidden, gate = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_hidden, grad_gate = grad_x.chunk(2, dim=-1)
        torch.mul(grad, functional.gelu(gate), out=grad_hidden)
        torch.ops.aten.gelu_backward.grad_input(grad * hidden, gate, grad_input=grad_gate)
        return grad_x


_REPLACEMENTS = (
    (ResnetBlock2D, SlimResnet, _resnet_fits),
    (Transformer2DModel, SlimTransformer, _transformer_fits),
    (Attention, SlimAttention, _attention_fits),
    (GEGLU, SlimGEGLU, lambda block: True),
)
