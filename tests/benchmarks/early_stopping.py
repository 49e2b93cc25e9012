"""Whether held-out pictures choose the right checkpoint.

    python -m tests.benchmarks.early_stopping FOLDER --seeds 0 1 2 3 4
    python -m tests.benchmarks.early_stopping FOLDER --pictures 48 --seeds 0

Teaches the demo's base a shape that it has never seen from few pictures and for far too many steps, keeps a checkpoint
at every measurement, and scores each of them on prompts in color and background pairs that were kept out of the
training. Prints, for each seed, the checkpoint that is recommended, the one of the lowest validation loss, the last
one, and the best one by the scores, which an oracle would choose; and whether the run would have been stopped early.
Every score goes to FOLDER/scores-SEED.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from lora_trainer.run import file_lender, train
from lora_trainer.run.outputs import Outputs
from lora_trainer.training.validation import Measurement, verdict
from tests.benchmarks.unseen import UNSEEN, Asked, Score, begin, changed, run_config, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(UNSEEN), default="moon")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pictures", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every", type=int, default=40, help="steps between two measurements")
    parser.add_argument("--count", type=int, default=64, help="prompts for each checkpoint")
    options = begin(parser)
    for seed in options.seeds:
        _one_seed(options, seed)


def _one_seed(options: argparse.Namespace, seed: int) -> None:
    folder = options.folder / f"{options.pictures}-{seed}"
    config = run_config(
        options.shape,
        folder,
        options.pictures,
        seed=seed,
        batch_size=options.batch,
        max_train_steps=options.steps,
        save_steps=options.every,
        validation_steps=options.every,
        validation_share=max(0.1, 2 / options.pictures),
        early_stopping="advise",
    )
    config = changed(config, options.settings)
    started = time.perf_counter()
    result = train(config, file_lender(config))
    minutes = (time.perf_counter() - started) / 60
    measured = _measurements(folder)
    outputs = Outputs(folder, config.output_name, "")
    steps = [one.step for one in measured if one.step]
    files = [result.lora if step == result.step else outputs.checkpoint(step) for step in steps]
    asked = [Asked.of((options.shape,), options.count)]
    by_step = {step: scores(config, file, asked, options.shape)[0] for step, file in zip(steps, files)}
    table = [{**one.to_dict(), **dataclasses.asdict(by_step[one.step])} for one in measured if one.step]
    (options.folder / f"scores-{options.pictures}-{seed}.json").write_text(json.dumps(table, indent=1))
    _report(options, seed, measured, by_step, minutes)


def _measurements(folder: Path) -> list[Measurement]:
    lines = (json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    names = [field.name for field in dataclasses.fields(Measurement)]
    return [Measurement(**{name: line[name] for name in names}) for line in lines if line.get("kind") == "validation"]


def _report(
    options: argparse.Namespace, seed: int, measured: list[Measurement], by_step: dict[int, Score], minutes: float
) -> None:
    patience = 3
    found = [verdict(measured[:end], patience) for end in range(1, len(measured) + 1)]
    stopped = next((one.step for one, said in zip(measured, found) if said and said.stops), None)
    lowest = min(measured, key=lambda one: one.validation).step
    recommended, last = found[-1].best, measured[-1].step
    oracle = max(by_step, key=lambda step: by_step[step].whole)
    print(f"seed {seed}, {options.pictures} pictures, {minutes:.1f} min; stopped early: {stopped or 'no'}")
    for title, step in (
        ("recommended", recommended),
        ("lowest loss", lowest),
        ("last", last),
        ("oracle", oracle),
    ):
        print(f"  {title:<12} step {step:>5}  {by_step.get(step, 'the base itself')}", flush=True)


if __name__ == "__main__":
    main()
