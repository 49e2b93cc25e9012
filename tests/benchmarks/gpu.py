"""What a card answers: time, memory and kernels of one training step, ours beside diffusers + PEFT and sd-scripts.

    python -m tests.benchmarks.gpu --json FILE [--sd-scripts CHECKOUT] [--only NAME ...]
    python -m tests.benchmarks.gpu --json FILE --compiled blocks compiled by torch.compile, minutes more
    python -m tests.benchmarks.gpu --json FILE --dry      tiny models on the CPU: does every line of it run?

All sides hold the same weights and stand in one process. Their steps alternate; the median counts, and the ratio of
medians. Peak memory is the allocator's, from before a side loads its weights to the end of its third step, with
nothing else allocated in between. Kernels are counted by torch's profiler in one step. Takes eight minutes on one card.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import statistics
import tempfile
import time
import traceback
from contextlib import ExitStack
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lora_trainer.training.compiling import TIMED_PASSES
from tests.benchmarks.sides import Step, Work, diffusers_step, our_step, sd_scripts_step

WARMUP = 3  # steps, of which the last one's end is where the peak is read
PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")
LOCON = (("conv_rank", 16),)

COMPARED = {
    "sd1 512 b1": Work("sd1", resolution=512),
    "sd1 512 b4": Work("sd1", resolution=512, batch_size=4),
    "sdxl 1024 b1": Work("sdxl", resolution=1024),
    "sdxl 1024 b1 checkpointing": Work("sdxl", resolution=1024, gradient_checkpointing=True),
}
"""Ours beside the peers."""
OURS = {
    "sd1 512 b1 fp16": Work("sd1", mixed_precision="fp16"),
    "sd1 512 b1 fp16 lent, bf16 computed": Work("sd1", weight_dtype=torch.float16),
    "sd1 512 b1 fp32": Work("sd1", mixed_precision="no"),
    "sd1 512 b1 LoCon": Work("sd1", changes=LOCON),
    "sd1 512 b1 DoRA": Work("sd1", changes=(("dora", True),)),
    "sd1 512 b1 LoHa": Work("sd1", changes=(("adapter", "loha"),)),
    "sd1 512 b1 LoKr": Work("sd1", changes=(("adapter", "lokr"),)),
    "sd1 512 b1 dropout": Work("sd1", changes=(("dropout", 0.1),)),
    "sd1 512 b1 CUDA graphs": Work("sd1", changes=(("cuda_graphs", "auto"),)),
    "sdxl 1024 b1 CUDA graphs": Work("sdxl", resolution=1024, changes=(("cuda_graphs", "auto"),)),
    "sd1 512 b1 channels_last": Work("sd1", changes=(("channels_last", "auto"),)),
    "sdxl 1024 b1 channels_last": Work("sdxl", resolution=1024, changes=(("channels_last", "auto"),)),
    "sdxl 1024 b1 fp16 lent, bf16 computed": Work("sdxl", resolution=1024, weight_dtype=torch.float16),
    "sdxl 1024 b1 DoRA": Work("sdxl", resolution=1024, changes=(("dora", True),)),
}
"""Ours alone."""
COMPILED = {
    "sd1 512 b1 compiled": Work("sd1", changes=(("compile", "auto"),)),
    "sd1 512 b1 compiled, CUDA graphs": Work("sd1", changes=(("compile", "auto"), ("cuda_graphs", "auto"))),
    "sdxl 1024 b1 compiled": Work("sdxl", resolution=1024, changes=(("compile", "auto"),)),
}
"""Ours alone, which takes minutes to compile."""


def compare(name: str, works: dict[str, Work], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Median milliseconds, peak MiB and kernels of each side, by its name."""
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        steps: dict[str, Step] = {}
        for side, work in works.items():
            try:
                steps[side], found[side] = _prepare(side, work, options, folder, stack)
            except Exception as error:  # noqa: BLE001 - the other sides' figures count all the same
                found[side] = {"failed": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
        for side, milliseconds in _time(steps, options).items():
            low, _, high = statistics.quantiles(milliseconds, n=4)
            found[side] |= {"ms": statistics.median(milliseconds), "quartiles": [low, high]}
    _empty()
    ours = found.get("ours", {})
    for side, figures in found.items():
        if side != "ours" and "ms" in figures and "ms" in ours:
            figures["ours / this"] = {key: ours[key] / figures[key] for key in ("ms", "peak_mib") if figures.get(key)}
    _print(name, found)
    return found


def _prepare(
    side: str, work: Work, options: argparse.Namespace, folder: Path, stack: ExitStack
) -> tuple[Step, dict[str, Any]]:
    """A side, warmed up, and what its first steps told."""
    _empty()
    on_card = work.precision.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_card else 0
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    if side == "sd-scripts":
        step = stack.enter_context(sd_scripts_step(work, folder, options.sd_scripts))
    else:
        make = {"ours": our_step, "diffusers": diffusers_step}[side]
        step = stack.enter_context(make(work, folder))
    _empty()
    if on_card:  # loading may have taken more for a moment; a step is what is compared
        torch.cuda.reset_peak_memory_stats()
    # A graph is recorded in the step after the eager ones; the peak and the kernels are those with it. So are those
    # after compiled blocks were tried and timed.
    graphs, compiled = ((setting, "auto") in work.changes for setting in ("cuda_graphs", "compile"))
    losses = [step(number) for number in range(WARMUP + 2 * graphs + (1 + 2 * TIMED_PASSES) * compiled)]
    figures: dict[str, Any] = {"losses": losses}
    if on_card:
        figures["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        figures["weights_mib"] = (torch.cuda.memory_allocated() - before) / 2**20
        figures["kernels"] = _kernels(step)
    return step, figures


def _kernels(step: Step) -> int:
    """Kernels and copies that one step launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(WARMUP)
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.device_type.name == "CUDA")


def _time(steps: dict[str, Step], options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each timed step; sides alternate and change who goes first."""
    milliseconds: dict[str, list[float]] = {side: [] for side in steps}
    for number in range(options.steps):
        for side in steps if number % 2 else reversed(steps):
            _synchronize()
            started = time.perf_counter()
            steps[side](WARMUP + 1 + number)
            _synchronize()
            milliseconds[side].append((time.perf_counter() - started) * 1000)
    return milliseconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _print(name: str, found: dict[str, Any]) -> None:
    print(name)
    for side, figures in found.items():
        if "failed" in figures:
            print(f"  {side:<11} failed: {figures['failed'][:200]}")
            continue
        peak = f"{figures['peak_mib']:8.0f} MiB  {figures['kernels']:6d} kernels" if "peak_mib" in figures else ""
        ratios = "  ".join(f"{key} {value:.3f}" for key, value in figures.get("ours / this", {}).items())
        print(f"  {side:<11} {figures['ms']:8.1f} ms {peak}  {'ours / this: ' + ratios if ratios else ''}", flush=True)


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"card": card, "date": date.today().isoformat(), "python": platform.python_version(), "packages": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the figures are written")
    parser.add_argument("--sd-scripts", type=Path, help="a checkout of kohya's sd-scripts, to compare with it too")
    parser.add_argument("--only", nargs="*", help="names of the lines to run (the beginnings of them)")
    parser.add_argument("--compiled", action="store_true", help="only the lines with compiled blocks")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU, two steps")
    options = parser.parse_args()
    if options.dry:
        options.steps, options.sd_scripts = 2, None
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --dry shows that it would run")
    results: dict[str, Any] = {"machine": machine(), "lines": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for name, work in (COMPILED if options.compiled else {**COMPARED, **OURS}).items():
            if options.only and not any(name.startswith(start) for start in options.only):
                continue
            if options.dry:
                work = dataclasses.replace(
                    work, size="tiny", resolution=64, device="cpu", mixed_precision="no", weight_dtype=None
                )
            sides = ["ours", *(["diffusers", "sd-scripts"] if name in COMPARED else [])]
            if options.sd_scripts is None and "sd-scripts" in sides:
                sides.remove("sd-scripts")
            results["lines"][name] = compare(name, dict.fromkeys(sides, work), options, Path(temporary))
            options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")  # a run that is cut off counts


if __name__ == "__main__":
    main()
