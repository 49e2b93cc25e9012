"""Several processes train one LoRA: the one that a single process trains."""

from __future__ import annotations

import importlib.util
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from tests.language_models import tiny_language_model, write_rows
from tests.pictures import draw_dataset
from tests.several import runs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("ranks")
    return {
        "train_data_dir": str(draw_dataset(folder / "data", 7)),
        "base_model": str(tiny_base),
        "resolution": 64,
        "lora_rank": 2,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "save_precision": "fp32",
        "tensorboard": False,
        "dropout": 0.1,
        "gradient_accumulation_steps": 3,  # 4 micro-batches in an epoch: 3, then 1
        "epochs": 1,
        "output_name": "disc",
    }


CROPS = {"ema_decay": 0.9, "module_dropout": 0.3, "random_crop": True, "flip": True, "epochs": 2,
         "preserve": 0.5, "trigger_word": "zwx", "preserve_pictures": 3}  # fmt: skip
TEXT_ENCODERS = {"train_text_encoder": True, "max_train_steps": 2}
CASES = [("crops", 1, 2, 3), ("crops", 1, 4, 4), ("text encoders", 1, 2, 3), ("text", 1, 2, 3), ("text", 1, 4, 4)]
"""What is trained, by how many processes it is compared, and micro-batches of a step."""
PRODIGY = {"optimizer": "prodigy", "learning_rate": 1.0, "optimizer_args": {"d0": 1e-3, "d_coef": 1e4}, "epochs": 2,
           "adapter": "lokr", "lokr_factor": 1}  # fmt: skip
"""Its estimate grows at once, and comes of dot products with gradients of which one is a single number."""
TIMEOUT = 10  # of collectives, in seconds


@pytest.fixture(scope="module")
def found(base, tmp_path_factory):
    """The folder with a folder for each run, and what the processes said."""
    folder = tmp_path_factory.mktemp("runs")
    model, rows = tiny_language_model(folder / "model"), write_rows(folder / "rows.jsonl")
    text = {"task": "text", "base_model": str(model), "train_data_dir": str(rows), "resolution": "auto", "epochs": 2}
    changes = {"crops": CROPS, "text encoders": TEXT_ENCODERS, "text": text, "prodigy": PRODIGY}
    plan: dict = {str(size): (size, []) for size in (1, 2, 4)}

    def add(name, size, accumulation, kind, **more):
        settings = {**base, **changes[kind], "gradient_accumulation_steps": accumulation, **more}
        plan[str(size)][1].append({**settings, "output_dir": str(folder / name)})

    for kind, one, several, accumulation in CASES:
        for size in (one, several):
            add(f"{kind} {accumulation} by {size}", size, accumulation, kind)
    add("text 2 by 1", 1, 2, "text")
    add("text 1 by 2", 2, 1, "text")
    if importlib.util.find_spec("prodigyopt"):
        add("prodigy by 1", 1, 3, "prodigy")
        add("prodigy by 2", 2, 3, "prodigy")
        add("prodigy resumed", 2, 3, "prodigy", _act=["stop", 2])
        add("prodigy resumed", 2, 3, "prodigy")
    for size, accumulation in ((2, 2), (2, 4), (4, 4)):  # last, as it stays so
        add(f"text {accumulation} all-reduced by {size}", size, accumulation, "text", _act=["all_reduce_alone"])
    said = runs(folder, plan)
    for ranks in said.values():
        assert [rank["code"] for rank in ranks] == [0] * len(ranks), "\n".join(rank["said"] for rank in ranks)
    return folder, said


def weights(run):
    (path,) = [*run.glob("disc.safetensors"), *run.glob("disc/adapter_model.safetensors")]
    return load_file(path)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("kind", "one", "several", "accumulation"), CASES)
def test_several_processes_train_what_one_does(found, kind, one, several, accumulation):
    alone, together = (weights(found[0] / f"{kind} {accumulation} by {size}") for size in (one, several))
    assert same(alone, together)
    assert any(value.any() for name, value in alone.items() if "lora_up" in name or "lora_B" in name)


def test_they_train_what_one_does_with_prodigy_and_go_on_from_its_state(found):
    pytest.importorskip("prodigyopt")
    folder, said = found
    alone, together, resumed = (weights(folder / f"prodigy {how}") for how in ("by 1", "by 2", "resumed"))
    assert same(alone, together) and same(alone, resumed)
    lines = (folder / "prodigy by 2" / "logs" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr"] for line in lines]
    assert rates[2] > 10 * rates[1], "it has estimated another rate"
    for rank in said["2"]:
        assert [(run["status"], run["step"]) for run in rank["results"][-4:-2]] == [("stopped", 2), ("finished", 4)]


def test_one_flat_all_reduce_gives_the_same_bytes_where_two_numbers_are_added_and_nearly_the_same_elsewhere(found):
    folder, _ = found
    assert same(weights(folder / "text 2 by 1"), weights(folder / "text 2 all-reduced by 2"))
    exact = weights(folder / "text 4 by 1")
    for size in (2, 4):
        near = weights(folder / f"text 4 all-reduced by {size}")
        for name in exact:
            assert torch.allclose(exact[name], near[name], rtol=1e-3, atol=1e-7)


def test_fewer_micro_batches_than_processes_are_raised_said_and_kept(found):
    folder, said = found
    raised = folder / "text 1 by 2"
    assert same(weights(folder / "text 2 by 1"), weights(raised))
    assert "gradient_accumulation_steps: 2\n" in (raised / "disc.config.yaml").read_text(encoding="utf-8")
    heard = [rank["said"].count("gradient_accumulation_steps is 2 instead of 1") for rank in said["2"]]
    assert heard[0] == 1, "and the learning rate is as it was"


@pytest.mark.slow
def test_waiting_lasts_longer_than_a_collective(base, tmp_path):
    """Encoding a picture, a pause and previews take twice as long each."""
    model, rows = tiny_language_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    text = {"task": "text", "base_model": str(model), "train_data_dir": str(rows), "resolution": "auto",
            "shard_base": True, "gradient_checkpointing": True}  # fmt: skip
    plan = {}
    for name, more in {"pictures": {}, "text": text}.items():
        slow = {**base, **more, "max_train_steps": 2, "_act": ["dawdle", 2 * TIMEOUT], "_timeout": TIMEOUT}
        plan[name] = (2, [{**slow, "output_dir": str(tmp_path / name)}])
    for name, said in runs(tmp_path, plan).items():
        assert [rank["code"] for rank in said] == [0, 0], said
        assert said[0]["results"][0]["step"] == 2
        assert said[1]["seconds"] > (6 if name == "pictures" else 4) * TIMEOUT


def test_rank_0_alone_writes_and_counts_every_picture_once(found):
    folder, _ = found
    for name in ("crops 3 by 1", "crops 3 by 2"):
        lines = [json.loads(line) for line in (folder / name / "logs" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4] and sum(line["images"] for line in lines) == 2 * 7
    files = [
        sorted(str(path.relative_to(folder / name)) for path in (folder / name).rglob("*") if path.is_file())
        for name in ("crops 3 by 1", "crops 3 by 2")
    ]
    assert files[0] == files[1], "the same files, those of the cache as well"
