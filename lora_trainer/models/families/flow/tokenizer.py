"""The tokenizers of FLUX.1: CLIP's, and T5's from a tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_trainer.errors import UserError
from lora_trainer.models.tokenizer import Tokenizer, load_tokenizer

LENGTH = 256
"""Tokens that WebUIs fill T5's prompts up to."""
_CACHED = (("black-forest-labs/FLUX.1-dev", "tokenizer_2/tokenizer.json"),
           ("black-forest-labs/FLUX.1-schnell", "tokenizer_2/tokenizer.json"),
           ("google/t5-v1_1-xxl", "tokenizer.json"))  # fmt: skip


@dataclass(frozen=True)
class FlowTokenizer:
    """clip: see ``Tokenizer``. t5: path of T5's tokenizer.json, which is read when there is text to read."""

    clip: Tokenizer
    t5: Path
    length: int = LENGTH

    @cached_property
    def _t5(self) -> Any:
        from tokenizers import Tokenizer as FastTokenizer

        try:
            tokenizer = FastTokenizer.from_file(str(self.t5))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"The tokenizer in {self.t5} cannot be read: {error}.") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def count(self, text: str) -> int:
        """Tokens of a text by T5, without the end token."""
        return len(self._t5.encode(text, add_special_tokens=False).ids)

    def t5_ids(self, texts: Sequence[str], max_tokens: int) -> Tensor:
        """(B, 256) int64: at most ``max_tokens`` tokens, the end token, then padding."""
        end, pad = self._t5.token_to_id("</s>"), self._t5.token_to_id("<pad>")
        rows = []
        for text in texts:
            ids = [*self._t5.encode(text, add_special_tokens=False).ids[: min(max_tokens, self.length - 1)], end]
            rows.append(ids + [pad] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64)


def load_tokenizers(folders: Iterable[Path]) -> FlowTokenizer:
    """CLIP's vocabulary as for Stable Diffusion; T5's from the first of ``folders`` with a tokenizer.json, or from the
    local cache of Hugging Face.

    Raises:
        UserError: there is none; says where to put it.
    """
    folders = list(folders)
    for folder in folders:
        for place in (folder, folder / "tokenizer_2", folder / "t5xxl"):
            if (place / "tokenizer.json").is_file() and not (place / "merges.txt").is_file():
                return FlowTokenizer(load_tokenizer(folders), place / "tokenizer.json")
    from huggingface_hub import try_to_load_from_cache

    for repository, name in _CACHED:
        if isinstance(found := try_to_load_from_cache(repository, name), str):
            return FlowTokenizer(load_tokenizer(folders), Path(found))
    raise UserError(
        "T5's tokenizer was not found on this machine.",
        field="text_encoders",
        remedy="Put tokenizer.json of FLUX.1's folder tokenizer_2 beside the file of T5.",
    )
