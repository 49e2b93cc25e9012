"""The tokenizers of flow models: CLIP's, and T5's from a tokenizer.json."""

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
           ("stabilityai/stable-diffusion-3-medium-diffusers", "tokenizer_3/tokenizer.json"),
           ("stabilityai/stable-diffusion-3.5-medium", "tokenizer_3/tokenizer.json"),
           ("stabilityai/stable-diffusion-3.5-large", "tokenizer_3/tokenizer.json"),
           ("google/t5-v1_1-xxl", "tokenizer.json"))  # fmt: skip


@dataclass(frozen=True)
class FlowTokenizer:
    """Of the text encoders, and what a WebUI does with their tokens.

    clip: see ``Tokenizer``. t5: path of T5's tokenizer.json, which is read when there is text to read, or its content;
    None where no T5 reads. length: tokens that T5's prompts are filled up to; None for as many as CLIP reads.
    hidden: which of CLIP's hidden states is read as the text's encoding. zero_empty: the transformer reads zeros for
    the empty caption.
    """

    clip: Tokenizer
    t5: Path | str | None
    length: int | None = LENGTH
    hidden: int = -2
    zero_empty: bool = False

    @cached_property
    def _t5(self) -> Any:
        from tokenizers import Tokenizer as FastTokenizer

        if self.t5 is None:
            raise UserError(
                "T5's tokenizer was not found on this machine.",
                field="text_encoders",
                remedy="Put tokenizer.json of the model's folder for T5 (tokenizer_2 of FLUX.1, tokenizer_3 of Stable "
                "Diffusion 3) beside the file of T5.",
            )
        try:
            is_file = isinstance(self.t5, Path)
            tokenizer = FastTokenizer.from_file(str(self.t5)) if is_file else FastTokenizer.from_str(self.t5)
        except Exception as error:  # the library raises plain Exception
            where = self.t5 if isinstance(self.t5, Path) else "the WebUI"
            raise UserError(f"The tokenizer in {where} cannot be read: {error}.") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def need_t5(self) -> None:
        """Raises UserError where T5's tokenizer is not there."""
        assert self._t5

    def count(self, text: str) -> int:
        """Tokens of a text by T5, without the end token."""
        return len(self._t5.encode(text, add_special_tokens=False).ids)

    def t5_ids(self, texts: Sequence[str], max_tokens: int, length: int) -> Tensor:
        """(B, length) int64: at most ``max_tokens`` tokens, the end token, then padding."""
        pad = self._t5.token_to_id("<pad>")
        rows = [self.t5_tokens(text, min(max_tokens, length - 1)) for text in texts]
        return torch.tensor([row + [pad] * (length - len(row)) for row in rows], dtype=torch.int64)

    def t5_tokens(self, text: str, max_tokens: int) -> list[int]:
        """At most ``max_tokens`` of a text, and the end token."""
        return [*self._t5.encode(text, add_special_tokens=False).ids[:max_tokens], self._t5.token_to_id("</s>")]


def load_tokenizers(folders: Iterable[Path]) -> FlowTokenizer:
    """CLIP's vocabulary as for Stable Diffusion; T5's from the first of ``folders`` with a tokenizer.json, or from the
    local cache of Hugging Face. Whoever reads with a T5 whose tokenizer was not found gets a UserError."""
    folders = list(folders)
    return FlowTokenizer(load_tokenizer(folders), t5_tokenizer(folders))


def t5_tokenizer(folders: Sequence[Path]) -> Path | None:
    """The first tokenizer.json in ``folders`` that is T5's, or in the local cache of Hugging Face."""
    for folder in folders:
        # A model's folder has T5's under the highest number, and is asked before its folder "tokenizer".
        roots = (folder.parent, folder) if folder.name == "tokenizer" else (folder,)
        numbered = [root / name for root in roots for name in ("tokenizer_3", "tokenizer_2", "t5xxl")]
        for place in (*numbered, folder):
            if _is_t5(place / "tokenizer.json"):
                return place / "tokenizer.json"
    from huggingface_hub import try_to_load_from_cache

    for repository, name in _CACHED:
        if isinstance(found := try_to_load_from_cache(repository, name), str):
            return Path(found)
    return None


def _is_t5(file: Path) -> bool:
    """Whether it is a tokenizer with T5's end and padding, which CLIP's has not."""
    try:
        content = file.read_bytes()
    except OSError:  # not there, mostly
        return False
    return b'"</s>"' in content and b'"<pad>"' in content
