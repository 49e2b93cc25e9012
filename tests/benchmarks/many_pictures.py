"""What many pictures cost, on a small model: CPU seconds, megabytes read, bytes a picture.

    python -m tests.benchmarks.many_pictures 1000 10000

scan: reading the folder, where every tenth picture is excluded. plan: the batches of an epoch. facts: what the LoRA's
metadata say of the pictures. encode: a run that encodes the pictures and captions, until half of the pictures are done,
and the same run again, to its first step (only with --encode; else zeros are kept, and the row says what is left). warm
start: the same run where all is encoded. pictures a CPU second: encoded by one process, and by each of two that share
them. check: what ``check`` does. The pictures are small, so that MB read say what is read besides them.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lora_trainer.cli.train import joined
from lora_trainer.config import load, to_yaml
from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.buckets import BatchPlan
from lora_trainer.dataset.checks import check_folder
from lora_trainer.dataset.folder import scan
from lora_trainer.dataset.picture_edits import PictureEdit, save_edits
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.run import file_lender, train
from lora_trainer.run.saving import run_facts
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.ranks import ALONE, Ranks
from lora_trainer.training.source import WHOLE
from tests.tiny import tiny_sd1

WORDS = [f"{color} {thing}" for color in ("red", "blue", "green", "old", "wooden") for thing in (
    "dress", "house", "lamp", "tree", "sky", "chair", "river", "hat", "street", "window", "bird", "coat")]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=int, nargs="+", help="numbers of pictures")
    parser.add_argument("--encode", action="store_true", help="encode the pictures and captions")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        config = load(options.rank_of)
        with joined(config) as ranks:
            print(run(config, not options.encode, ranks=ranks).rate)
        return
    print("| pictures | what | CPU s | s | MB read |\n|---|---|---|---|---|")
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), count, options.encode)


def measure(folder: Path, count: int, encode: bool) -> None:
    data = folder / "data"
    draw(data, count)
    base = tiny_sd1(folder / "base.safetensors", mult=(1, 1), depths=(1, 0), layers=1)
    config = TrainConfig(
        train_data_dir=str(data), output_dir=str(folder / "out"), base_model=str(base), resolution="64", lora_rank=1,
        epochs=2, batch_size=4, tensorboard=False, device="cpu", trigger_word="zwx",
    )  # fmt: skip
    with row(count, "scan"):
        dataset = scan(config)
    lender = file_lender(config)
    with row(count, "plan"):
        plan = BatchPlan.from_config(dataset, config, 64, 8)
        plan.epoch(0)
    with row(count, "facts"):
        run_facts(config, lender.describe(), dataset, plan, "fp32", 1)
    del dataset, plan
    what = "encode" if encode else "encode zeros"
    with row(count, f"{what}, half of the pictures"):
        start(config, zeros=not encode, half=True)
    with row(count, f"{what}, the rest"):
        start(config, zeros=not encode)
    time.sleep(2.1)  # younger files are read
    with row(count, "warm start"):
        start(config)
    tracemalloc.start()
    before = _held()
    held = start(config, first=_held) - before
    print(f"| {count:,} | bytes a picture after the first step | {held / count:.0f} |", flush=True)
    tracemalloc.stop()
    for size in (1, 2):
        anew = replace(config, cache_dir=str(folder / f"cache{size}"), output_dir=str(folder / f"out{size}"))
        rates = " and ".join(f"{rate:.0f}" for rate in together(anew, size, zeros=not encode))
        print(f"| {count:,} | {what}: pictures a CPU second of {size} | {rates} |", flush=True)
    with row(count, "check"):
        check_folder(data, trigger_word="zwx", resolution=64)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"| {count:,} | the process's most memory, MB | {most} |", flush=True)


def draw(folder: Path, count: int) -> None:
    """Different pictures of 64 × 64 pixels, and their captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        colors = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        path = folder / f"{number:06}.jpg"
        Image.fromarray(colors).resize((64, 64), Image.Resampling.BICUBIC).save(path, quality=80)
        path.with_suffix(".txt").write_text(", ".join(["zwx", *rng.choice(WORDS, 8)]))
    save_edits(folder, {f"{number:06}.jpg": PictureEdit(excluded=True) for number in range(0, count, 10)})


class Zeros(FileLender):
    """Its model encodes pictures and captions at once, as zeros and as what the empty caption gives."""

    @contextmanager
    def borrow(self) -> Iterator[Any]:
        with super().borrow() as model:
            encode = model.encode_prompts
            empty = lru_cache(lambda *how: encode([""], *how))
            model.encode_images = lambda pixels: torch.zeros(len(pixels), 8, *(side // 8 for side in pixels.shape[2:]))
            model.encode_prompts = lambda captions, longest, weighted, rows=WHOLE: empty(longest, weighted)
            yield model


class Stopping(TrainCallbacks):
    """Stops after the first step, or when half of the pictures are encoded. first: called after the step.

    rate: pictures that this process has encoded in a CPU second.
    """

    found: Any = None
    rate = 0.0

    def __init__(self, commands: TrainCommands, first: Callable[[], Any], half: bool = False):
        self._commands, self._first, self._half = commands, first, half
        self._begun = 0, 0, 0.0  # pictures in all and encoded, and CPU seconds

    def on_phase(self, name: str, done: int, total: int) -> None:
        if name != "latents":
            return
        if self._begun[0] != total:  # what a process tries, what it encodes, and what is missing then
            self._begun = total, done, time.process_time()
        _, before, cpu = self._begun
        if done > before:
            self.rate = (done - before) / (time.process_time() - cpu)
        if self._half and 2 * done >= total:
            self._commands.stop()

    def on_step(self, report: Any) -> None:
        self.found = self._first()
        self._commands.stop()


def start(
    config: TrainConfig, zeros: bool = False, first: Callable[[], Any] = lambda: None, half: bool = False
) -> Any:
    return run(config, zeros, first, half).found


def run(
    config: TrainConfig,
    zeros: bool,
    first: Callable[[], Any] = lambda: None,
    half: bool = False,
    ranks: Ranks = ALONE,
) -> Stopping:
    commands = TrainCommands()
    callbacks = Stopping(commands, first, half)
    lender = file_lender(config)
    if zeros:
        lender.__class__ = Zeros
    train(config, lender, callbacks=callbacks, commands=commands, ranks=ranks)
    return callbacks


def together(config: TrainConfig, size: int, zeros: bool) -> list[float]:
    """Of each of so many processes the pictures that it encodes in a CPU second."""
    settings = Path(config.output_dir).with_suffix(".yaml")
    settings.write_text(to_yaml(config), encoding="utf-8")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "tests.benchmarks.many_pictures", "0", "--rank-of", str(settings)]
    started = [
        subprocess.Popen(
            [*command, *(["--encode"] if not zeros else [])], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank in range(size)
    ]  # fmt: skip
    return [float(process.communicate()[0].split()[-1]) for process in started]


@contextmanager
def row(count: int, what: str) -> Iterator[None]:
    read, cpu, started = _bytes_read(), time.process_time(), time.monotonic()
    yield
    cpu, seconds, read = time.process_time() - cpu, time.monotonic() - started, _bytes_read() - read
    print(f"| {count:,} | {what} | {cpu:.1f} | {seconds:.1f} | {read / 1e6:.1f} |", flush=True)


def _held() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def _bytes_read() -> int:
    """By this process, from the disk's cache as well; 0 where the system does not tell."""
    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return 0
    return int(counts["rchar"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
