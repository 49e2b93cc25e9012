"""Answers of a language model, of the bare base and with a LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import LoraFile, read_lora
from lora_trainer.config import TrainConfig
from lora_trainer.dataset.text.encoding import Encoder
from lora_trainer.dataset.text.rows import Message
from lora_trainer.dataset.text.templates import BOS, EOS
from lora_trainer.errors import UserError
from lora_trainer.models.families.causal_lm.model import LanguageModel
from lora_trainer.run.workloads.text import Texts, encoder_for
from lora_trainer.training.precision import resolve

_ENDS = (EOS, "<|im_end|>", "<|user|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|observation|>")
"""Tokens that end an answer; BOS begins the next conversation."""


@dataclass(frozen=True)
class Wish:
    """temperature: 0 takes the most probable token. schema: text of a JSON schema that the answer keeps to."""

    prompt: str
    max_tokens: int = 200
    temperature: float = 0.0
    schema: str | None = None


def answers(config: TrainConfig, adapter: Path | None, wish: Wish) -> Iterator[tuple[str, str]]:
    """("base", answer), and with ``adapter`` (its folder's name, answer).

    Raises:
        UserError: the model, the LoRA or the schema cannot be used.
    """
    lora = None if adapter is None else read_lora(adapter)
    encoder = encoder_for(config)
    guide = None if wish.schema is None else Guide(encoder.tokenizer, wish.schema)
    lender = Texts.file_lender(config, resolve(config.device, config.mixed_precision))
    with lender.borrow() as model, lender.turn(), torch.no_grad():
        yield "base", answer(model, encoder, wish, config.seed, guide)
        if lora is not None and adapter is not None:
            with attached(model, lora, config):
                yield adapter.name, answer(model, encoder, wish, config.seed, guide)


def attached(model: LanguageModel, lora: LoraFile, config: TrainConfig) -> AdapterSet:
    """A context manager, inside which the model has the LoRA. Raises UserError when it does not fit."""
    targets = model.lora_targets()
    matched, unmatched = lora.match(targets)
    if unmatched or not matched:
        raise UserError(
            f"{lora.path.name} does not fit {config.base_model}.", remedy="Choose the base it was made for."
        )
    ranks = {weights.rank for weights in matched.values()}
    layers = [target for target in targets if target.kohya_name in matched]
    settings = TrainConfig(lora_rank=max(rank or 1 for rank in ranks), target_modules=["attention", "feed_forward"])
    adapters = AdapterSet.build(layers, settings, model.device).eval()
    init_from(adapters, lora)
    return adapters


def answer(model: LanguageModel, encoder: Encoder, wish: Wish, seed: int, guide: Guide | None = None) -> str:
    """What the model writes behind the prompt, up to a token that ends an answer."""
    tokens = encoder.prompt([Message("user", wish.prompt)])
    ends = {encoder.special(name) for name in _ENDS} | {encoder.special(BOS)}
    generator = torch.Generator().manual_seed(seed)
    matcher = None if guide is None else guide.start()
    written: list[int] = []
    following, cache, past = torch.tensor([tokens], device=model.device), None, 0
    while len(written) < wish.max_tokens:
        logits, cache = model.next_logits(following, cache, past)
        past += following.shape[1]
        logits = logits.cpu()
        if matcher is not None:
            logits = matcher.masked(logits)
        token = _choose(logits, wish.temperature, generator)
        if token in ends:
            break
        written.append(token)
        if matcher is not None and matcher.ended(token):
            break
        following = torch.tensor([[token]], device=model.device)
    return encoder.tokenizer.decode(written, skip_special_tokens=True).strip()


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


class Guide:
    """Keeps an answer to a JSON schema, by the package llguidance."""

    def __init__(self, tokenizer: Any, schema: str):
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise UserError(
                "A JSON schema needs the package llguidance.", field="json_schema", remedy="pip install llguidance"
            ) from error
        try:
            json.loads(schema)
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer)
            self._grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
            self._matcher = llguidance.LLMatcher
        except Exception as error:  # its own kinds, for schemas and for tokenizers that it does not know
            raise UserError(f"The schema cannot be used: {error}", field="json_schema") from error
        self.start()

    def start(self) -> _Matcher:
        matcher = self._matcher(self._tokenizer, self._grammar)
        if reason := matcher.get_error():
            raise UserError(f"The schema cannot be used: {reason}", field="json_schema")
        return _Matcher(matcher)


class _Matcher:
    """One answer. The bit mask is applied here: llguidance's own way compiles a kernel, for minutes."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def masked(self, logits: Tensor) -> Tensor:
        """Logits (V) with -inf for every token that cannot come next."""
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[: len(bits)] = bits[: len(logits)]
        return logits.masked_fill(~allowed, -torch.inf)

    def ended(self, token: int) -> bool:
        """Takes a token; whether the answer is complete and nothing may follow."""
        self._matcher.consume_token(token)
        return self._matcher.is_stopped()
