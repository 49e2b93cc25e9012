"""What ``preserve`` keeps of what the base knew, and what it costs.

    python -m tests.benchmarks.preserve FOLDER --shape arrow --preserve 0.4 --steps 500

Teaches the demo's base a shape that it has never seen, without regularization pictures, and scores prompts for the new
shape and for the known ones, in color and background pairs that were kept out of the training. Any setting can follow;
with save_steps the LoRAs that were saved on the way are scored as well.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lora_trainer.demo.shapes import KNOWN_SHAPES
from lora_trainer.run import file_lender, train
from tests.benchmarks.unseen import UNSEEN, Asked, begin, changed, run_config, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(UNSEEN), default="arrow")
    parser.add_argument("--preserve", type=float, default=0.0)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--count", type=int, default=64, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--no-base", action="store_true", help="do not score the base alone")
    options = begin(parser)
    config = run_config(
        options.shape, options.folder, options.pictures, preserve=options.preserve, max_train_steps=options.steps
    )
    config = changed(config, options.settings)
    started, cpu = time.perf_counter(), time.process_time()
    result = train(config, file_lender(config))
    minutes, cpu = (time.perf_counter() - started) / 60, (time.process_time() - cpu) / 60
    asked = [Asked.of((options.shape,), options.count), Asked.of(KNOWN_SHAPES, options.count)]
    print(f"{options.shape}, preserve {config.preserve:g}, {result.step} steps: {minutes:.1f} min, {cpu:.1f} of a core")
    saved = sorted(result.lora.parent.glob(f"{config.output_name}-step*.safetensors"))
    for lora in [*([] if options.no_base else [None]), *saved, result.lora]:
        new, known = scores(config, lora, asked, options.shape)
        print(f"  {'base alone' if lora is None else lora.stem}", flush=True)
        print(f"    the new shape     {new}\n    the known shapes  {known}", flush=True)


if __name__ == "__main__":
    main()
