"""Runs of several processes, for tests: torch is imported once, and each process is a fork of that one.

    results = runs(tmp_path, {"two": (2, [settings, ...]), "one": (1, [settings])})

starts ``python -m tests.several PLAN``, which forks the processes of one entry after the other.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def runs(folder: Path, plan: dict[str, tuple[int, list[dict[str, Any]]]], timeout: float = 170) -> dict[str, Any]:
    """Of each entry what its ranks said: [{"code": exit code, "said": text, "results": [...]}, ...], by name.

    An entry is (processes, settings of one run after the other). A run's settings may have, besides those of
    ``TrainConfig``, "_act": the name of a function in this module, which is called in each process before the run.
    """
    path = folder / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.several", str(path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    def answer(name: str, rank: int) -> dict[str, Any]:
        written = folder / f"{name}.{rank}.json"
        return {**json.loads(written.read_text()), "said": written.with_suffix(".txt").read_text()}

    return {name: [answer(name, rank) for rank in range(size)] for name, (size, _) in plan.items()}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _main(plan_path: Path) -> None:
    import diffusers.optimization  # noqa: F401
    import transformers  # noqa: F401

    import lora_trainer.cli.train
    import lora_trainer.run
    import lora_trainer.training.processes  # noqa: F401

    for name, (size, settings) in json.loads(plan_path.read_text(encoding="utf-8")).items():
        port, started = free_port(), time.monotonic()
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                _child(plan_path.parent / f"{name}.{rank}", rank, size, port, settings)
            children.append(child)
        for rank, child in enumerate(children):
            _, status = os.waitpid(child, 0)
            answer = plan_path.parent / f"{name}.{rank}.json"
            results = json.loads(answer.read_text()) if answer.exists() else []
            code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - started
            answer.write_text(json.dumps({"code": code, "results": results, "seconds": seconds}))


def _child(answer: Path, rank: int, size: int, port: int, settings: list[dict[str, Any]]) -> None:
    """Never returns."""
    code = 1
    out = os.open(f"{answer}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
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
    from lora_trainer.cli.train import joined
    from lora_trainer.config import TrainConfig, from_mapping
    from lora_trainer.errors import RankFailedError, UserError
    from lora_trainer.run import file_lender, train
    from lora_trainer.training.callbacks import TrainCallbacks

    class Listener(TrainCallbacks):
        def on_warning(self, text):
            print("warning:", text)

    results = []
    try:
        with joined(TrainConfig(device="cpu")) as (_, ranks):
            for values in settings:
                act = values.pop("_act", None)
                if act is not None:
                    globals()[act](ranks)
                config = from_mapping(values)
                result = train(config, file_lender(config), callbacks=Listener(), ranks=ranks)
                results.append({"status": result.status, "step": result.step, "loss": result.loss})
    except (UserError, RankFailedError) as error:
        print(f"error: {error}")
        return 2 if isinstance(error, UserError) else 1
    finally:
        Path(f"{answer}.json").write_text(json.dumps(results))
    return 0


def all_reduce_alone(ranks: Any) -> None:
    """Gradients are added up by one flat all-reduce, however few they are."""
    from lora_trainer.training import gradients

    gradients.ORDERED_BYTES = 0


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
