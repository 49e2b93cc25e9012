"""A run on prompts alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.captioning.registry import Sources
from lora_trainer.config import TrainConfig, parse_resolution
from lora_trainer.config.changes import PLACE
from lora_trainer.errors import UserError
from lora_trainer.models.base import Lender, LentModel
from lora_trainer.models.families import get_family
from lora_trainer.run.saving import model_facts
from lora_trainer.run.workloads.base import Work
from lora_trainer.run.workloads.image_model import (
    OfImageModel,
    describe_base,
    refuse_several,
    refuse_text_encoders,
)
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.change_inputs import WordSource, kept_prompts
from lora_trainer.training.objectives.change import WordObjective
from lora_trainer.training.precision import Precision
from lora_trainer.training.ranks import ALONE, Ranks


class Words(OfImageModel):
    """The ``Workload`` of words. ``open`` makes it."""

    @staticmethod
    def look(config: TrainConfig, captioners: Sources | None = None) -> None:
        """Raises UserError where the prompts say no change."""
        refuse_text_encoders(config)
        for template in config.prompt_templates:
            if PLACE not in template:
                raise UserError(
                    f'"{template}" has no {PLACE} where a prompt could stand.',
                    field="prompt_templates",
                    remedy="Add it.",
                )
        slides = bool(config.positive_prompt or config.negative_prompt)
        if slides and config.positive_prompt == config.negative_prompt:
            raise UserError(
                "The positive and the negative prompt are the same.", field="positive_prompt", remedy="Change one."
            )
        if not slides and config.original_prompt == config.target_prompt:
            raise UserError(
                "The original and the target prompt are the same: there is nothing to learn.",
                field="original_prompt",
                remedy="Say what is changed, and in target_prompt what it becomes; or give a positive and a negative "
                "prompt.",
            )
        turned = config.target_prompt not in ("", config.original_prompt)
        if config.guidance == 0 and not (slides and turned):
            raise UserError(
                "At guidance 0 the prompts change nothing: there is nothing to learn.",
                field="guidance",
                remedy="Raise it.",
            )

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        lender: Lender,
        callbacks: TrainCallbacks,
        commands: TrainCommands,
        captioners: Sources | None = None,
        ranks: Ranks = ALONE,
    ) -> Words:
        """Raises UserError for prompts that say no change, or a model that cannot be trained."""
        refuse_several(ranks)
        cls.look(config)
        info = describe_base(lender, config, callbacks, "words")
        family = get_family(info.family)
        size, side = parse_resolution(config.resolution), family.default_resolution(info)
        width, height = size if isinstance(size, tuple) else (side, side)
        multiple = family.latents.multiple
        return cls(config, lender, info, (max(width, multiple) // multiple * multiple,
                                          max(height, multiple) // multiple * multiple))  # fmt: skip

    def run_key(self, model: LentModel) -> dict[str, Any]:
        config = self._config
        kept = kept_prompts(config, model.schedule.takes_negative())
        return {
            **super().run_key(model),
            # Runs of before kept the protected prompts alone,
            **({"kept_prompts": kept} if kept != config.protected_prompts else {}),
            # and took turns among them without regard to the two ways.
            **({"kept_turns": "each way"} if config.both_ways and len(kept) > 1 else {}),
        }

    def work(self, model: LentModel, precision: Precision, *, keep_model_parts: bool, ranks: Ranks = ALONE) -> Work:
        config = self._config
        source = WordSource(config, model, self._size, precision, keep_model_parts)
        facts = model_facts(config, self._info, self._size, precision.name, source.total_steps)

        def objective(adapters: AdapterSet) -> WordObjective:
            bare = partial(adapters.enabled, False)
            return WordObjective(config, model, source.encode_prompts, bare, adapters.multiplied)

        return Work(source, objective, model.lora_targets, self.saver(facts))
