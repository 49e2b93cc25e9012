"""Conversations as tokens, with the learned ones marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lora_trainer.dataset.text.rows import Message, Row
from lora_trainer.dataset.text.templates import BOS, EOS, Piece, Template
from lora_trainer.errors import UserError


@dataclass(frozen=True)
class EncodedRow:
    """tokens, learned: of equal length. cut: how many tokens were left out at the end."""

    row: Row
    tokens: tuple[int, ...]
    learned: tuple[bool, ...]
    cut: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


class Encoder:
    """Writes conversations by a template and encodes them.

    Neighbouring texts of one kind are encoded together, and prompt and answer apart: so are they when the model writes,
    where the prompt is all there is.

    system_prompt: of the conversations that have none.
    """

    def __init__(self, tokenizer: Any, template: Template, max_length: int, system_prompt: str = ""):
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.system_prompt = system_prompt
        self._specials: dict[str, int | None] = {}

    def encode(self, row: Row) -> EncodedRow:
        tokens, learned = self._encoded(row.messages)
        if tokens:  # nothing predicts the first token
            learned[0] = False
        end = self.max_length
        return EncodedRow(row, tuple(tokens[:end]), tuple(learned[:end]), max(0, len(tokens) - end))

    def segments(self, encoded: EncodedRow) -> list[tuple[str, bool]]:
        """What the model sees as text, special tokens included, in pieces that are learned or not."""
        found = []
        for learned, pieces in groupby(zip(encoded.tokens, encoded.learned), lambda one: one[1]):
            tokens = [token for token, _ in pieces]
            found.append((self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False), learned))
        return found

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What the model reads before it answers the last message."""
        return self._encoded(messages)[0]

    def _encoded(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        if self.system_prompt and messages[0].role != "system":
            messages = [Message("system", self.system_prompt), *messages]
        tokens: list[int] = []
        learned: list[bool] = []
        pieces = [piece for piece in self.template(messages) if piece.text and self._is_there(piece)]
        for (is_learned, token), group in groupby(pieces, self._kind):
            texts = [piece.text for piece in group]
            ids = self._ids("".join(texts)) if token is None else [token] * len(texts)
            tokens += ids
            learned += [is_learned] * len(ids)
        return tokens, learned

    def _is_there(self, piece: Piece) -> bool:
        if piece.text == EOS and piece.special and self.special(EOS) is None:
            raise UserError(
                "The tokenizer has no token that ends an answer.",
                field="chat_template",
                remedy="Choose chatml, or name one in tokenizer_config.json as eos_token.",
            )
        return not (piece.special and piece.text == BOS and self.special(BOS) is None)

    def _kind(self, piece: Piece) -> tuple[bool, int | None]:
        return piece.learned, self.special(piece.text) if piece.special else None

    def special(self, name: str) -> int | None:
        """The id of a special token; None where the tokenizer has no such token."""
        if name not in self._specials:
            self._specials[name] = self._look_up(name)
        return self._specials[name]

    def _look_up(self, name: str) -> int | None:
        tokenizer = self.tokenizer
        if name in (BOS, EOS):
            return tokenizer.bos_token_id if name == BOS else tokenizer.eos_token_id
        if hasattr(tokenizer, "get_command"):  # ChatGLM2's and 3's
            try:
                return int(tokenizer.get_command(name))
            except (KeyError, AssertionError):
                return None
        known = tokenizer.get_vocab()
        return known.get(name)

    def _ids(self, text: str) -> list[int]:
        if getattr(self.tokenizer, "is_fast", False):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        # Not called: ChatGLM's own tokenizer fails there since transformers 4.45.
        return list(self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(text)))
