"""The two passes of the copier: a LoRA that memorises the first picture of a pair, then one on top of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_trainer.config import TrainConfig
from lora_trainer.training.callbacks import StepReport, TrainCallbacks
from lora_trainer.training.loop import FINISHED_BEFORE

FOLDER = "first"
"""Below the run's output_dir, for the first LoRA with its states and logs."""


def first_pass(config: TrainConfig) -> TrainConfig | None:
    """The settings of the pass that comes before the run of ``config``; None where there is none."""
    if (config.task, config.pair_method) != ("pair", "copier") or config.copied_lora:
        return None
    return replace(
        config,
        max_train_steps=config.copy_steps,
        output_dir=str(Path(config.output_dir) / FOLDER),
        cache_dir=config.cache_dir or str(Path(config.output_dir) / "cache"),
        resume=config.resume if config.resume == "never" else "auto",
        save_precision="fp32",
        keep_checkpoints=1 if config.save_steps or config.save_epochs else None,
        export_diffusers=False,
        merge_into_base=None,
        preview_prompts=[],
        init_lora=None,
    )


def second_pass(config: TrainConfig, first: Path) -> TrainConfig:
    """The settings of the pass with the first LoRA beneath; as long as the first, where nothing else is said."""
    return replace(config, copied_lora=str(first), max_train_steps=config.max_train_steps or config.copy_steps)


class Passes(TrainCallbacks):
    """Tells ``callbacks`` of one pass as a part of the whole run. before, after: steps of the passes around it.

    What is saved in a pass that is not the last is no result of the run.
    """

    def __init__(self, callbacks: TrainCallbacks, before: int, after: int):
        self._callbacks, self._before, self._after = callbacks, before, after

    def on_phase(self, name: str, done: int, total: int) -> None:
        if name == "training":
            done, total = self._before + done, self._before + total + self._after
        self._callbacks.on_phase(name, done, total)

    def on_step(self, report: StepReport) -> None:
        whole = self._before + report.total_steps + self._after
        self._callbacks.on_step(replace(report, step=self._before + report.step, total_steps=whole))

    def on_saved(self, path: Path, step: int, kind: str) -> None:
        if not self._after:
            self._callbacks.on_saved(path, step, kind)

    def on_preview(self, path: Path, step: int, prompt: str) -> None:
        self._callbacks.on_preview(path, step, prompt)

    def on_waiting(self, reason: str, returns: bool = False) -> None:
        self._callbacks.on_waiting(reason, returns)

    def on_warning(self, text: str) -> None:
        if not (self._after and text.startswith(FINISHED_BEFORE)):
            self._callbacks.on_warning(text)
