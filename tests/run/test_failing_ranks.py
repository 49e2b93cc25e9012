"""One of several processes fails: the others say which one and end, and the run goes on from its last state."""

from __future__ import annotations

import itertools
import os

import pytest

from tests.language_models import tiny_language_model, write_rows
from tests.pictures import draw_dataset
from tests.run.test_ranks import same, weights
from tests.several import runs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

PATIENCE = 12
WHERE, HOW = {"caching": 1, "step": 1, "save": 0}, ("kill", "error", "hang")
FEW = [("caching", "error"), ("step", "kill"), ("save", "hang"), *((where, "memory") for where in WHERE)]
ALL = [(where, how) for where, how in itertools.product(WHERE, HOW) if (where, how) not in FEW]


def failures(folder, tiny_base, cases):
    """Each case with two processes, and the same run again by one and by two."""
    model, rows = tiny_language_model(folder / "model"), write_rows(folder / "rows.jsonl")
    common = {"lora_rank": 2, "learning_rate": 1e-3, "save_precision": "fp32", "tensorboard": False, "batch_size": 1,
              "gradient_accumulation_steps": 2, "epochs": 1, "output_name": "disc", "save_steps": 1}  # fmt: skip
    kinds = {
        "pictures": {**common, "base_model": str(tiny_base), "resolution": 64,
                     "train_data_dir": str(draw_dataset(folder / "data", 8))},
        "text": {**common, "task": "text", "base_model": str(model), "train_data_dir": str(rows), "dropout": 0.1},
    }  # fmt: skip
    plan = {}
    for number, (where, how) in enumerate(cases):
        kind = "pictures" if where == "caching" else "text"
        settings = {**kinds[kind], "output_dir": str(folder / f"{where} {how}")}
        sharded = {"shard_base": True, "gradient_checkpointing": True} if where == "step" else {}
        plan[f"{where} {how}"] = (2, [{**settings, **sharded, "_act": ["fail", WHERE[where], where, how]}], 0)
        plan[f"{where} {how} again"] = (1 + number % 2, [settings], 1)
        plan[f"{kind} whole"] = (1, [{**kinds[kind], "output_dir": str(folder / f"{kind} whole")}], 1)
    signal = {**kinds["text"], "epochs": 100, "output_dir": str(folder / "signal")}
    plan["signal"] = (2, [{**signal, "_act": ["interrupt", 1], "_command": True}], 0)
    return folder, runs(folder, plan, LORA_TRAINER_PATIENCE=str(PATIENCE))


@pytest.fixture(scope="module")
def few(tmp_path_factory, tiny_base):
    return failures(tmp_path_factory.mktemp("failing"), tiny_base, FEW)


@pytest.fixture(scope="module")
def others(tmp_path_factory, tiny_base):
    return failures(tmp_path_factory.mktemp("failing"), tiny_base, ALL)


def look(found, where, how):
    folder, said = found
    failed, survivor = WHERE[where], said[f"{where} {how}"][1 - WHERE[where]]
    code = 2 if how == "memory" and where != "save" else 1  # to try again is of no use, or may be
    assert survivor["code"] == code and survivor["seconds"] < 90, survivor["said"]  # 60 and a busy machine's start
    # On a busy machine the run says it, and the watch as well, since the run takes long to leave.
    (sentence,) = {line for line in survivor["said"].splitlines() if line.startswith("error:")}
    assert f"Rank {failed} on {os.uname().nodename} " in sentence
    raised = f"raise LORA_TRAINER_PATIENCE (now {PATIENCE})"
    short = {"caching": "A picture of 64×64 cannot be encoded", "step": "memory does not suffice for step",
             "save": "Memory does not suffice to save the training state of step 3"}  # fmt: skip
    words = {"kill": ("no sign of life", "lost the conn"), "error": ("something broke",), "hang": (raised,),
             "memory": (short[where],)}  # fmt: skip
    # Here rank 0 keeps the store, which ends with it.
    assert any(one in sentence for one in words[how]), sentence
    assert how != "memory" or not list((folder / f"{where} {how}").rglob("*.tmp")), "nothing half written"
    assert [rank["code"] for rank in said[f"{where} {how} again"]] == [0] * len(said[f"{where} {how} again"])
    kind = "pictures" if where == "caching" else "text"
    assert same(weights(folder / f"{kind} whole"), weights(folder / f"{where} {how}"))


@pytest.mark.parametrize(("where", "how"), FEW)
def test_the_others_end_and_the_run_goes_on(few, where, how):
    look(few, where, how)


def test_a_signal_to_one_of_them_is_every_ones_exit_code(few):
    ranks = few[1]["signal"]
    assert [(rank["code"], rank["results"]) for rank in ranks] == [(130, [{"status": "stopped"}])] * 2, ranks


@pytest.mark.slow
@pytest.mark.parametrize(("where", "how"), ALL)
def test_wherever_it_fails(others, where, how):
    look(others, where, how)
