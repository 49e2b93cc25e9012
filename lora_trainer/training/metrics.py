"""Curves of a run: ``metrics.jsonl``, one object per optimizer step, and TensorBoard where it is installed.

Between the steps stand the measurements on held-out pictures, objects with ``kind``: "validation".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from PIL import Image

from lora_trainer.files import atomic_write

METRICS_FILE = "metrics.jsonl"
VALIDATION = "validation"
_TITLES = {"validation": "held_out", "training": "trained"}
_LONGEST_TITLE = 80


@dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``.

    step: counted from 1; epoch: counted from 1. loss: mean over the step's batches, null for a skipped step.
    lr: of the first parameter group. seconds: wall time of the step. images: how many pictures this step saw.
    grad_norm: of all gradients together, before clipping; null where it is not finite.
    """

    step: int
    epoch: int
    loss: float | None
    lr: float
    seconds: float
    images: int
    grad_norm: float | None = None


class MetricsLog:
    """Writes the curves into ``directory``; a context manager that closes what it opened.

    step: optimizer steps done before; lines of later ones (written by a run that was killed) are removed. At 0 the
    metrics of an earlier run are kept as ``metrics-1.jsonl``, ``metrics-2.jsonl`` …; so are those of another run in
    the same folder, recognized by ``losses``, those of the last steps before.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        tensorboard: bool | None,
        on_warning: Callable[[str], None],
        losses: Sequence[float] = (),
    ):
        self.path = Path(directory) / METRICS_FILE
        self._step = step
        self._losses = losses
        self._tensorboard = tensorboard
        self._on_warning = on_warning
        self._file: TextIO | None = None
        self._writer: Any = None

    def __enter__(self) -> MetricsLog:
        kept = [line for line in read_metrics(self.path) if line["step"] <= self._step]
        if self._step == 0 or not self._are_ours(kept):
            self._put_aside()
            kept = []
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")
        if self._tensorboard is not False:
            self._writer = self._open_tensorboard()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for sink in (self._file, self._writer):
            if sink is not None:
                sink.close()

    def write(self, metrics: StepMetrics, learning_rates: Mapping[str, float]) -> None:
        """Add a step. ``learning_rates``: of every parameter group by name, for TensorBoard."""
        assert self._file is not None, "use it as a context manager"
        self._file.write(json.dumps(asdict(metrics)) + "\n")
        self._file.flush()
        if self._writer is not None:
            if metrics.loss is not None:
                self._writer.add_scalar("train/loss", metrics.loss, metrics.step)
            if metrics.grad_norm is not None:
                self._writer.add_scalar("train/gradient_norm", metrics.grad_norm, metrics.step)
            for name, value in learning_rates.items():
                self._writer.add_scalar(f"lr/{name}", value, metrics.step)

    def write_measurement(self, values: Mapping[str, Any]) -> None:
        """Add a measurement on held-out pictures: step, epoch, and losses by name."""
        assert self._file is not None, "use it as a context manager"
        self._file.write(json.dumps({"kind": VALIDATION, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if name not in ("step", "epoch"):
                    self._writer.add_scalar(f"validation/{_TITLES.get(name, name)}", value, values["step"])

    def write_preview(self, step: int, prompt: str, picture: Image.Image) -> None:
        """Add a preview, for TensorBoard: each prompt has its row of steps."""
        if self._writer is not None:
            title = prompt[:_LONGEST_TITLE].replace("/", " ")  # a slash would open another group
            self._writer.add_image(f"previews/{title}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def write_text(self, name: str, text: str) -> None:
        """Add a text for TensorBoard, at the start of a run, as it is: Markdown leaves indented lines alone."""
        if self._writer is not None and self._step == 0:
            self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def _are_ours(self, lines: Sequence[Mapping[str, Any]]) -> bool:
        lines = [line for line in lines if "kind" not in line]
        if not lines:
            return True
        loss, lost = lines[-1].get("loss"), self._step - lines[-1]["step"]  # a power cut may cost the last lines
        return loss is None or lost >= len(self._losses) or loss == self._losses[-1 - lost]

    def _put_aside(self) -> None:
        if self.path.exists() and self.path.stat().st_size:
            number = 1
            while (aside := self.path.with_name(f"metrics-{number}.jsonl")).exists():
                number += 1
            self.path.rename(aside)

    def _open_tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter(str(self.path.parent), purge_step=self._step + 1)
        # A host's protobuf often does not fit its tensorboard, which shows as a TypeError or AttributeError on import.
        except (ImportError, TypeError, AttributeError) as error:
            if self._tensorboard:  # else it was to be written if it can be
                self._on_warning(f"No TensorBoard curves ({error}). Install tensorboard, or set tensorboard: false.")
            return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line that was cut off by a kill is left out."""
    lines = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            lines.append(entry)
    return lines
