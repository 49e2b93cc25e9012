"""A run on pictures with captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_trainer.captioning.registry import Sources
from lora_trainer.config import TrainConfig, without_effect
from lora_trainer.dataset.buckets import BatchPlan
from lora_trainer.dataset.cache import PIXELS_VERSION, TensorCache
from lora_trainer.dataset.folder import scan
from lora_trainer.dataset.samples import Dataset
from lora_trainer.files import sha256_file
from lora_trainer.models.base import Lender, LentModel, ModelInfo
from lora_trainer.models.families import get_family
from lora_trainer.run.captioning import caption_for_training
from lora_trainer.run.saving import run_facts
from lora_trainer.run.workloads.base import Work, digest
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.inputs import BatchSource
from lora_trainer.training.objectives.diffusion import DiffusionObjective
from lora_trainer.training.precision import Precision
from lora_trainer.training.preview import ModelPreviewer
from lora_trainer.training.source import Turn


class Pictures:
    """The ``Workload`` of pictures. ``open`` makes it."""

    def __init__(
        self,
        config: TrainConfig,
        lender: Lender,
        info: ModelInfo,
        dataset: Dataset,
        plan: BatchPlan,
        on_warning: Callable[[str], None],
    ):
        self._config, self._lender, self._info, self._dataset, self._plan = config, lender, info, dataset, plan
        self._on_warning = on_warning

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        lender: Lender,
        callbacks: TrainCallbacks,
        commands: TrainCommands,
        captioners: Sources | None = None,
    ) -> Pictures | None:
        """Caption the pictures if none of them has a caption, then scan the folder. None when it was stopped.

        Raises:
            UserError: there is nothing to train on, or the model cannot be trained.
        """
        info = lender.describe()
        family = get_family(info.family)
        for sentence in without_effect(config, family.unused):
            callbacks.on_warning(sentence)
        captioned = caption_for_training(config, callbacks, commands, lender.device_turn, captioners)
        if captioned is not None and captioned.cancelled:
            callbacks.on_warning("Not all pictures have a caption yet: the caption command describes the others.")
            return None
        dataset = scan(config, lambda done, total: callbacks.on_phase("pictures", done, total))
        for skipped in dataset.skipped:
            callbacks.on_warning(f"{skipped.path} is left out: {skipped.reason}")
        for warning in dataset.warnings:
            callbacks.on_warning(warning)
        plan = BatchPlan.from_config(dataset, config, family.default_resolution(info), family.latents.multiple)
        return cls(config, lender, info, dataset, plan, callbacks.on_warning)

    def run_key(self, model: LentModel) -> dict[str, Any]:
        samples = [
            (one.key, one.digest, one.caption, one.repeats, one.mask_path and sha256_file(one.mask_path))
            for one in self._dataset.samples
        ]
        info = model.info
        base = [info.family, info.prediction_type, model.network_key, model.vae_key, model.text_key]
        return {
            "pictures": digest(samples),
            "pixels_version": PIXELS_VERSION,
            "base_model": digest(base),
            "noise_schedule": digest(model.schedule.alphas_cumprod.tolist()),
        }

    def work(self, model: LentModel, precision: Precision, *, keep_model_parts: bool) -> Work:
        config, plan = self._config, self._plan
        cache = TensorCache(Path(config.cache_dir or Path(config.output_dir) / "cache"), self._on_warning)
        source = BatchSource(
            config, model, self._dataset, plan, cache, precision, keep_model_parts, self._lender.make_room
        )
        objective = DiffusionObjective(config, model, source.encode_prompts)
        facts = run_facts(config, self._info, self._dataset, plan, precision.name, source.total_steps)
        return Work(source, objective, model.lora_targets, facts)

    def previewer(self, model: LentModel, turn: Turn, precision: Precision) -> ModelPreviewer:
        return ModelPreviewer(model, turn, self._plan.resolution)
