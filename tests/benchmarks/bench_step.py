"""Our training step against that of diffusers + PEFT, on the same weights and the same batch (see ``sides``).

    python -m tests.benchmarks.bench_step                          tiny width, on the GPU if there is one
    python -m tests.benchmarks.bench_step --size full --device cpu --resolution 256

Timed in one process, one step of each in turn, so that both see the same machine. diffusers' own loop would encode the
pictures and captions anew in every step; we never do: only what both do is compared. Peak memory is that of the warm-up
in a process of each side's own: of the GPU's allocator, or on the CPU of the whole process. A ratio below 1 is in our
favor.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lora_trainer.training.compiling import TIMED_PASSES
from tests.benchmarks.sides import RANK, Work, diffusers_step, our_step, write_base

MAKERS = {"ours": our_step, "diffusers": diffusers_step}
SIDES = tuple(MAKERS)


def work_of(options: argparse.Namespace) -> Work:
    return Work(
        size=options.size,
        resolution=options.resolution,
        batch_size=options.batch_size,
        device=options.device,
        mixed_precision=options.mixed_precision,
        gradient_checkpointing=options.gradient_checkpointing,
        targets=options.targets,
        changes=(("compile", "auto"),) if options.compile else (),
    )


def time_steps(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each timed step, by side; sides alternate and change who goes first."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    work = work_of(options)
    with our_step(work, folder) as ours, diffusers_step(work, folder) as theirs:
        steps = dict(zip(SIDES, (ours, theirs)))
        for number in range(options.warmup + options.steps):
            for side in SIDES if number % 2 else reversed(SIDES):
                _synchronize(work)
                started = time.perf_counter()
                steps[side](number)
                _synchronize(work)
                if number >= options.warmup:
                    seconds[side].append(time.perf_counter() - started)
    return seconds


def _synchronize(work: Work) -> None:
    if work.precision.device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(side: str, folder: Path) -> int:
    """Bytes at the peak of the warm-up's steps in a process of its own."""
    arguments = [*sys.argv[1:], "--measure", side, "--folder", str(folder)]
    command = [sys.executable, "-m", "tests.benchmarks.bench_step", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(answer.splitlines()[-1])["bytes"]


def measure(options: argparse.Namespace) -> None:
    """The child's part of ``peak_memory``."""
    import diffusers
    import peft  # noqa: F401 - both sides import the same libraries, so that these do not count

    del diffusers
    work = work_of(options)
    on_gpu = work.precision.device.type == "cuda"
    with MAKERS[options.measure](work, Path(options.folder)) as step:
        gc.collect()  # loading may have taken more for a moment
        torch.cuda.reset_peak_memory_stats() if on_gpu else Path("/proc/self/clear_refs").write_text("5")
        for number in range(options.warmup):
            step(number)
    print(json.dumps({"bytes": torch.cuda.max_memory_allocated() if on_gpu else _peak_resident()}))


def _peak_resident() -> int:
    """Bytes of this process at its peak (Linux). getrusage would tell the parent's where that was larger."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mixed-precision", default="auto", choices=("auto", "no", "fp16", "bf16"))
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--targets", choices=("attention", "all"), default="attention", help="layers that learn")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="our blocks compiled, which happens in the warm-up")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        options.warmup = max(options.warmup, 2 * (1 + TIMED_PASSES))
    if options.measure:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_base(folder, work_of(options))
        seconds = time_steps(options, folder)
        memory = {side: peak_memory(side, folder) for side in SIDES}
    report(options, seconds, memory)


def report(options: argparse.Namespace, seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    precision = work_of(options).precision
    on_gpu = precision.device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    run = f"{options.resolution} px, batch {options.batch_size}, rank {RANK} on {options.targets}, {precision.name}"
    print(f"SD1 {options.size}, {run}, {where}")
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    for side in SIDES:
        spread = statistics.quantiles(seconds[side], n=4)
        print(
            f"  {side:<10} median {medians[side] * 1000:8.1f} ms  (quartiles {spread[0] * 1000:.1f} … "
            f"{spread[2] * 1000:.1f})  peak {memory[side] / 2**20:8.0f} MiB"
        )
    ratios = [values["ours"] / values["diffusers"] for values in (medians, memory)]
    print(f"  ratio      time {ratios[0]:.3f}  memory {ratios[1]:.3f}")


if __name__ == "__main__":
    main()
