"""Captions to chunks of tokens, as the WebUI cuts and weighs them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_trainer.models.tokenizer import Tokenizer

CHUNK = 75  # tokens between the start and the end token
COMMA_BACKTRACK = 20  # a chunk ends at a comma when there is one this near its end (the WebUI's default)


@dataclass(frozen=True)
class Chunk:
    """At most 75 tokens and their weights."""

    tokens: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def chunks_of(caption: str, tokenizer: Tokenizer, max_tokens: int, weighted: bool = False) -> list[Chunk]:
    """Cut a caption into at least one and at most ``max_tokens // 75`` chunks; what does not fit is left out."""
    chunks: list[Chunk] = []
    tokens: list[int] = []
    weights: list[float] = []
    after_comma = 0  # how many tokens of the open chunk end with its last comma

    def close(keep: int) -> None:
        nonlocal tokens, weights, after_comma
        chunks.append(Chunk(tuple(tokens[:keep]), tuple(weights[:keep])))
        tokens, weights, after_comma = tokens[keep:], weights[keep:], 0

    for text, weight in parse_weights(caption) if weighted else [(caption, 1.0)]:
        for token in tokenizer.ids(text):
            if token == tokenizer.comma and len(tokens) < CHUNK:
                after_comma = len(tokens) + 1
            elif len(tokens) == CHUNK and after_comma and CHUNK - after_comma <= COMMA_BACKTRACK:
                close(after_comma)
            if len(tokens) == CHUNK:
                close(CHUNK)
            tokens.append(token)
            weights.append(weight)
    if tokens or not chunks:
        close(len(tokens))
    return chunks[: max(1, max_tokens // CHUNK)]


def token_ids(chunks: Sequence[Chunk], tokenizer: Tokenizer, pad: int) -> Tensor:
    """(N, 77) int64: start token, the chunk, end token, then ``pad``."""
    rows = []
    for chunk in chunks:
        row = [tokenizer.bos, *chunk.tokens, tokenizer.eos]
        rows.append(row + [pad] * (CHUNK + 2 - len(row)))
    return torch.tensor(rows, dtype=torch.int64)


def token_weights(chunks: Sequence[Chunk]) -> Tensor:
    """(N, 77) fp32; start, end and padding count 1."""
    return torch.tensor([[1.0, *c.weights, *[1.0] * (CHUNK + 1 - len(c.weights))] for c in chunks])


def weigh(hidden: Tensor, weights: Tensor) -> Tensor:
    """Multiply each token's encoding by its weight and restore the mean of each chunk.

    hidden: (N, 77, D); weights: (N, 77). This is the WebUI's emphasis mode "Original", with the mean taken for each
    chunk by itself, so that a caption's encoding does not depend on its batch.
    """
    if bool((weights == 1).all()):
        return hidden
    weighted = hidden * weights.to(hidden).unsqueeze(-1)
    return weighted * (hidden.mean((1, 2), keepdim=True) / weighted.mean((1, 2), keepdim=True))


_MARKS = re.compile(r"\\[()\[\]\\]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[()\[\]]")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Read the WebUI's emphasis: (a) ×1.1, [a] ÷1.1, (a:1.3) ×1.3, nested; a backslash keeps a bracket as text."""
    pieces: list[list] = []
    round_open: list[int] = []
    square_open: list[int] = []

    def multiply(first: int, factor: float) -> None:
        for piece in pieces[first:]:
            piece[1] *= factor

    position = 0
    for match in _MARKS.finditer(prompt):
        if match.start() > position:
            pieces.append([prompt[position : match.start()], 1.0])
        position, mark = match.end(), match.group()
        if mark.startswith("\\"):
            pieces.append([mark[1:], 1.0])
        elif mark == "(":
            round_open.append(len(pieces))
        elif mark == "[":
            square_open.append(len(pieces))
        elif mark == "]" and square_open:
            multiply(square_open.pop(), 1 / 1.1)
        elif mark.endswith(")") and round_open:
            multiply(round_open.pop(), float(match[1]) if match[1] else 1.1)
        else:
            pieces.append([mark, 1.0])
    if position < len(prompt):
        pieces.append([prompt[position:], 1.0])
    # Brackets that were never closed count as well, as in the WebUI.
    for first in round_open:
        multiply(first, 1.1)
    for first in square_open:
        multiply(first, 1 / 1.1)
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged or [("", 1.0)]
