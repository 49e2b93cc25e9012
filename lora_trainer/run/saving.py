"""Writes the LoRA of a run: on the way, when it is stopped, and at its end."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_trainer import __version__
from lora_trainer.adapters.export import diffusers_problem, save_diffusers, save_lora
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.metadata import RunFacts, build_metadata
from lora_trainer.adapters.peft_folder import save_peft
from lora_trainer.config import TrainConfig
from lora_trainer.dataset.buckets import BatchPlan
from lora_trainer.dataset.captions import parse
from lora_trainer.dataset.samples import Dataset
from lora_trainer.dataset.tags import tag_frequency
from lora_trainer.models.base import ModelInfo
from lora_trainer.models.families import get_family
from lora_trainer.run.outputs import RUN_ENTRY, Outputs
from lora_trainer.training.callbacks import TrainCallbacks


@dataclass
class LoraSaver:
    """A ``Saver`` for the training loop. ``facts`` describe the run; step, epoch and time are filled in here."""

    config: TrainConfig
    outputs: Outputs
    adapters: AdapterSet
    facts: RunFacts
    callbacks: TrainCallbacks
    model_hash: Callable[[], str | None]

    def prepare(self) -> None:
        """Hash the base's file. That takes seconds: not before the first LoRA is there to be saved, and not in a turn,
        for which the WebUI would wait."""
        if self.facts.model_hash is None:
            self.callbacks.on_phase("hashing", 0, 0)
            self.facts = replace(self.facts, model_hash=self.model_hash())

    def __call__(self, step: int, epoch: int, kind: str) -> Path:
        """Write the LoRA of this kind (see ``Saver``) and return its path."""
        facts = replace(self.facts, step=step, epoch=epoch, finished_at=time.time())
        metadata = {**build_metadata(self.config, facts), RUN_ENTRY: self.outputs.run_digest}
        path = self.outputs.path(kind, step)
        save_lora(self.adapters, path, metadata, self.config.save_precision)
        if kind == "step":
            self.outputs.forget_old_checkpoints(self.config.keep_checkpoints)
        elif kind != "best" and self.config.export_diffusers:
            if problem := diffusers_problem(self.adapters):
                self.callbacks.on_warning(f"There is no {self.outputs.diffusers.name}: {problem}")
            else:
                save_diffusers(self.adapters, self.outputs.diffusers, metadata, self.config.save_precision)
        return path


@dataclass
class AdapterSaver:
    """The same for a language model, whose LoRA is a folder. layers: names of all its layers that could learn."""

    config: TrainConfig
    outputs: Outputs
    adapters: AdapterSet
    layers: Sequence[str]

    def prepare(self) -> None:
        return

    def __call__(self, step: int, epoch: int, kind: str) -> Path:
        path = self.outputs.path(kind, step)
        save_peft(
            self.adapters,
            path.parent,
            layers=self.layers,
            base_model=self.config.base_model,
            dropout=self.config.dropout,
            metadata={RUN_ENTRY: self.outputs.run_digest},
            dtype=self.config.save_precision,
        )
        if kind == "step":
            self.outputs.forget_old_checkpoints(self.config.keep_checkpoints)
        return path


def run_facts(
    config: TrainConfig, info: ModelInfo, dataset: Dataset, plan: BatchPlan, precision: str, steps: int
) -> RunFacts:
    """What the metadata says of the data and the model. ``steps``: optimizer steps of the whole run."""
    visits: Counter[bool] = Counter()
    pictures: Counter[tuple[bool, str, int]] = Counter()
    for sample in dataset.samples:
        visits[sample.is_regularization] += sample.repeats
        pictures[sample.is_regularization, os.path.basename(os.path.dirname(sample.file)), sample.repeats] += 1

    def directories(regularization: bool) -> dict[str, dict[str, int]]:
        return {
            folder: {"n_repeats": repeats, "img_count": count}
            for (is_regularization, folder, repeats), count in pictures.items()
            if is_regularization == regularization
        }

    table = plan.table()
    captions = ((sample.key, parse(sample.caption)) for sample in dataset.samples if not sample.is_regularization)
    return replace(
        model_facts(config, info, plan.resolution, precision, steps),
        num_train_images=visits[False],
        num_reg_images=visits[True],
        num_batches_per_epoch=plan.steps_per_epoch,
        bucket_info={
            "buckets": {
                str(index): {"resolution": list(row["resolution"]), "count": row["count"]}
                for index, row in enumerate(table)
            },
            "mean_img_ar_error": sum(row["ar_error"] * row["images"] for row in table) / len(dataset.samples),
        },
        tag_frequency=tag_frequency(captions, dataset.root.name),
        dataset_dirs=directories(False),
        reg_dataset_dirs=directories(True),
    )


def model_facts(
    config: TrainConfig, info: ModelInfo, resolution: tuple[int, int], precision: str, steps: int
) -> RunFacts:
    """What the metadata says of a run without pictures."""
    now = time.time()
    return RunFacts(
        base=get_family(info.family).lora_metadata(info.prediction_type, info.architecture),
        prediction_type=info.prediction_type,
        model_name=info.path.name if info.path else info.name,
        model_path=info.path,
        resolution=resolution,
        started_at=now,
        finished_at=now,
        epoch=0,
        step=0,
        total_epochs=config.epochs,
        total_steps=steps,
        num_train_images=0,
        num_batches_per_epoch=steps,
        mixed_precision=precision,
        vae_name=Path(config.vae).name if config.vae else None,
        zero_terminal_snr=info.zero_terminal_snr if config.zero_terminal_snr is None else config.zero_terminal_snr,
        implementation_version=__version__,
    )
