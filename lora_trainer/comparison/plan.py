"""Which pictures a comparison has, and with what each is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_trainer.config import TrainConfig
from lora_trainer.config.changes import PLACE, filled
from lora_trainer.config.facts import CHANGES
from lora_trainer.config.prompts import with_trigger
from lora_trainer.errors import UserError
from lora_trainer.host.base import PreviewRequest, is_lora_weight
from lora_trainer.host.requests import preview_request
from lora_trainer.models.base import ModelInfo

WEIGHTS = (0.5, 0.8, 1.0)
CHANGE_WEIGHTS = (-1.0, -0.5, 0.5, 1.0)
"""Of a LoRA that learned a change, which goes both ways."""
MOST_STEPS = 8
"""So many saved steps are compared where nobody says which."""
MOST_PICTURES = 400


@dataclass(frozen=True)
class Wish:
    """steps, weights, prompts: None for the usual ones."""

    steps: Sequence[int] | None = None
    weights: Sequence[float] | None = None
    prompts: Sequence[str] | None = None


@dataclass(frozen=True)
class Cell:
    """One picture. prompt: its index. step, weight: of the LoRA; None for the base model alone."""

    prompt: int
    step: int | None
    weight: float | None
    request: PreviewRequest

    @property
    def file(self) -> str:
        """Its file, relative to the comparison's folder."""
        if self.step is None:
            return f"cells/base-prompt{self.prompt}.png"
        return f"cells/step{self.step:08d}-weight{self.weight:g}-prompt{self.prompt}.png"


@dataclass(frozen=True)
class Plan:
    """cells: by prompt; of each, first the base, then by step and weight."""

    name: str
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    prompts: tuple[str, ...]
    cells: tuple[Cell, ...]


def make_plan(
    config: TrainConfig, loras: Mapping[int, Path], info: ModelInfo, wish: Wish, recommended: int | None = None
) -> Plan:
    """config: of the run. loras: its LoRAs by step. info: of its base model. recommended: a step that is not left out
    where nobody says which steps.

    Every picture of a prompt has the seed that the run's previews of it have.

    Raises:
        UserError: there is nothing to compare, or the wish cannot be fulfilled, naming ``steps``, ``weights`` or
            ``prompts``.
    """
    if not loras:
        raise UserError(f"{config.output_name} has no LoRA yet.", remedy="Let it finish, or choose stop and save.")
    steps = _few(tuple(loras), recommended) if wish.steps is None else _steps(wish.steps, loras)
    weights = usual_weights(config) if wish.weights is None else _weights(wish.weights)
    given = usual_prompts(config) if wish.prompts is None else wish.prompts
    prompts = tuple(text for one in given if (text := one.strip()))
    if not prompts:
        raise UserError("There is no prompt to draw.", field="prompts", remedy="Give at least one.")
    count = len(prompts) * (1 + len(steps) * len(weights))
    if count > MOST_PICTURES:
        raise UserError(
            f"These are {count} pictures; at most {MOST_PICTURES} are drawn.", field="steps",
            remedy="Choose fewer steps, weights or prompts.",
        )  # fmt: skip
    cells: list[Cell] = []
    for index, prompt in enumerate(prompts):
        try:
            request = preview_request(with_trigger(prompt, config.trigger_word), config, info, config.seed + index)
        except UserError as error:
            error.field = "preview_prompts" if wish.prompts is None else "prompts"
            raise
        cells.append(Cell(index, None, None, request))
        for step in steps:
            for weight in weights:
                cells.append(Cell(index, step, weight, replace(request, lora=loras[step], lora_weight=weight)))
    return Plan(config.output_name, steps, weights, prompts, tuple(cells))


def usual_prompts(config: TrainConfig) -> tuple[str, ...]:
    """The run's own; without any, what it changes, or the word that it taught."""
    named = config.trigger_word.strip()
    if config.task == "words":
        named = filled((config.prompt_templates or [PLACE])[0], config.original_prompt)
    if config.task in CHANGES and not named:
        named = config.default_caption
    return tuple(config.preview_prompts) or (named or config.output_name,)


def usual_weights(config: TrainConfig) -> tuple[float, ...]:
    return CHANGE_WEIGHTS if config.task in CHANGES else WEIGHTS


def _few(steps: tuple[int, ...], recommended: int | None) -> tuple[int, ...]:
    """At most ``MOST_STEPS`` of them, evenly spread, with the last and the recommended one."""
    if len(steps) <= MOST_STEPS:
        return steps
    kept = {steps[-1], *([recommended] if recommended in steps else [])}
    others, places = [step for step in steps if step not in kept], MOST_STEPS - len(kept)
    kept |= {others[(2 * place + 1) * len(others) // (2 * places)] for place in range(places)}
    return tuple(step for step in steps if step in kept)


def _steps(wanted: Sequence[int], loras: Mapping[int, Path]) -> tuple[int, ...]:
    for step in wanted:
        if step not in loras:
            raise UserError(
                f"No LoRA of step {step} is there.", field="steps",
                remedy=f"There are {', '.join(map(str, loras))}.",
            )  # fmt: skip
    if not wanted:
        raise UserError("No step is chosen.", field="steps", remedy=f"There are {', '.join(map(str, loras))}.")
    return tuple(sorted(set(wanted)))


def _weights(wanted: Sequence[float]) -> tuple[float, ...]:
    for weight in wanted:
        if not is_lora_weight(weight):
            raise UserError(
                f"{weight:g} is no weight to compare.", field="weights",
                remedy="Use numbers such as 0.5, 0.8 and 1; the base model is there anyway.",
            )  # fmt: skip
    if not wanted:
        raise UserError("No weight is chosen.", field="weights", remedy="Use numbers such as 0.5, 0.8 and 1.")
    return tuple(sorted(set(wanted)))
