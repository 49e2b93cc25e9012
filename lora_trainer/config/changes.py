"""The settings of LoRAs that learn a change: from words, from pairs of pictures, or from two folders of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_trainer.config.facts import setting

PLACE = "{}"
"""Where a prompt stands in a template."""


def filled(template: str, prompt: str) -> str:
    """The template with the prompt in its place. Of an empty prompt, which erases, nothing stays: where the rest of the
    template was the target, the demo's base went on drawing what was to be erased."""
    return template.replace(PLACE, prompt) if prompt else ""


@dataclass(frozen=True)
class ChangeSettings:
    original_prompt: str = setting("", task="words", given_by="steps")
    """What is changed, as a prompt: with the LoRA, the model answers it as it answered target_prompt without it."""

    target_prompt: str = setting("", task="words", given_by="steps")
    """What it becomes. Empty erases it; with a positive or negative prompt, empty means the original prompt."""

    positive_prompt: str = setting("", task="words", given_by="steps")
    """What there is to be more of at weight 1, such as "an old person"; for sliders."""

    negative_prompt: str = setting("", task="words", given_by="steps")
    """What there is to be less of at weight 1, such as "a young person"; for sliders."""

    guidance: float = setting(1.0, task="words", minimum=0, maximum=30)
    """How strongly the difference between the positive and the negative prompt is added to the target. Without these,
    how far the way from the original to the target prompt is gone: 1 to the target, 2 as far beyond it."""

    both_ways: bool = setting(False, task="words")
    """Every second step teaches the opposite at weight -1: the target becomes the original, or less of the positive and
    more of the negative prompt."""

    protected_prompts: list[str] = setting([], task="words", separator="\n", given_by="steps")
    """Prompts whose pictures are to stay as they are, one a line. Where the model is drawn with a negative prompt, the
    empty prompt is one of them, unless it is what changes."""

    protected_batches: int = setting(1, task="words", minimum=1, maximum=16)
    """How many batches of the protected prompts each step has beside one of the change; no more than there are such
    prompts. More keep them better, and take longer: with 3 a step takes twice the time of 1."""

    prompt_templates: list[str] = setting([], task="words", separator="\n")
    """Whole prompts in which the prompts above stand where they have {}, one a line, such as "a photo of {} in a park".
    Each picture of a step draws one. Empty uses the prompts alone."""

    denoised_steps: int = setting(0, task="words", minimum=0, maximum=50)
    """Learn on partly denoised pictures of the original prompt, by a sampler with so many steps, as it is with the LoRA
    so far: several times slower. 0 learns on noise."""

    pair_method: Literal["alternating", "copier"] = setting("alternating", task="pair")
    """How the change of a pair is learned. alternating: at weight 0.25 from the first to the second picture, at
    -0.25 back, a few dozen steps. copier: one LoRA memorises the first picture, another learns the second on top."""

    pair_suffix: str = setting("_after", task="pair")
    """What the name of the second picture of a pair has behind that of the first: a.png and a_after.png."""

    pair_weight: float = setting(0.25, task="pair", above=0, maximum=1)
    """The weight at which a pair is learned, and its opposite the way back."""

    pair_mask: bool = setting(False, task="pair")
    """Learn only where the two pictures differ."""

    saved_strength: float = setting(1.0, task="pair", above=0, maximum=10)
    """How much stronger the LoRA is saved than it was trained."""

    copy_steps: int = setting(500, task="pair", minimum=1, maximum=100_000)
    """Steps in which the first LoRA of the copier memorises the first picture."""

    copied_lora: str | None = setting(None, task="pair", decides=False, path="read")
    """The first LoRA of an earlier copier run with the same first picture and settings, instead of a new one."""

    opposite_dir: str | None = setting(None, task="slider", decides=False, path="read", given_by="steps")
    """Folder with pictures of the opposite of what train_data_dir shows, with captions of the same kind: what the LoRA
    makes at weight -1."""
