"""Describing many pictures: in batches, with half as many at once when memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from PIL import Image

from lora_trainer.captioning.base import Captioner, Description
from lora_trainer.errors import UserError
from lora_trainer.out_of_memory import is_out_of_memory, release_memory

Key = TypeVar("Key")


def describe_all(
    captioner: Captioner,
    keys: Sequence[Key],
    load: Callable[[Key], Image.Image | None],
    *,
    batch_size: int = 8,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    on_smaller: Callable[[int], None] = lambda size: None,
) -> Iterator[tuple[list[Key], list[Description]]]:
    """Batch after batch: (keys, their descriptions), in order. Whoever stops iterating cancels the rest.

    load: a picture, or None for one that is to be left out; called outside the turns.
    turn: entered around each batch. on_smaller: told the new size when memory was short.

    Raises:
        UserError: memory is short for a single picture.
    """
    position = 0
    while position < len(keys):
        taken = keys[position : position + batch_size]
        loaded = [(key, image) for key in taken if (image := load(key)) is not None]
        start = 0
        while start < len(loaded):
            some = loaded[start : start + batch_size]
            found = _try(captioner, [image for _, image in some], turn)
            if found is None:
                if len(some) == 1:
                    raise UserError(
                        "There is not enough memory to describe a single picture.", field="device",
                        remedy="Close what else uses the GPU, or caption on the CPU (--device cpu).",
                    )  # fmt: skip
                batch_size = max(1, len(some) // 2)
                on_smaller(batch_size)
                continue
            yield [key for key, _ in some], found
            start += len(some)
        position += len(taken)


def _try(
    captioner: Captioner, images: Sequence[Image.Image], turn: Callable[[], AbstractContextManager[None]]
) -> list[Description] | None:
    """The descriptions; None when memory was short. The error is gone when this returns, and with its traceback the
    tensors that it kept alive."""
    with turn():
        try:
            return captioner.describe(images)
        except Exception as error:  # torch, onnxruntime and Python each have their own for it
            if not is_out_of_memory(error):
                raise
        release_memory()
    return None
