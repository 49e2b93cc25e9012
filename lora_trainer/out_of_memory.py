"""Recognizing that memory was short, and freeing it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import TypeVar

from lora_trainer.errors import RankFailedError, UserError

Value = TypeVar("Value")

# torch, its allocators, the libraries below it and onnxruntime each have their own words, often in a plain
# RuntimeError. Without room for its workspace cuDNN reports an internal error or that no algorithm fits.
_TEXTS = (
    "out of memory",
    "outofmemory",
    "not enough memory",
    "failed to allocate memory",
    "can't allocate memory",
    "bad allocation",
    "status_alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_internal_error",
    "cudnn_status_not_initialized",
    "unable to find a valid cudnn algorithm",
    "cudaerrormemoryallocation",
)


class OutOfMemoryError(Exception):
    """Memory does not suffice, even after it was freed. Refers to no tensors, unlike the error that it stands for."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, whoever raised it: torch, CUDA's libraries, HIP, onnxruntime, Python.

    ``OutOfMemoryError`` of torch is recognized by its name: it is no class of its own in every release.
    """
    if isinstance(error, (UserError, RankFailedError)):  # they may quote such words
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return any(words in text for words in _TEXTS)


def release_memory() -> None:
    """Give cached device memory back to the driver.

    To be called after the ``except`` block that handled the error: inside, the error's traceback keeps the tensors of
    the failed computation alive.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def with_room(compute: Callable[[], Value], make_room: Callable[[], None]) -> Value:
    """``compute()``; where memory is short, once more after ``make_room()`` and after the cache was emptied.

    Raises:
        OutOfMemoryError: memory is short the second time as well.
    """
    reason = ""
    for _ in range(2):
        try:
            return compute()
        except Exception as error:  # each library has an exception of its own for it
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        make_room()
        release_memory()
    raise OutOfMemoryError(reason)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
