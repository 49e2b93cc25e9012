"""Runs on pictures that show a change: before and after, or something and its opposite."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.captioning.registry import Sources
from lora_trainer.config import TrainConfig
from lora_trainer.dataset.buckets import BatchPlan
from lora_trainer.dataset.folder import scan
from lora_trainer.dataset.images import measure
from lora_trainer.dataset.known import KnownPictures
from lora_trainer.dataset.pairs import NO_CAPTION, pairs_of
from lora_trainer.dataset.samples import Dataset, Size
from lora_trainer.errors import UserError, concerning
from lora_trainer.models.base import Lender, LentModel, ModelInfo
from lora_trainer.models.families import get_family
from lora_trainer.run.saving import run_facts
from lora_trainer.run.workloads.base import Work
from lora_trainer.run.workloads.image_model import (
    OfImageModel,
    describe_base,
    refuse_several,
    refuse_text_encoders,
)
from lora_trainer.run.workloads.pictures import cache_of, known_pictures, samples_key
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.change_inputs import PairSource, SliderSource
from lora_trainer.training.inputs import BatchSource
from lora_trainer.training.objectives.change import PairObjective
from lora_trainer.training.objectives.of_pictures import picture_objective
from lora_trainer.training.objectives.pictures import PictureObjective
from lora_trainer.training.precision import Precision
from lora_trainer.training.preview import ModelPreviewer
from lora_trainer.training.ranks import ALONE, Ranks
from lora_trainer.training.source import Turn


class TwoDatasets(OfImageModel):
    """A ``Workload`` with pictures of two kinds. ``open`` makes it."""

    task = ""

    def __init__(
        self,
        config: TrainConfig,
        lender: Lender,
        info: ModelInfo,
        datasets: tuple[Dataset, Dataset],
        on_warning: Callable[[str], None],
    ):
        family = get_family(info.family)
        side, multiple = family.default_resolution(info), family.latents.multiple
        self._plans = [BatchPlan.from_config(one, config, side, multiple) for one in datasets]
        super().__init__(config, lender, info, self._plans[0].resolution)
        self._datasets, self._on_warning = datasets, on_warning

    @classmethod
    def read(
        cls,
        config: TrainConfig,
        progress: Callable[[int, int], None] | None = None,
        known: Callable[[TrainConfig], KnownPictures | None] = lambda _: None,
        measure: Callable[[Path], tuple[Size, str]] = measure,
    ) -> tuple[Dataset, Dataset, list[str]]:
        """Both data sets, and what is to be told of them. known: of the folder in train_data_dir.

        measure: see ``scan``. Raises UserError."""
        raise NotImplementedError

    @staticmethod
    def check(config: TrainConfig) -> None:
        """Raises UserError for settings that cannot be combined."""
        refuse_text_encoders(config)

    @classmethod
    def look(cls, config: TrainConfig, captioners: Sources | None = None) -> None:
        """Raises UserError where there is nothing to learn from."""
        cls.check(config)
        cls.read(config)

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        lender: Lender,
        callbacks: TrainCallbacks,
        commands: TrainCommands,
        captioners: Sources | None = None,
        ranks: Ranks = ALONE,
    ) -> TwoDatasets:
        """Scan the folders. Raises UserError where there is nothing to learn from, or the model cannot be trained."""
        refuse_several(ranks)
        cls.check(config)
        info = describe_base(lender, config, callbacks, cls.task)
        first, second, warnings = cls.read(
            config, lambda done, total: callbacks.on_phase("pictures", done, total), known_pictures
        )
        for dataset in (first, second):
            for skipped in dataset.skipped:
                callbacks.on_warning(f"{skipped.path.name} is left out: {skipped.reason}")
        for warning in dict.fromkeys([*first.warnings, *second.warnings, *warnings]):
            callbacks.on_warning(warning)
        return cls(config, lender, info, (first, second), callbacks.on_warning)

    def run_key(self, model: LentModel) -> dict[str, Any]:
        first, second = self._datasets
        return {**super().run_key(model), **samples_key(first), "opposite": samples_key(second)["pictures"]}

    def work(self, model: LentModel, precision: Precision, *, keep_model_parts: bool, ranks: Ranks = ALONE) -> Work:
        raise NotImplementedError

    def sources(
        self, model: LentModel, precision: Precision, keep_model_parts: bool, **changes: Any
    ) -> tuple[BatchSource, BatchSource]:
        """Of both folders. changes: settings that these take otherwise than the run says."""
        config = replace(self._config, preserve_pictures=0, **changes)
        cache = cache_of(config, self._on_warning)
        first, second = (
            BatchSource(config, model, dataset, plan, cache, precision, keep_model_parts, self._lender.make_room)
            for dataset, plan in zip(self._datasets, self._plans)
        )
        return first, second

    def work_of(
        self, source: Any, objective: Callable[[AdapterSet], Any], model: LentModel, precision: Precision
    ) -> Work:
        facts = run_facts(
            self._config, self._info, self._datasets[0], self._plans[0], precision.name, source.total_steps
        )
        return Work(source, objective, model.lora_targets, self.saver(facts))


class PairedPictures(TwoDatasets):
    """Before and after. With pair_method: copier, a run is one of the two passes: the first one where there is no
    ``copied_lora``, which learns what is before; else the second, which learns what is after with that one active."""

    task = "pair"
    _first: AdapterSet | None = None

    @classmethod
    def read(
        cls,
        config: TrainConfig,
        progress: Callable[[int, int], None] | None = None,
        known: Callable[[TrainConfig], KnownPictures | None] = lambda _: None,
        measure: Callable[[Path], tuple[Size, str]] = measure,
    ) -> tuple[Dataset, Dataset, list[str]]:
        with concerning("copied_lora"):
            if config.copied_lora and config.pair_method == "copier":
                read_lora(config.copied_lora)
        config = replace(config, reg_data_dir=None, more_folders=[])
        dataset = scan(config, progress, measure, NO_CAPTION, known=known(config))
        pairs = pairs_of(dataset, config.pair_suffix, same_size=config.pair_method == "alternating")
        return pairs.before, pairs.after, list(pairs.warnings)

    def run_key(self, model: LentModel) -> dict[str, Any]:
        copied, key = self._config.copied_lora, super().run_key(model)
        if self._config.pair_method == "copier":
            key["first_lora"] = copied and _weights_digest(Path(copied))
            if copied and self._config.adapter != "lora":
                key["on_top"] = "of the first"  # runs of before computed without it
        elif model.info.prediction_type == "v_prediction":
            key["target"] = "moved by the difference"  # runs of before had another, see PairObjective
        return key

    def work(self, model: LentModel, precision: Precision, *, keep_model_parts: bool, ranks: Ranks = ALONE) -> Work:
        config = self._config
        alternating = config.pair_method == "alternating"
        unused = {"preserve": 0.0} if alternating else {}  # every picture is shown as both, with its own caption
        before, after = self.sources(model, precision, keep_model_parts, **unused)
        if alternating:
            source = PairSource(config, before, after)

            def difference(adapters: AdapterSet) -> PairObjective:
                return PairObjective(config, model, source.encode_prompts, partial(adapters.enabled, False))

            return self.work_of(source, difference, model, precision)
        chosen = after if config.copied_lora else before

        def objective(adapters: AdapterSet) -> PictureObjective:
            return picture_objective(config, model, chosen.encode_prompts, partial(adapters.enabled, False))

        work = self.work_of(chosen, objective, model, precision)
        return replace(work, beneath=lambda: self._beneath(model)) if config.copied_lora else work

    @contextmanager
    def _beneath(self, model: LentModel) -> Iterator[None]:
        """Inside, the first LoRA is part of the model."""
        with concerning("copied_lora"):
            first = AdapterSet.build(model.lora_targets(), self._config, model.device)
            for warning in init_from(first, read_lora(self._config.copied_lora or "")):
                self._on_warning(warning)
        with first.requires_grad_(False).eval():
            self._first = first
            yield

    def previewer(self, model: LentModel, turn: Turn, precision: Precision) -> ModelPreviewer:
        return _WithoutTheFirst(model, turn, self._size, first=lambda: self._first)


class _WithoutTheFirst(ModelPreviewer):
    """Draws without the first LoRA of a copier, which does not belong to the result."""

    def __init__(self, *arguments: Any, first: Callable[[], AdapterSet | None]):
        super().__init__(*arguments)
        self._first = first

    def draw(self, prompt: str, seed: int, step: int, adapters: nn.Module) -> Image.Image:
        first = self._first()
        if first is None:
            return super().draw(prompt, seed, step, adapters)
        with first.enabled(False):
            return super().draw(prompt, seed, step, adapters)


class Opposites(TwoDatasets):
    """Pictures of something and of its opposite: sliders."""

    task = "slider"

    @classmethod
    def read(
        cls,
        config: TrainConfig,
        progress: Callable[[int, int], None] | None = None,
        known: Callable[[TrainConfig], KnownPictures | None] = lambda _: None,
        measure: Callable[[Path], tuple[Size, str]] = measure,
    ) -> tuple[Dataset, Dataset, list[str]]:
        if not config.opposite_dir:
            raise UserError(
                "is empty.", field="opposite_dir", remedy="Name the folder with pictures of the opposite."
            )
        first = scan(replace(config, reg_data_dir=None), progress, measure, known=known(config))
        with concerning("opposite_dir", instead_of="train_data_dir"):
            opposite = replace(config, train_data_dir=config.opposite_dir, more_folders=[], reg_data_dir=None)
            second = scan(replace(opposite, metadata_path=None), progress, measure, known=known(opposite))
        if Path(config.opposite_dir).resolve() == Path(config.train_data_dir).resolve():
            raise UserError("It is the folder of the pictures itself.", field="opposite_dir", remedy="Name another.")
        return first, second, []

    def work(self, model: LentModel, precision: Precision, *, keep_model_parts: bool, ranks: Ranks = ALONE) -> Work:
        config = self._config
        source = SliderSource(*self.sources(model, precision, keep_model_parts))

        def objective(adapters: AdapterSet) -> PictureObjective:
            return picture_objective(config, model, source.encode_prompts, partial(adapters.enabled, False))

        return self.work_of(source, objective, model, precision)


def _weights_digest(path: Path) -> str:
    """SHA-256 of the weights in a LoRA file, whatever its metadata say."""
    found = hashlib.sha256()
    for name, module in sorted(read_lora(path).modules.items()):
        for suffix, tensor in sorted(module.tensors.items()):
            found.update(f"{name}.{suffix} {tensor.dtype} {tuple(tensor.shape)} {module.alpha}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
