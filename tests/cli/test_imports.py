"""What a training imports, and how."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

from lora_trainer.cli import main
from lora_trainer.cli.imports import uncollected
from tests.pictures import draw_dataset

ROOT = Path(__file__).parents[2]
NOT_NEEDED = {
    *("pandas", "scipy", "matplotlib", "gradio", "fastapi", "uvicorn", "tensorboard", "open_clip", "timm"),
    *(f"lora_trainer.{part}" for part in ("api", "ui", "jobs", "host", "planning", "workspace", "loras", "demo")),
    "transformers.models.clip.tokenization_clip",  # the captions are encoded already
}
PROGRAM = """
import gc, json, sys
from lora_trainer.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, gc.isenabled(), gc.get_freeze_count(), sorted(sys.modules)]))
"""


def test_a_training_whose_cache_is_warm_imports_what_it_needs_without_the_collector(tmp_path, tiny_base):
    command = ["train", f"train_data_dir={draw_dataset(tmp_path / 'data')}", f"base_model={tiny_base}", "resolution=64",
               f"output_dir={tmp_path / 'out'}", "max_train_steps=1", "resume=never", "overwrite=true",
               "tensorboard=false", "rank=2"]  # fmt: skip
    assert main(command) == 0
    again = subprocess.run([sys.executable, "-c", PROGRAM, *command], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    code, collects, frozen, modules = json.loads(again.stdout.splitlines()[-1])
    assert code == 0 and not NOT_NEEDED & set(modules)
    assert collects and frozen > 100_000, "what was imported is looked through again at every collection"


def test_the_collector_of_a_process_that_has_torch_is_left_alone():
    frozen = gc.get_freeze_count()
    with uncollected():
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == frozen
