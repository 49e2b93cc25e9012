"""Several processes train one LoRA: the one that a single process trains."""

from __future__ import annotations

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
        "epochs": 2,
        "gradient_accumulation_steps": 3,  # 4 micro-batches in an epoch: 3, then 1
        "output_name": "disc",
        "seed": 1,
    }


CASES = {
    "plain": {},
    "ema, module dropout": {"ema_decay": 0.9, "module_dropout": 0.3},
    "random crops": {"random_crop": True, "flip": True},
    "text encoders": {"train_text_encoder": True, "batch_size": 1, "epochs": 1},
}


@pytest.fixture(scope="module")
def found(base, tmp_path_factory):
    """Each case with 1, 2 and 4 processes, and what differs between them."""
    folder = tmp_path_factory.mktemp("runs")
    model = tiny_language_model(folder / "model")
    text = {"task": "text", "base_model": str(model), "train_data_dir": str(write_rows(folder / "rows.jsonl")),
            "resolution": "auto"}  # fmt: skip
    cases = {**CASES, "text": text}
    plan = {}
    for size in (1, 2, 4):
        settings = []
        for number, changes in enumerate(cases.values()):
            settings.append({**base, **changes, "output_dir": str(folder / f"{size}-{number}")})
            if size == 4:
                settings[-1]["gradient_accumulation_steps"] = 4
        if size == 1:
            settings += [{**one, "gradient_accumulation_steps": 4, "output_dir": one["output_dir"] + "of4"} for one in settings]
        plan[str(size)] = (size, settings)
    said = runs(folder, plan)
    for ranks in said.values():
        assert [rank["code"] for rank in ranks] == [0] * len(ranks), "\n".join(rank["said"] for rank in ranks)
    return folder, list(cases), said


def weights(folder, case, number):
    return load_file(folder / number / ("disc/adapter_model.safetensors" if case == "text" else "disc.safetensors"))


@pytest.mark.parametrize("case", [*CASES, "text"])
def test_two_and_four_processes_train_what_one_does(found, case):
    folder, names, _ = found
    number = names.index(case)
    for one, several in ((f"1-{number}", f"2-{number}"), (f"1-{number}of4", f"4-{number}")):
        expected, made = weights(folder, case, one), weights(folder, case, several)
        assert expected.keys() == made.keys()
        assert all(torch.equal(expected[name], made[name]) for name in expected), several
