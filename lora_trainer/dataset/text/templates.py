"""How a conversation is written for a model: pieces of text and special tokens, the answers marked as learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_trainer.dataset.text.rows import Message
from lora_trainer.errors import UserError

BOS, EOS = "<bos>", "<eos>"
"""Names of special tokens that each tokenizer calls otherwise."""


@dataclass(frozen=True)
class Piece:
    """special: the name of one token instead of a text; written out as text where the tokenizer has no such token.
    learned: part of an answer, or its end mark."""

    text: str
    learned: bool = False
    special: bool = False


Template = Callable[[Sequence[Message]], Iterator[Piece]]


def _token(name: str, learned: bool = False) -> Piece:
    return Piece(name, learned, special=True)


def _llama2(messages: Sequence[Message]) -> Iterator[Piece]:
    system, turns = _split(messages)
    prefix = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for message in turns:
        if message.role == "user":
            yield _token(BOS)
            yield Piece(f"[INST] {prefix}{message.text} [/INST]")
            prefix = ""
        else:
            yield Piece(message.text, learned=True)
            yield _token(EOS, learned=True)


def _chatml(messages: Sequence[Message]) -> Iterator[Piece]:
    for message in messages:
        answers = message.role == "assistant"
        yield _token("<|im_start|>")
        yield Piece(f"{message.role}\n")
        yield Piece(message.text, learned=answers)
        yield _token("<|im_end|>", learned=answers)
        yield Piece("\n")
    if messages[-1].role == "user":
        yield _token("<|im_start|>")
        yield Piece("assistant\n")


def _glm(messages: Sequence[Message], gap: str) -> Iterator[Piece]:
    """An answer ends where the next turn of the user begins, whose mark is therefore learned."""
    yield _token("[gMASK]")
    yield _token("<sop>" if gap == "\n" else "sop")
    marked = False
    for message in messages:
        if not marked:
            yield _token(f"<|{message.role}|>")
        answers = message.role == "assistant"
        yield Piece(gap)
        yield Piece(message.text, learned=answers)
        marked = answers
        if answers:
            yield _token("<|user|>", learned=True)
    if messages[-1].role == "user":
        yield _token("<|assistant|>")
        yield Piece(gap)


def _glm4(messages: Sequence[Message]) -> Iterator[Piece]:
    return _glm(messages, "\n")


def _chatglm3(messages: Sequence[Message]) -> Iterator[Piece]:
    return _glm(messages, "\n ")


_ALPACA = "Below is an instruction that describes a task"


def _alpaca(messages: Sequence[Message]) -> Iterator[Piece]:
    system, turns = _split(messages)
    yield _token(BOS)
    for place, message in enumerate(turns):
        if message.role == "user":
            given = f"### Input:\n{message.extra}\n\n" if message.extra else ""
            pair = ", paired with an input that provides further context" if message.extra else ""
            usual = f"{_ALPACA}{pair}. Write a response that appropriately completes the request."
            first = f"{system or usual}\n\n" if place == 0 else "\n\n"
            yield Piece(f"{first}### Instruction:\n{message.content}\n\n{given}### Response:\n")
        else:
            yield Piece(message.text, learned=True)
            yield _token(EOS, learned=True)


def _plain(messages: Sequence[Message]) -> Iterator[Piece]:
    system, turns = _split(messages)
    yield _token(BOS)
    if system:
        yield Piece(f"{system}\n\n")
    for message in turns:
        if message.role == "user":
            yield Piece(f"{message.text}\n")
        else:
            yield Piece(message.text, learned=True)
            yield _token(EOS, learned=True)


TEMPLATES: dict[str, Template] = {
    "llama2": _llama2,
    "chatml": _chatml,
    "glm4": _glm4,
    "chatglm3": _chatglm3,
    "alpaca": _alpaca,
    "plain": _plain,
}
_MARKS = (("[gMASK]<sop>", "glm4"), ("<|im_start|>", "chatml"), ("[INST]", "llama2"))


def choose_template(wanted: str, tokenizer: Any, usual: str) -> tuple[str, Template]:
    """The template that is meant by ``chat_template``, with its name. ``usual``: that of the model's family.

    Raises:
        UserError: the tokenizer's own is asked for and there is none that this transformers can use.
    """
    own = getattr(tokenizer, "chat_template", None) or getattr(tokenizer, "init_kwargs", {}).get("chat_template")
    usable = bool(own) and hasattr(tokenizer, "apply_chat_template")
    if wanted == "own" and not usable:
        raise UserError(
            "The model's own template needs transformers 4.34." if own else "The model has no template of its own.",
            field="chat_template",
            remedy=f"Choose one of {', '.join(TEMPLATES)}.",
        )
    if wanted == "own" or (wanted == "auto" and usable):
        return "own", own_template(tokenizer)
    if wanted == "auto":
        wanted = next((name for mark, name in _MARKS if isinstance(own, str) and mark in own), usual)
    return wanted, TEMPLATES[wanted]


def own_template(tokenizer: Any) -> Template:
    """The template in the tokenizer's folder. What it writes for an answer, its end mark included, is learned."""

    def render(messages: Sequence[Message], asks: bool) -> str:
        given = [{"role": message.role, "content": message.text} for message in messages]
        try:
            return tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=asks)
        except Exception as error:  # jinja's own, or what the template itself raises
            raise UserError(
                f"The model's own template refuses a conversation: {error}.",
                field="chat_template",
                remedy="Choose another one, such as plain; some know no system prompt.",
            ) from error

    def pieces(messages: Sequence[Message]) -> Iterator[Piece]:
        done = ""
        for end, message in enumerate(messages, 1):
            if message.role != "assistant":
                continue
            asked, answered = render(messages[: end - 1], True), render(messages[:end], False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise UserError(
                    "The model's own template writes an answer otherwise than it asks for it.",
                    field="chat_template",
                    remedy=f"Choose one of {', '.join(TEMPLATES)}.",
                )
            yield Piece(asked[len(done) :])
            answer = answered[len(asked) :]
            yield Piece(answer.rstrip(), learned=True)
            yield Piece(answer[len(answer.rstrip()) :])
            done = answered
        if messages[-1].role != "assistant":
            yield Piece(render(messages, True)[len(done) :])

    return pieces


def _split(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    """The system prompt, and the turns behind it."""
    return (messages[0].text, messages[1:]) if messages[0].role == "system" else ("", messages)
