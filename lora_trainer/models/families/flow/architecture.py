"""What the T5 of a flow model is made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class T5Shape:
    """The encoder of a T5 v1.1. inner: channels of all heads. buckets: of relative positions."""

    prefix: str
    width: int
    layers: int
    inner: int
    heads: int
    hidden: int
    vocabulary: int
    buckets: int
