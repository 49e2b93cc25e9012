"""A run on pictures with captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.merge import check_paths, merge
from lora_trainer.captioning.registry import Sources
from lora_trainer.config import TrainConfig, without_effect
from lora_trainer.dataset.buckets import BatchPlan
from lora_trainer.dataset.cache import PIXELS_VERSION, TensorCache
from lora_trainer.dataset.caption_files import some
from lora_trainer.dataset.captions import escape, parse
from lora_trainer.dataset.folder import UncaptionedError, scan
from lora_trainer.dataset.held_out import Split, hold_out
from lora_trainer.dataset.samples import Dataset
from lora_trainer.dataset.unnamed import unnamed
from lora_trainer.errors import UserError, concerning
from lora_trainer.files import sha256_file
from lora_trainer.models.base import Lender, LentModel, LoraTarget, ModelInfo
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import get_family
from lora_trainer.run.captioning import caption_for_training, training_captioner
from lora_trainer.run.outputs import Outputs
from lora_trainer.run.saving import LoraSaver, run_facts
from lora_trainer.run.workloads.base import Work, digest
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.inputs import BatchSource
from lora_trainer.training.objectives.of_pictures import picture_objective
from lora_trainer.training.objectives.pictures import PictureObjective
from lora_trainer.training.precision import Precision
from lora_trainer.training.preview import ModelPreviewer
from lora_trainer.training.ranks import ALONE, Ranks
from lora_trainer.training.source import Turn
from lora_trainer.training.validation import ValidationData


class Pictures:
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
        self._config, self._lender, self._info, self._dataset, self._plan = config, lender, info, dataset, plan
        self._split, self._on_warning = split, on_warning

    @staticmethod
    def file_lender(config: TrainConfig, precision: Precision) -> FileLender:
        """The lender of ``base_model`` as a file."""
        return FileLender(
            config.base_model,
            device=precision.device,
            weight_dtype=precision.weight_dtype,
            vae=config.vae,
            v_prediction=config.v_prediction,
            zero_terminal_snr=config.zero_terminal_snr,
            clip_skip=config.clip_skip,
            text_encoders=config.text_encoders,
        )

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
        info = lender.describe()
        family = get_family(info.family)
        for sentence in without_effect(config, family.unused):
            callbacks.on_warning(sentence)
        captioned = ranks.first(
            lambda: caption_for_training(config, callbacks, commands, lender.device_turn, captioners)
        )
        if captioned is not None and captioned.cancelled:
            callbacks.on_warning("Not all pictures have a caption yet: the caption command describes the others.")
            return None
        dataset = scan(config, lambda done, total: callbacks.on_phase("pictures", done, total))
        for skipped in dataset.skipped:
            callbacks.on_warning(f"{skipped.path.name} is left out: {skipped.reason}")
        for warning in dataset.warnings:
            callbacks.on_warning(warning)
        split = None
        if config.validation_share:
            split = hold_out(dataset, config.validation_share, config.seed)
            dataset = split.trained
            callbacks.on_warning(f"Not trained, but measured: {some([one.key for one in split.held_out.samples])}.")
        plan = BatchPlan.from_config(dataset, config, family.default_resolution(info), family.latents.multiple)
        return cls(config, lender, info, dataset, plan, split, callbacks.on_warning)

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
            "noise_schedule": digest(model.schedule.key),
        }

    def work(self, model: LentModel, precision: Precision, *, keep_model_parts: bool, ranks: Ranks = ALONE) -> Work:
        config, plan = self._config, self._plan
        folder = Path(config.cache_dir or Path(config.output_dir) / "cache")
        on_warning = self._on_warning if ranks.leads else ranks.say
        cache = TensorCache(folder, on_warning, Path(config.train_data_dir).resolve())
        source = BatchSource(
            config, model, self._dataset, plan, cache, precision, keep_model_parts, self._lender.make_room, ranks
        )
        facts = run_facts(config, self._info, self._dataset, plan, precision.name, source.total_steps)

        def objective(adapters: AdapterSet) -> PictureObjective:
            return picture_objective(config, model, source.encode_prompts, partial(adapters.enabled, False))

        def targets() -> list[LoraTarget]:
            if config.text_encoders_learn:
                model.hold("unet", "text_encoders")
            return model.lora_targets()

        def saver(outputs: Outputs, adapters: AdapterSet, callbacks: TrainCallbacks) -> LoraSaver:
            return LoraSaver(config, outputs, adapters, facts, callbacks, self._lender.model_hash)

        split = self._split
        validation = None if split is None else self._validation(split, model, cache, precision)
        return Work(source, objective, targets, saver, validation)

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

    def previewer(self, model: LentModel, turn: Turn, precision: Precision) -> ModelPreviewer:
        return ModelPreviewer(model, turn, self._plan.resolution)

    def outputs(self, config: TrainConfig, digest: str) -> Outputs:
        return Outputs.of(config, digest)

    def merger(self, model: LentModel, outputs: Outputs) -> Callable[[], Path] | None:
        config, base = self._config, model.info.path
        if not config.merge_into_base:
            return None
        output = Path(config.merge_into_base)
        if base is None:
            raise UserError(
                "The base model is no file that could be merged into.",
                field="merge_into_base",
                remedy="Leave it empty, and merge the finished LoRA elsewhere.",
            )
        with concerning("merge_into_base"):
            check_paths(base, outputs.lora, output, config.overwrite)

        def merged() -> Path:
            targets = model.lora_targets()
            return merge(base, outputs.lora, 1.0, output, targets=targets, overwrite=config.overwrite).path

        return merged

    def usage(self, lora: Path) -> tuple[str, ...]:
        word = self._config.trigger_word
        prompt = f"<lora:{lora.stem}:0.8>" + (f" {word}" if word else "")
        return (f"Copy the LoRA into models/Lora of your WebUI and prompt with {prompt}",)
