"""Preview prompts with the flags that kohya's scripts and ai-toolkit know: ``a disc --w 768 --d 7 --n blurry``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lora_trainer.errors import UserError

_TRIGGER = re.compile(r"\[(?:trigger|name)\]", re.IGNORECASE)
_FLAG = re.compile(r"(?<![\w-])--([A-Za-z]\w*(?:-\w+)*)=?")
_NUMBERS: dict[str, tuple[str, Callable[[str], float], float, float]] = {
    "w": ("width", int, 64, 4096),
    "h": ("height", int, 64, 4096),
    "s": ("steps", int, 1, 1000),
    "d": ("seed", int, 0, 2**63 - 1),
    "l": ("cfg", float, 0, 100),
}
_SAME = {"seed": "d", "steps": "s", "cfg": "l"}  # ai-toolkit's longer names
_RANDOM = "d -1"
_NOT_HERE = {
    _RANDOM: "a preview has the run's seed",
    "n2": "all text encoders read one prompt",
    "p2": "all text encoders read one prompt",
    "m": "the LoRA has its full strength",
    "network_multiplier": "the LoRA has its full strength",
    "gr": "it is for renormalization",
    "rcfg": "it is for renormalization",
    "a": "it is for control pictures",
    "ctrl_img": "it is for control pictures",
    "ctrl_idx": "it is for control pictures",
    "ref": "refiners are not used",
    "ev": "pictures are learned without further values",
    "extra_values": "pictures are learned without further values",
    "frames": "it is for films",
    "num_frames": "it is for films",
    "fps": "it is for films",
    "ss": "the sampler is always the same",
    "g": "it is for guidance of distilled models",
    "cn": "it is for ControlNet",
    "ctr": "it is for control pictures",
    "ci": "it is for control pictures",
    "am": "it is for strengths of several LoRAs",
    "i": "it is for control pictures",
    "f": "it is for films",
    "fs": "it is for flow shift",
    "tr": "it is for renormalization",
    "nf": "it is for films",
}
"""Flags of the two that are read and have no meaning here."""
_KNOWN = {*_NUMBERS, *_NOT_HERE, "n"}


@dataclass(frozen=True)
class PreviewPrompt:
    """What is to be drawn; None where the prompt does not say. width and height in pixels. ignored: flags without a
    meaning here."""

    text: str
    negative: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int | None = None
    cfg: float | None = None
    ignored: tuple[str, ...] = ()


def parse_prompt(line: str) -> PreviewPrompt:
    """Raises UserError for a flag that does not exist, or whose value is none."""
    flags = _flags(line)
    ends = [match.start() for match in flags[1:]] + [len(line)]
    prompt = PreviewPrompt(line[: flags[0].start()].strip() if flags else line.strip())
    for match, end in zip(flags, ends):
        name, value = _name(match), line[match.end() : end].strip()
        if (name, value) == ("d", "-1"):
            name = _RANDOM
        if name == "n":
            prompt = replace(prompt, negative=value)
        elif name in _NUMBERS:
            field, kind, low, high = _NUMBERS[name]
            found: dict[str, Any] = {field: _number(line, name, value, kind, low, high)}
            prompt = replace(prompt, **found)
        elif name in _NOT_HERE:
            prompt = replace(prompt, ignored=(*prompt.ignored, name))
        else:
            known = ", ".join(f"--{flag}" for flag in (*_NUMBERS, "n"))
            message = f"{line!r} has a flag --{match[1]}, which does not exist."
            raise UserError(message, field="preview_prompts", remedy=f"There are {known}.")
    return prompt


def flag_names(line: str) -> set[str]:
    """The flags in a prompt by their short names: ``a disc --seed 5`` -> {"d"}."""
    return {_name(match) for match in _flags(line)}


def _flags(line: str) -> list[re.Match[str]]:
    """Inside <…>, and behind anything but a space or a comma, only a known flag with an end is one:
    ``(--very-happy)`` and ``<lora:a --x:1>`` are words."""
    return [
        match
        for match in _FLAG.finditer(line)
        if _stands_free(line, match.start())
        or (_name(match) in _KNOWN and (match[0].endswith("=") or not line[match.end() : match.end() + 1].strip()))
    ]


def _stands_free(line: str, start: int) -> bool:
    inside = line.rfind("<", 0, start) > line.rfind(">", 0, start) and line.find(">", start) >= 0
    return not inside and not line[max(start - 1, 0) : start].strip(",").strip()


def _name(match: re.Match[str]) -> str:
    name = match[1].lower()
    return _SAME.get(name, name)


def _number(line: str, name: str, value: str, kind: Callable[[str], float], low: float, high: float) -> float:
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        message = f"{line!r}: --{name} {value} is no number from {low} to {high}."
        raise UserError(message, field="preview_prompts", remedy="Correct it, or leave it out.")
    return number


def ignored_flags(lines: list[str]) -> list[str]:
    """A sentence for each flag in the prompts that is read and not obeyed."""
    flags = dict.fromkeys(flag for line in lines for flag in parse_prompt(line).ignored)
    return [f"preview_prompts: --{flag} has no effect ({_NOT_HERE[flag]})." for flag in flags]


def with_trigger(text: str, trigger_word: str) -> str:
    """The text with the trigger word in place of ``[trigger]``, as ai-toolkit's users write it."""
    return _TRIGGER.sub(lambda found: trigger_word, text) if trigger_word.strip() else text


def has_trigger(text: str) -> bool:
    """Whether ``[trigger]`` stands in the text."""
    return _TRIGGER.search(text) is not None
