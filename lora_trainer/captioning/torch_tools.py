"""What the captioners on torch share: loading from a folder and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError
from lora_trainer.out_of_memory import is_out_of_memory


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
            f"{folder.name} cannot be loaded as {kind.__name__}: {reason}", field="weights",
            remedy="Fetch its files again; a download may have been cut off.",
        ) from error  # fmt: skip
