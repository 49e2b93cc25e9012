"""A command is started again when it fails, unless it would fail again; signals stop what is supervised."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from lora_trainer.cli import main
from lora_trainer.cli.train import interruptible

FAILS = "import pathlib, os, sys; tried = pathlib.Path(sys.argv[1]); tried.write_text(tried.read_text() + 'x');"
NOTE = "pathlib.Path(os.environ['LORA_TRAINER_EXIT_CODES'], '0').write_text(sys.argv[2]);"
"""As a training's process leaves its exit code, which torchrun does not pass on."""


@pytest.mark.parametrize(
    ("ends", "code", "times"),
    [
        ("sys.exit(0)", 0, 1),
        ("sys.exit(1)", 1, 3),
        ("os.kill(os.getpid(), 9)", 1, 3),
        ("sys.exit(0 if len(tried.read_text()) == 2 else 1)", 0, 2),
        ("sys.exit(2)", 2, 1),
        (NOTE + "sys.exit(1)", 2, 1),
        ("sys.exit(130)", 130, 1),
        ("import time; os.kill(os.getppid(), 15); time.sleep(9)", 130, 1),
    ],
)
def test_what_is_started_again(tmp_path, ends, code, times):
    tried = tmp_path / "tried"
    tried.write_text("")
    arguments = ["supervise", "--restarts", "2", "--wait", "0", "--", sys.executable, "-S", "-c", FAILS + ends]
    assert main([*arguments, str(tried), "2"]) == code
    assert tried.read_text() == "x" * times


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_on_windows_the_console_has_told_the_command_and_it_may_finish(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    ends = "import os, time; os.kill(os.getppid(), 2); time.sleep(0.3)"
    assert main(["supervise", "--wait", "0", "--", sys.executable, "-S", "-c", ends]) == 0


def test_a_command_that_is_not_there_is_a_sentence(capsys):
    assert main(["supervise", "--", "no-such-launcher"]) == 2
    assert "no-such-launcher cannot be started" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sigterm_stops_and_saves_as_ctrl_c_does_and_never_ends_at_once(number):
    asked = []
    with interruptible(lambda: asked.append(1), "Stopping.") as stopped:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
    assert asked == [1] and len(stopped) == 1
    with pytest.raises(KeyboardInterrupt), interruptible(lambda: None, "Stopping."):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_one_ctrl_c_that_a_launcher_passes_on_counts_once():
    with interruptible(lambda: None, "", passed_on=True) as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert len(stopped) == 1
