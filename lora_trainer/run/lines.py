"""A run in a process of its own: it reports in lines of JSON, and takes commands in lines of one word each.

    {"event": "step", "step": 12, "total_steps": 480, "loss": 0.11, ...}

Both ends are here: ``ProgressLines`` and ``obey`` for the run, ``tell`` for the program that has started it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lora_trainer.errors import Problem, RankFailedError, UserError
from lora_trainer.out_of_memory import is_out_of_memory
from lora_trainer.run.engine import Result
from lora_trainer.training.callbacks import StepReport, TrainCallbacks, TrainCommands

COMMANDS = ("pause", "resume", "save_now", "preview_now", "stop", "stop_and_save")
"""Methods of ``TrainCommands``."""

RESUME = "Resume it: it goes on from its last state."

_FILES = ("lora", "diffusers", "merged", "best")
_LEAVING_SECONDS = 120.0  # for the run to end when nobody listens any more


class ProgressLines(TrainCallbacks):
    """Writes what a run reports."""

    def __init__(self, out: TextIO):
        self._out = out
        self._lock = threading.Lock()

    def on_phase(self, name: str, done: int, total: int) -> None:
        self._write("phase", name=name, done=done, total=total)

    def on_step(self, report: StepReport) -> None:
        self._write("step", **dataclasses.asdict(report))

    def on_saved(self, path: Path, step: int, kind: str) -> None:
        self._write("saved", path=str(path), step=step, kind=kind)

    def on_preview(self, path: Path, step: int, prompt: str) -> None:
        self._write("preview", path=str(path), step=step, prompt=prompt)

    def on_waiting(self, reason: str, returns: bool = False) -> None:
        self._write("waiting", reason=reason, returns=returns)

    def on_warning(self, text: str) -> None:
        self._write("warning", text=text)

    def paused(self) -> None:
        """The run waits."""
        self._write("paused")

    def end(self, result: Result, saved: bool) -> None:
        """saved: a stop was asked for together with a save, be it by the run itself."""
        facts = dataclasses.asdict(result)
        self._write("result", saved=saved, result=facts | {name: _text(facts[name]) for name in _FILES})

    def fail(self, error: Exception) -> None:
        """Whatever ends the run."""
        if isinstance(error, UserError):
            facts: dict[str, Any] = Problem.of(error).to_dict()
        elif isinstance(error, RankFailedError):
            remedy = None if error.code == UserError.code else RESUME
            facts = {"message": str(error), "field": None, "remedy": remedy}
        else:
            facts = {"unforeseen": f"{type(error).__name__}: {error}", "out_of_memory": is_out_of_memory(error)}
        self._write("error", **facts)

    def close(self) -> None:
        """Nothing was opened."""

    def _write(self, event: str, **facts: Any) -> None:
        with self._lock, suppress(OSError):  # nobody listens any more: then the run stops and saves
            self._out.write(json.dumps({"event": event, **facts}) + "\n")
            self._out.flush()


def _leave() -> None:
    time.sleep(_LEAVING_SECONDS)
    os._exit(1)


def obey(commands: TrainCommands, descriptor: int = 0, last_resort: Callable[[], None] = _leave) -> None:
    """Take commands from a file descriptor, in a thread. Its end is the end of whoever has started the run, so the run
    stops and saves; where it does not, ``last_resort`` ends the process.

    The descriptor is read without Python's buffers: a thread that waits in one of those disturbs the end of Python.
    """

    def listen() -> None:
        rest = b""
        while data := os.read(descriptor, 4096):
            *lines, rest = (rest + data).split(b"\n")
            for word in (line.decode("ascii", "replace").strip() for line in lines):
                if word in COMMANDS:
                    getattr(commands, word)()
        commands.stop_and_save()
        last_resort()

    threading.Thread(target=listen, name="lora-trainer-commands", daemon=True).start()


def tell(line: str, callbacks: TrainCallbacks) -> dict[str, Any] | None:
    """Pass on what a line reports. Returns the facts of the last line of a run, which has "event" "result" or "error",
    and of "paused"; None for others. Raises ValueError for a line that is none of ours."""
    facts = json.loads(line)
    if not isinstance(facts, dict) or "event" not in facts:
        raise ValueError(line)
    event = facts["event"]
    if event in ("result", "error", "paused"):
        return facts
    del facts["event"]
    if event == "step":
        callbacks.on_step(StepReport(**facts))
        return None
    if "path" in facts:
        facts["path"] = Path(facts["path"])
    getattr(callbacks, f"on_{event}")(**facts)
    return None


def result_of(facts: dict[str, Any]) -> Result:
    """What ``ProgressLines.end`` has written."""
    values = facts["result"]
    files = {name: None if values[name] is None else Path(values[name]) for name in _FILES}
    return Result(**{**values, **files, "usage": tuple(values["usage"])})


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
