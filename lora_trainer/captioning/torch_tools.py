"""What the captioners on torch share: loading from a folder and nothing else, and giving memory back."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError


def load_pretrained(kind: Any, folder: Path) -> Any:
    """``kind.from_pretrained`` on a local folder; never touches the network.

    Raises:
        UserError: the files are damaged or do not belong together.
    """
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes transformers, tokenizers or safetensors raise
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder} cannot be loaded as {kind.__name__}: {reason}", field="weights",
            remedy="Fetch its files again; a download may have been cut off.",
        ) from error  # fmt: skip


def free_memory() -> None:
    """Give cached device memory back to the driver, for whoever needs it next."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, whoever raised it: torch, onnxruntime, Python."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    short = ("out of memory", "failed to allocate memory", "not enough memory", "bad allocation")
    return any(words in text for words in short)
