"""The encoder of T5 v1.1 (Raffel et al. 2020; Shazeer 2020, "GLU Variants"), frozen.

transformers' own casts activations to the number format of the weights in some layers, which no fp8 or GGUF file
survives.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_trainer.models.families.flow.architecture import T5Shape
from lora_trainer.models.families.flow.network import RMSNorm

MAX_DISTANCE = 128


class Attention(nn.Module):
    def __init__(self, shape: T5Shape, positions: bool):
        super().__init__()
        self.heads = shape.heads
        self.q, self.k, self.v = (nn.Linear(shape.width, shape.inner, bias=False) for _ in range(3))
        self.o = nn.Linear(shape.inner, shape.width, bias=False)
        if positions:
            self.relative_attention_bias = nn.Embedding(shape.buckets, shape.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        # T5 does not divide by √d.
        scores = (q @ k.transpose(-1, -2)).float() + bias
        return self.o((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def bias(self, length: int) -> Tensor:
        """(1, H, L, L) fp32, by the distance of two tokens."""
        weight = self.relative_attention_bias.weight
        table = self.relative_attention_bias(_buckets(length, weight.shape[0]).to(weight.device))
        return table.float().permute(2, 0, 1)[None]


class FeedForward(nn.Module):
    def __init__(self, shape: T5Shape):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.wo = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class AttentionLayer(nn.Module):
    def __init__(self, shape: T5Shape, positions: bool):
        super().__init__()
        self.layer_norm, self.SelfAttention = RMSNorm(shape.width), Attention(shape, positions)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class FeedForwardLayer(nn.Module):
    def __init__(self, shape: T5Shape):
        super().__init__()
        self.layer_norm, self.DenseReluDense = RMSNorm(shape.width), FeedForward(shape)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, shape: T5Shape, positions: bool):
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(shape, positions), FeedForwardLayer(shape)])


class Stack(nn.Module):
    def __init__(self, shape: T5Shape):
        super().__init__()
        self.block = nn.ModuleList(Block(shape, positions=index == 0) for index in range(shape.layers))
        self.final_layer_norm = RMSNorm(shape.width)


class T5Encoder(nn.Module):
    """Token ids (B, L) -> (B, L, D), without a mask; its parameters have transformers' names."""

    def __init__(self, shape: T5Shape):
        super().__init__()
        self.shared, self.encoder = nn.Embedding(shape.vocabulary, shape.width), Stack(shape)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.shared(ids)
        bias = self.encoder.block[0].layer[0].SelfAttention.bias(ids.shape[1])
        for block in self.encoder.block:
            for layer in block.layer:
                x = layer(x, bias)
        return self.encoder.final_layer_norm(x)


def _buckets(length: int, count: int) -> Tensor:
    """(L, L) int64: the bucket of the distance from each token (row) to each other; half of them look back, half ahead,
    exact up to a quarter of ``count``, then logarithmic up to ``MAX_DISTANCE``."""
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]
    half = count // 2
    exact = half // 2
    far = distance.abs()
    logarithmic = exact + (
        torch.log(far.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    ).to(torch.int64)
    return (distance > 0).long() * half + torch.where(far < exact, far, logarithmic.clamp(max=half - 1))
