"""A run on pictures with captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.captioning.registry import Sources
from lora_trainer.config import TrainConfig
from lora_trainer.dataset.buckets import BatchPlan
from lora_trainer.dataset.cache import PIXELS_VERSION, TensorCache
from lora_trainer.dataset.caption_files import some
from lora_trainer.dataset.captions import escape, parse
from lora_trainer.dataset.folder import UncaptionedError, scan
from lora_trainer.dataset.held_out import Split, hold_out
from lora_trainer.dataset.known import KnownPictures
from lora_trainer.dataset.samples import Dataset
from lora_trainer.dataset.unnamed import unnamed
from lora_trainer.files import sha256_file
from lora_trainer.models.base import Lender, LentModel, LoraTarget, ModelInfo
from lora_trainer.models.families import get_family
from lora_trainer.run.captioning import caption_for_training, training_captioner
from lora_trainer.run.saving import run_facts
from lora_trainer.run.workloads.base import Work, digest
from lora_trainer.run.workloads.image_model import OfImageModel, describe_base
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.inputs import BatchSource
from lora_trainer.training.objectives.of_pictures import picture_objective
from lora_trainer.training.objectives.pictures import PictureObjective
from lora_trainer.training.precision import Precision
from lora_trainer.training.ranks import ALONE, Ranks
from lora_trainer.training.validation import ValidationData


class Pictures(OfImageModel):
    """The ``Workload`` of pictures. ``open`` makes it."""

    def __init__(
        self,
        config: TrainConfig,
        lender: Lender,
        info: ModelInfo,
        dataset: Dataset,
        plan: BatchPlan,
        split: Split | None,
        on_warning: Callable[[str], None],
    ):
        super().__init__(config, lender, info, plan.resolution)
        self._dataset, self._plan = dataset, plan
        self._split, self._on_warning = split, on_warning

    @staticmethod
    def look(config: TrainConfig, captioners: Sources | None = None) -> None:
        """Raises UserError when there is nothing to train on, nor anything that could describe the pictures first."""
        try:
            scan(config)
        except UncaptionedError:
            if training_captioner(config, captioners or Sources()) is None:
                raise

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        lender: Lender,
        callbacks: TrainCallbacks,
        commands: TrainCommands,
        captioners: Sources | None = None,
        ranks: Ranks = ALONE,
    ) -> Pictures | None:
        """Caption the pictures if none of them has a caption, then scan the folder. None when it was stopped.

        Raises:
            UserError: there is nothing to train on, or the model cannot be trained.
        """
        info = describe_base(lender, config, callbacks)
        captioned = ranks.first(
            lambda: caption_for_training(config, callbacks, commands, lender.device_turn, captioners)
        )
        if captioned is not None and captioned.cancelled:
            callbacks.on_warning("Not all pictures have a caption yet: the caption command describes the others.")
            return None
        dataset = scan(
            config, lambda done, total: callbacks.on_phase("pictures", done, total), known=known_pictures(config)
        )
        for skipped in dataset.skipped:
            callbacks.on_warning(f"{skipped.path.name} is left out: {skipped.reason}")
        for warning in dataset.warnings:
            callbacks.on_warning(warning)
        split = None
        if config.validation_share:
            split = hold_out(dataset, config.validation_share, config.seed)
            dataset = split.trained
            callbacks.on_warning(f"Not trained, but measured: {some([one.key for one in split.held_out.samples])}.")
        family = get_family(info.family)
        plan = BatchPlan.from_config(dataset, config, family.default_resolution(info), family.latents.multiple)
        return cls(config, lender, info, dataset, plan, split, callbacks.on_warning)

    def run_key(self, model: LentModel) -> dict[str, Any]:
        return {**super().run_key(model), **samples_key(self._dataset)}

    def work(self, model: LentModel, precision: Precision, *, keep_model_parts: bool, ranks: Ranks = ALONE) -> Work:
        config, plan = self._config, self._plan
        cache = cache_of(config, self._on_warning if ranks.leads else ranks.say)
        source = BatchSource(
            config, model, self._dataset, plan, cache, precision, keep_model_parts, self._lender.make_room, ranks
        )
        facts = run_facts(config, self._info, self._dataset, plan, precision.name, source.total_steps)

        def objective(adapters: AdapterSet) -> PictureObjective:
            bare = partial(adapters.enabled, False)
            if source.base_pictures is not None:
                source.base_pictures.bare = bare
            return picture_objective(config, model, source.encode_prompts, bare)

        def targets() -> list[LoraTarget]:
            if config.text_encoders_learn:
                model.hold("unet", "text_encoders")
            return model.lora_targets()

        split = self._split
        validation = None if split is None else self._validation(split, model, cache, precision)
        return Work(source, objective, targets, self.saver(facts), validation)

    def _validation(self, split: Split, model: LentModel, cache: TensorCache, precision: Precision) -> ValidationData:
        """Sources that show each picture once, alone, and without anything that chance decides."""
        family = get_family(self._info.family)
        config = replace(
            self._config,
            batch_size=1,
            gradient_accumulation_steps=1,
            max_train_steps=None,
            epochs=1,
            flip=False,
            random_crop=False,
            min_scale=1.0,
            augmentations=[],
            shuffle_tags=False,
            tag_dropout=0.0,
            caption_dropout=0.0,
            wildcards=False,
            preserve=0.0,
        )

        def source(dataset: Dataset, config: TrainConfig) -> BatchSource:
            plan = BatchPlan.from_config(
                dataset, config, family.default_resolution(self._info), family.latents.multiple
            )
            return BatchSource(config, model, dataset, plan, cache, precision, True, self._lender.make_room)

        bare = tuple(
            replace(one, caption=escape(unnamed(parse(one.caption), config.trigger_word)))
            for one in split.held_out.samples
        )
        return ValidationData(
            held_out=source(split.held_out, config),
            seen=source(split.seen, config),
            untriggered=source(replace(split.held_out, samples=bare), replace(config, trigger_word="")),
        )


def samples_key(dataset: Dataset) -> dict[str, Any]:
    """Facts about the pictures that determine the result, by name."""
    samples = [
        (one.key, one.digest, one.caption, one.repeats, one.mask_path and sha256_file(one.mask_path))
        for one in dataset.samples
    ]
    return {"pictures": digest(samples), "pixels_version": PIXELS_VERSION}


def cache_of(config: TrainConfig, on_warning: Callable[[str], None]) -> TensorCache:
    """Where a run on pictures keeps what it encodes."""
    return TensorCache(cache_folder(config), on_warning, data_folder(config))


def cache_folder(config: TrainConfig) -> Path:
    return Path(config.cache_dir or Path(config.output_dir) / "cache")


def known_pictures(config: TrainConfig) -> KnownPictures:
    """What earlier runs found of the pictures."""
    return KnownPictures(cache_folder(config), data_folder(config))


def data_folder(config: TrainConfig) -> Path:
    """Under whose name is listed what a run uses of the cache."""
    return Path(config.train_data_dir).resolve()
