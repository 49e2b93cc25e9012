"""A job on GPUs of its own: the same command as on a command line, in processes beside the server.

They report in lines of JSON and take commands through a pipe. It closes when this process ends, however it ends, and
then they stop. Pages come and go meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import lora_trainer
from lora_trainer.config import TrainConfig, to_yaml
from lora_trainer.errors import UserError, concerning
from lora_trainer.files import atomic_write

if TYPE_CHECKING:
    from lora_trainer.host.base import DeviceLeft, Host
    from lora_trainer.models.base import Lender
    from lora_trainer.run import Result
    from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands

_LOOK_SECONDS = 0.1  # between two looks at what somebody wants
_PAUSE_SECONDS = 60.0  # for the processes to pause, before the host gets its device all the same
_LEAVING_SECONDS = 60.0  # for the processes to end by themselves, before they are ended
_ERROR = "error: "

log = logging.getLogger(__name__)


def check_gpus(config: TrainConfig, host: Host) -> None:
    """Raises UserError where there are no such GPUs. On a CPU the numbers stand for that many processes."""
    from lora_trainer.devices import gpu_count

    count = gpu_count()
    if config.gpus and _on_gpus(config, host) and max(config.gpus) >= count:
        remedy = f"The last one is {count - 1}." if count else "Leave it empty."
        raise UserError(f"There is no GPU {max(config.gpus)}.", field="gpus", remedy=remedy)


def own_config(config: TrainConfig, host: Host) -> TrainConfig:
    """The settings for the processes: the files that they read the base model from, what it predicts, and their device.

    Raises UserError when there is no such base model.
    """
    device = "auto" if _on_gpus(config, host) else "cpu"
    config = dataclasses.replace(config, gpus=None, device=device)
    if config.task == "text":
        return config
    with concerning("base_model"):
        files = host.model_files(config.base_model)
        predicted = _predicted(config, host)
    return dataclasses.replace(
        config,
        **predicted,
        base_model=str(files.model),
        vae=config.vae or (None if files.vae is None else str(files.vae)),
        text_encoders=config.text_encoders or [str(path) for path in files.text_encoders],
    )


def _predicted(config: TrainConfig, host: Host) -> dict[str, Any]:
    """What the model predicts where the host holds it, which may know more of that than the file does."""
    from lora_trainer.host.base import LenderOptions
    from lora_trainer.models.families import get_family

    options = LenderOptions(v_prediction=config.v_prediction, zero_terminal_snr=config.zero_terminal_snr)
    info = host.lender(config.base_model, options).describe()
    if "v_prediction" in get_family(info.family).unused:
        return {}
    return {
        "v_prediction": info.prediction_type == "v_prediction",
        "zero_terminal_snr": info.zero_terminal_snr,
    }


def own_lender(config: TrainConfig, host: Host) -> Lender:
    """Describes the model that the processes will read; raises UserError where they could not."""
    from lora_trainer.run import file_lender

    check_gpus(config, host)
    return file_lender(dataclasses.replace(own_config(config, host), device="cpu", mixed_precision="no"))


def train_in_processes(
    config: TrainConfig, host: Host, callbacks: TrainCallbacks, commands: TrainCommands, log_path: Path
) -> Result:
    """``run.train`` in a process for each of ``config.gpus``. log_path: gets what they print beside their progress.

    Raises:
        UserError: what one of them has raised, or that one has failed.
        ProcessError: something that nobody foresaw has happened in one of them.
    """
    from lora_trainer.run.lines import RESUME  # torch is slow to import: not before the first job

    check_gpus(config, host)
    settings = Path(config.output_dir).parent / "processes.yaml"
    atomic_write(settings, to_yaml(own_config(config, host)))
    count = len(config.gpus or ())
    with _device_left(config, host) as device, log_path.open("ab") as errors:
        begun = errors.tell()
        process = subprocess.Popen(
            _command(settings, count), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env=_environment(config, host), start_new_session=sys.platform != "win32",
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        log.info("%s processes train it, started by process %s", count, process.pid)
        relay = _Relay(process.stdin, commands)
        try:
            last = _follow(process.stdout, callbacks, relay, device)
            code = process.wait()
        finally:
            relay.end()
            _end(process)
    if last is None:
        raise UserError(_sentence(log_path, begun, code), remedy=RESUME)
    return _outcome(last, commands)


class ProcessError(Exception):
    """Something was raised in another process. kind: the name of its type. text: its own."""

    def __init__(self, kind: str, text: str, out_of_memory: bool):
        super().__init__(text)
        self.kind, self.out_of_memory = kind, out_of_memory


def _on_gpus(config: TrainConfig, host: Host) -> bool:
    return (host.device().type if config.device == "auto" else config.device) != "cpu"


def _device_left(config: TrainConfig, host: Host) -> AbstractContextManager[DeviceLeft | None]:
    """Where one of the GPUs is the host's, the host's model leaves it."""
    shared = _on_gpus(config, host) and host.device().index in (config.gpus or ())
    return host.device_left() if shared else nullcontext()


def _command(settings: Path, count: int) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(count)]
    train = ["-m", "lora_trainer", "train", "--config", str(settings), "--progress", "json", "--commands"]
    return [sys.executable, *(["-m", *launcher] if count > 1 else []), *train]


def _environment(config: TrainConfig, host: Host) -> dict[str, str]:
    own = str(Path(lora_trainer.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    if sys.platform == "win32":
        environment["USE_LIBUV"] = "0"  # torch for Windows is built without it
    if _on_gpus(config, host):
        environment["CUDA_VISIBLE_DEVICES"] = visible(config.gpus or (), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return environment


def visible(gpus: Sequence[int], now: str | None) -> str:
    """``CUDA_VISIBLE_DEVICES`` for processes that are to see these GPUs of those that are visible ``now``."""
    names = now.split(",") if now else None
    return ",".join(names[number].strip() if names else str(number) for number in sorted(gpus))


def _follow(
    out: IO[bytes], callbacks: TrainCallbacks, relay: _Relay, device: DeviceLeft | None
) -> dict[str, Any] | None:
    """Pass on what the processes report, until they end; returns their last word, if there is one."""
    from lora_trainer.run.lines import tell

    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def read() -> None:
        for line in out:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="lora-trainer-lines", daemon=True).start()
    last, asked = None, None
    while True:
        if device is not None:
            if not device.somebody_waits:
                asked = None
            elif asked is None:
                asked = time.monotonic()
            elif relay.has_paused or time.monotonic() - asked > _PAUSE_SECONDS:
                with device.rest():
                    asked = None
            relay.need_device(asked is not None)
        try:
            line = lines.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            continue
        if line is None:
            return last
        try:
            facts = tell(line.decode("utf-8", "replace"), callbacks)
            if facts is not None and facts["event"] == "paused":
                relay.heard_pause()
            else:
                last = facts or last
        except ValueError:  # what some library prints
            log.info("%s", line.decode("utf-8", "replace").rstrip())


class _Relay:
    """Passes commands on to the processes, from a thread of its own, as they are given."""

    def __init__(self, pipe: IO[bytes], commands: TrainCommands):
        self._pipe, self._commands = pipe, commands
        self._over, self._device_needed, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._paused = False
        self._thread = threading.Thread(target=self._pass_on, name="lora-trainer-relay", daemon=True)
        self._thread.start()

    def need_device(self, needed: bool) -> None:
        """The processes pause while it is needed, whatever is commanded."""
        (self._device_needed.set if needed else self._device_needed.clear)()

    def heard_pause(self) -> None:
        """The processes say that they wait. They say it again and again."""
        self._answered.set()

    @property
    def has_paused(self) -> bool:
        """Whether they have said so since they were last told to pause."""
        return self._paused and self._answered.is_set()

    def end(self) -> None:
        """Close the pipe: the processes stop."""
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            self._pipe.close()

    def _pass_on(self) -> None:
        stopped = False
        while not self._over.wait(_LOOK_SECONDS):
            if self._commands.take_save():
                self._say("save_now")
            if self._commands.take_preview():
                self._say("preview_now")
            if self._commands.stopping and not stopped:
                stopped = True
                self._say("stop_and_save" if self._commands.saves_before_stop else "stop")
            wanted = self._commands.paused or self._device_needed.is_set()
            if wanted != self._paused:
                self._answered.clear()
                self._paused = wanted
                self._say("pause" if wanted else "resume")

    def _say(self, word: str) -> None:
        with suppress(OSError):  # they have ended
            self._pipe.write(f"{word}\n".encode())
            self._pipe.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """The processes have ended afterwards; torchrun passes a signal on to its own."""
    for end in (lambda: None, process.terminate, process.kill):
        end()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LEAVING_SECONDS)
            return


def _sentence(log_path: Path, begun: int, code: int) -> str:
    """Why the processes have ended without a word: the first that one of them has left in the log."""
    with log_path.open("rb") as file:
        file.seek(begun)
        lines = file.read().decode("utf-8", "replace").splitlines()
    said = (line[len(_ERROR) :] for line in lines if line.startswith(_ERROR))
    return next(said, f"The training's processes have ended with the exit code {code}.")


def _outcome(last: dict[str, Any], commands: TrainCommands) -> Result:
    """What the last word says: the result, or the error that is raised."""
    from lora_trainer.run.lines import result_of

    if last["event"] == "result":
        if last["saved"]:  # a run may stop itself
            commands.stop_and_save()
        return result_of(last)
    if "unforeseen" in last:
        kind, _, text = last["unforeseen"].partition(": ")
        raise ProcessError(kind, text, last["out_of_memory"])
    raise UserError(last["message"], field=last["field"], remedy=last["remedy"])
