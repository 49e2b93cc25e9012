"""Runs of several processes, for tests: torch is imported once, and each process is a fork of that one.

    results = runs(tmp_path, {"two": (2, [settings, ...]), "one": (1, [settings])})

asks ``python -m tests.several``, which is started by the first test that needs it and ends with the tests. It forks the
processes of one entry after the other.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def runs(folder: Path, plan: dict[str, Any], timeout: float = 400, **environment: str) -> dict[str, Any]:
    """Of each entry what its ranks said: [{"code": exit code, "said": text, "results": [...]}, ...], by name.

    An entry is (processes, settings of one run after the other[, stage]); those of one stage run at the same time.
    A run's settings may have, besides those of ``TrainConfig``, "_act": the name of a function in this module and its
    arguments, which is called in each process before the run. "_command": it is run as the command does, with signals.
    """
    path = folder / "plan.json"
    entries = {name: (*entry, 0)[:3] for name, entry in plan.items()}
    path.write_text(json.dumps({"entries": entries, "environment": environment}), encoding="utf-8")
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{path}\n")
    server.stdin.flush()
    answered, _, _ = select.select([server.stdout], [], [], timeout)
    assert answered and server.stdout.readline() == "done\n", f"no answer within {timeout} s, see the error above"

    def answer(name: str, rank: int) -> dict[str, Any]:
        written = folder / f"{name}.{rank}.json"
        said = (folder / f"{name}.{rank}.txt").read_text()
        return {**json.loads(written.read_text()), "said": said}

    return {name: [answer(name, rank) for rank in range(entry[0])] for name, entry in plan.items()}


@lru_cache(maxsize=1)
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.several"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _main() -> None:
    import diffusers.optimization  # noqa: F401

    import lora_trainer.cli.train
    import lora_trainer.run
    import lora_trainer.training.processes  # noqa: F401
    from lora_trainer.requirements import import_networks

    import_networks()
    gc.freeze()  # or whoever frees memory in a fork goes through all that was imported, and copies it
    for line in sys.stdin:
        path = Path(line.rstrip("\n"))
        plan = json.loads(path.read_text(encoding="utf-8"))
        for stage in sorted({stage for _, _, stage in plan["entries"].values()}):  # what fails mostly waits
            entries = {name: entry[:2] for name, entry in plan["entries"].items() if entry[2] == stage}
            _run_at_once(path.parent, entries, plan["environment"])
        print("done", flush=True)


def _run_at_once(folder: Path, entries: dict[str, Any], environment: dict[str, str]) -> None:
    children = {}
    for name, (size, settings) in entries.items():
        port = free_port()
        for rank in range(size):
            answer = folder / f"{name}.{rank}"
            child = os.fork()
            if child == 0:
                os.environ.update(environment)
                _child(answer, rank, size, port, settings)
            children[child] = answer
    started = time.monotonic()
    while children:
        child, status = os.waitpid(-1, 0)
        answer = children.pop(child)
        written = answer.parent / f"{answer.name}.json"
        results = json.loads(written.read_text()) if written.exists() else []
        code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - started
        written.write_text(json.dumps({"code": code, "results": results, "seconds": seconds}))


def _child(answer: Path, rank: int, size: int, port: int, settings: list[dict[str, Any]]) -> None:
    """Never returns."""
    code = 1
    out = os.open(f"{answer}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if (timeout := settings[0].pop("_timeout", None)) is not None:
        from lora_trainer.training import processes

        processes.COLLECTIVE_SECONDS = timeout
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))  # fmt: skip
    try:
        code = _train(answer, settings)
    except BaseException:  # noqa: BLE001 - a fork must not return into its parent's code
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(answer: Path, settings: list[dict[str, Any]]) -> int:
    from lora_trainer.cli.train import joined, run_training
    from lora_trainer.config import TrainConfig, from_mapping
    from lora_trainer.errors import RankFailedError, UserError
    from lora_trainer.run import file_lender, train
    from lora_trainer.training.callbacks import TrainCallbacks

    class Listener(TrainCallbacks):
        def on_warning(self, text):
            print("warning:", text)

    results = []
    try:
        if settings[0].pop("_command", False):
            act = settings[0].pop("_act")
            globals()[act[0]](*act[1:])
            code, result = run_training(from_mapping(settings[0]))
            results.append({"status": result.status})
            return code
        with joined(TrainConfig(device="cpu")) as ranks:
            for values in settings:
                act = values.pop("_act", None)
                if act is not None:
                    globals()[act[0]](ranks, *act[1:])
                config = from_mapping(values)
                result = train(config, file_lender(config, ranks), callbacks=Listener(), ranks=ranks)
                results.append({"status": result.status, "step": result.step, "loss": result.loss})
    except (UserError, RankFailedError) as error:
        print(f"error: {error}")
        return error.code
    finally:
        Path(f"{answer}.part").write_text(json.dumps(results))  # the watch may end this process at any moment
        os.replace(f"{answer}.part", f"{answer}.json")
    return 0


def all_reduce_alone(ranks: Any) -> None:
    """Gradients are added up by one flat all-reduce, however few they are."""
    from lora_trainer.training import gradients

    gradients.ORDERED_BYTES = 0


def dawdle(ranks: Any, seconds: float) -> None:
    """Rank 1 takes its time over a picture, rank 0 over previews and in a pause; the other one waits."""
    from lora_trainer.dataset.cache import TensorCache
    from lora_trainer.training.loop import Trainer

    slow = {0: [(Trainer, "_obey"), (Trainer, "_draw_previews")], 1: [(TensorCache, "put")]}[ranks.rank]
    def slowed(original: Any, left: list[int]) -> Any:
        def slowly(*arguments: Any) -> Any:
            time.sleep(seconds * (left.pop() if left else 0))
            return original(*arguments)

        return slowly

    for of, method in slow:
        setattr(of, method, slowed(getattr(of, method), [1]))


def count_gathered(ranks: Any) -> None:
    """Says at the end of a run how many blocks of a base that is kept together this process has, of how many bytes
    each part is, and how many blocks were whole at once."""
    import weakref

    import numpy
    import torch

    from lora_trainer.models.sharding import ShardedBlocks
    from lora_trainer.training.processes import Processes

    alive: list[int] = []
    most = [0, 0]
    gathered, cleared = Processes._gathered, ShardedBlocks.clear

    def counted(self: Processes, number: int) -> torch.Tensor:
        whole = gathered(self, number)
        memory = numpy.empty(len(whole) + 64, numpy.uint8)  # whose end can be seen, as a tensor's cannot
        alive.append(number)
        weakref.finalize(memory, alive.remove, number)
        most[0], most[1] = max(most[0], len(alive)), most[1] + 1
        tensor = torch.from_numpy(memory)
        tensor = tensor[-tensor.data_ptr() % 64 :][: len(whole)]
        return tensor.copy_(whole)

    def told(self: ShardedBlocks) -> None:
        print(json.dumps({"kept": self.bytes, "blocks": len(self._parts), "at once": most[0], "gathered": most[1]}))
        cleared(self)

    Processes._gathered, ShardedBlocks.clear = counted, told


def stop(ranks: Any, step: int) -> None:
    """This run is stopped when so many steps are done."""
    from lora_trainer.training.loop import Trainer

    original = Trainer._obey

    def obey(trainer: Trainer) -> None:
        if trainer.step == step:
            Trainer._obey = original
            trainer.commands.stop_and_save()
        original(trainer)

    Trainer._obey = obey


def interrupt(rank: int) -> None:
    """One rank is sent SIGTERM in its first step."""
    from lora_trainer.training.step import TrainingStep

    if int(os.environ["RANK"]) != rank:
        return
    original, sent = TrainingStep.__call__, []

    def slowly(*arguments: Any) -> Any:
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        time.sleep(0.1)
        return original(*arguments)

    TrainingStep.__call__ = slowly


def fail(ranks: Any, rank: int, where: str, how: str) -> None:
    """One rank fails: killed, by an error, hanging, or for want of memory, whatever is tried against it."""
    import torch

    from lora_trainer.dataset.cache import TensorCache
    from lora_trainer.models.families.parts import PartedModel
    from lora_trainer.training import state
    from lora_trainer.training.step import TrainingStep

    if ranks.rank != rank:
        return
    short = how == "memory"
    of, method = {
        "caching": (PartedModel, "encode_images") if short else (TensorCache, "put"),
        "step": (TrainingStep, "_backward" if short else "_until_it_fits"),
        "save": (state, "save_file") if short else (state.StateStore, "save"),
    }[where]
    original, calls = getattr(of, method), []

    def failing(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if short and len(calls) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if not short and (len(calls) == 3 or where == "save"):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "error":
                raise RuntimeError("something broke")
            time.sleep(300)
        return original(*arguments, **named)

    setattr(of, method, failing)


if __name__ == "__main__":
    _main()
