"""What a run in a process of its own reports, read as it was written; its commands; and GPUs that are not there."""

from __future__ import annotations

import io
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lora_trainer.errors import RankFailedError, UserError
from lora_trainer.run import Result, lines
from lora_trainer.training.callbacks import StepReport, TrainCallbacks, TrainCommands

STEP = StepReport(3, 10, 1, 2, 0.25, 1e-4, 0.5, 4, 0.4, 5)
SAID = [
    ("on_phase", ("latents", 1, 4)), ("on_step", (STEP,)), ("on_saved", (Path("a/b.safetensors"), 3, "lora")),
    ("on_preview", (Path("a/b.png"), 3, "einen Hut, 帽子\n")), ("on_warning", ('"so"',)),
    ("on_waiting", ("away", True)),
]  # fmt: skip


class Heard(TrainCallbacks):
    def __init__(self):
        self.said = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda *values, **named: self.said.append((name, (*values, *named.values())))


def written(say):
    out = io.StringIO()
    say(lines.ProgressLines(out))
    return out.getvalue().splitlines()


def test_what_is_reported_arrives_as_it_was():
    heard = Heard()
    sent = written(lambda progress: [getattr(progress, name)(*values) for name, values in SAID])
    assert len(sent) == len(SAID) and all(lines.tell(line, heard) is None for line in sent)
    assert heard.said == SAID


def test_a_run_outlives_whoever_listens():
    out, into = os.pipe()
    os.close(out)
    file = os.fdopen(into, "w")
    for _ in range(2):
        lines.ProgressLines(file).on_warning("nobody hears this")
    with suppress(OSError):
        file.close()


def test_the_last_line_is_the_result():
    result = Result("finished", 9, 9, 1.5, None, lora=Path("a.safetensors"), usage=("Use it.",), recommended=4)
    (line,) = written(lambda progress: progress.end(result, saved=True))
    last = lines.tell(line, TrainCallbacks())
    assert last["saved"] is True and lines.result_of(last) == result


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (UserError("bad", field="vae", remedy="Mend."), {"message": "bad", "field": "vae", "remedy": "Mend."}),
        (RankFailedError("Rank 1 is gone."), {"message": "Rank 1 is gone.", "field": None, "remedy": lines.RESUME}),
        (MemoryError("x"), {"unforeseen": "MemoryError: x", "out_of_memory": True}),
    ],
)
def test_or_the_error(error, facts):
    (line,) = written(lambda progress: progress.fail(error))
    assert lines.tell(line, TrainCallbacks()) == {"event": "error", **facts}


@pytest.mark.parametrize("line", ["Loading …", "3", "{}", '["event"]', ""])
def test_what_a_library_prints_is_no_line_of_ours(line):
    with pytest.raises(ValueError):
        lines.tell(line, TrainCallbacks())


def test_commands_are_words_and_the_pipes_end_is_a_stop_that_saves():
    out, into = os.pipe()
    commands = TrainCommands()
    left = []
    lines.obey(commands, out, lambda: left.append(True))

    def until(condition):
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)

    os.write(into, b"pau")
    os.write(into, b"se\nnonsense\nsave_now\n")
    until(commands.take_save)
    assert commands.paused and not commands.stopping
    os.close(into)
    until(lambda: left)
    assert commands.saves_before_stop and not commands.paused
