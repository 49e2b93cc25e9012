"""``shard_base``: several processes keep a base together, and train the LoRA that each with a whole one trains."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.config import TrainConfig, from_mapping
from lora_trainer.errors import UserError
from lora_trainer.models.families import get_family
from lora_trainer.models.sharding import WHOLE_BLOCKS
from lora_trainer.run import file_lender, train
from lora_trainer.training.processes import Processes
from tests import flux as tiny
from tests.devices import pretended_gpu
from tests.language_models import tiny_language_model, write_rows
from tests.pictures import draw_dataset
from tests.several import runs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

PICTURES = {
    "resolution": 64,
    "min_bucket_resolution": 64,
    "bucket_step": 16,
    "target_modules": ["attention", "feed_forward"],
}
KINDS = {
    "plain": {"preview_prompts": ["a red circle --s 2"], "preview_steps": 2, "validation_share": 0.2,
              "preserve": 0.5, "trigger_word": "zwx", "preserve_pictures": 2},
    "nf4, LoKr": {"base_precision": "nf4", "adapter": "lokr"},
    "fp8, DoRA, text encoder": {"base_precision": "fp8", "dora": True, "train_text_encoder": True},
    "text": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder with a folder for each run, and what the processes said."""
    folder = tmp_path_factory.mktemp("runs")
    # In bf16, which is cast: MKL rounds fp32 products by where in memory a weight begins, and one of a file is mapped.
    base = tiny.tiny_flux(folder / "flux", dtype=torch.bfloat16, double=1, single=2)
    flux = {**base, **PICTURES}
    flux["train_data_dir"] = str(draw_dataset(folder / "data", 6))
    model, rows = tiny_language_model(folder / "model"), write_rows(folder / "rows.jsonl")
    text = {"task": "text", "base_model": str(model), "train_data_dir": str(rows)}
    settings = {
        "lora_rank": 2,
        "learning_rate": 1e-2,
        "save_precision": "fp32",
        "tensorboard": False,
        "gradient_accumulation_steps": 3,  # one process has two micro-batches of a step, and the other one
        "max_train_steps": 3,
        "gradient_checkpointing": True,
        "output_name": "disc",
    }
    plan: dict = {"whole": (2, []), "sharded": (2, [])}
    for how, (_, of) in plan.items():
        for kind, more in KINDS.items():
            given = {**settings, **(text if kind == "text" else flux), **more, "output_dir": str(folder / how / kind)}
            of.append({**given, "shard_base": how == "sharded"})
    plan["sharded"][1][0]["_act"] = ["count_gathered"]
    said = runs(folder, plan)
    for ranks in said.values():
        assert [rank["code"] for rank in ranks] == [0] * len(ranks), "\n".join(rank["said"] for rank in ranks)
    return folder, said


@pytest.mark.parametrize("kind", KINDS)
def test_the_lora_is_the_same_to_the_last_bit(found, kind):
    name = "adapter_model.safetensors" if kind == "text" else "disc.safetensors"
    one, other = (load_file(next((found[0] / how / kind).rglob(name))) for how in ("whole", "sharded"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def told(rank):
    return [json.loads(line) for line in rank["said"].splitlines() if line.startswith('{"kept"')]


def test_a_process_keeps_half_of_the_blocks_and_has_one_whole_at_a_time(found):
    folder, said = found
    whole = load_file(next((folder / "flux").rglob("flux.safetensors")))
    of_blocks = sum(tensor.nbytes for name, tensor in whole.items() if "_blocks." in name)
    for rank in said["sharded"]:
        runs = told(rank)
        assert len(runs) == len(KINDS) and {run["blocks"] for run in runs} == {3, 2}
        assert 0.5 * of_blocks <= runs[0]["kept"] <= 0.55 * of_blocks  # each weight begins at a multiple of 256 bytes
        assert runs[1]["kept"] < 0.5 * runs[0]["kept"], "nf4, and the others bf16"
        assert max(run["at once"] for run in runs) <= WHOLE_BLOCKS


def test_what_rank_0_alone_draws_and_measures_is_the_same(found):
    whole, sharded = (found[0] / how / "plain" for how in ("whole", "sharded"))
    pictures = {path.name: path.read_bytes() for path in (whole / "previews").iterdir()}
    assert len(pictures) == 3  # of the base, on the way, at the end
    assert pictures == {path.name: path.read_bytes() for path in (sharded / "previews").iterdir()}
    measured = [
        [line for line in (run / "logs" / "metrics.jsonl").read_text().splitlines() if "validation" in line]
        for run in (whole, sharded)
    ]
    assert measured[0] == measured[1] != []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "shard_base: One process alone"),
        ({"gradient_checkpointing": False}, "Set gradient_checkpointing: true"),
        ({"offload_blocks": 2}, "cannot be combined with offload_blocks"),
        ({"task": "text", "quantize": "nf4"}, "nor with quantize: nf4"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(tmp_path, tiny_base, changes, sentence):
    settings = {"base_model": str(tiny_base), "train_data_dir": str(draw_dataset(tmp_path / "data", 1)),
                "output_dir": str(tmp_path), "shard_base": True, "gradient_checkpointing": True, **changes}  # fmt: skip
    with pytest.raises(UserError, match=re.escape(sentence)):
        config = from_mapping(settings)
        train(config, file_lender(config))


def test_a_family_whose_blocks_stay_whole_says_so():
    with pytest.raises(UserError, match=r"Stable Diffusion.* is not trained on a base of which"):
        get_family("sd1").check_settings(TrainConfig(shard_base=True, gradient_checkpointing=True))


def test_a_block_that_does_not_fit_ends_the_run_since_the_others_wait_for_it():
    with pretended_gpu(memory=3000):
        process = Processes.__new__(Processes)
        process.size, process._parts = 4, [torch.zeros(1000, dtype=torch.uint8, device="cuda")]
        with pytest.raises(UserError, match="does not suffice for a whole block"):
            process._gathered(0)
