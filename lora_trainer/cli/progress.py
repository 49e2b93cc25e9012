"""What a terminal shows of a run: one bar per phase, with loss, speed and time left."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from lora_trainer.training.callbacks import StepReport, TrainCallbacks

_SMOOTHING = 0.95  # of the shown loss; a single step's says little


class Silence(TrainCallbacks):
    """Of a process whose run another one reports."""

    def close(self) -> None:
        """Nothing was opened."""


class ProgressBar(TrainCallbacks):
    """Draws with tqdm, which also behaves where there is no terminal (one line now and then)."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._phase = ""
        self._loss: float | None = None

    def on_phase(self, name: str, done: int, total: int) -> None:
        if name == "training" or not total:  # the steps have a bar of their own; what is not counted has none
            return
        bar = self._show(name, total, "")
        bar.update(done - bar.n)
        if done >= total:
            self.close()

    def on_step(self, report: StepReport) -> None:
        bar = self._show("training", report.total_steps, "step")
        if bar.n == 0 and report.step > 1:  # resumed: the speed counts from here
            bar.initial = bar.n = report.step - 1
        if report.loss is not None:
            known = self._loss
            self._loss = report.loss if known is None else _SMOOTHING * known + (1 - _SMOOTHING) * report.loss
        loss = "–" if self._loss is None else f"{self._loss:.4f}"
        bar.set_postfix_str(f"loss {loss}, lr {report.lr:.2e}, epoch {report.epoch}/{report.epochs}", refresh=False)
        bar.update(report.step - bar.n)

    def on_saved(self, path: Path, step: int, kind: str) -> None:
        if kind == "lora":
            tqdm.write(f"saved {path}", file=sys.stderr)

    def on_preview(self, path: Path, step: int, prompt: str) -> None:
        tqdm.write(f"preview {path}", file=sys.stderr)

    def on_warning(self, text: str) -> None:
        tqdm.write(f"warning: {text}", file=sys.stderr)

    def on_waiting(self, reason: str, returns: bool = False) -> None:
        tqdm.write(f"waiting: {reason}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._phase = ""

    def _show(self, phase: str, total: int, unit: str) -> tqdm:
        if self._bar is None or self._phase != phase:
            self.close()
            self._bar = tqdm(total=total, desc=phase, unit=unit or "it", file=sys.stderr, dynamic_ncols=True)
            self._phase = phase
        return self._bar
