"""Runs that hold pictures out: what they measure, keep, say, and when they stop."""

from __future__ import annotations

import json
import re

import pytest

from lora_trainer.config import TrainConfig
from lora_trainer.errors import UserError
from lora_trainer.run import engine, summary
from lora_trainer.run.outputs import Outputs
from lora_trainer.training.callbacks import TrainCommands
from lora_trainer.training.loop import Outcome
from lora_trainer.training.validation import Measurement, Verdict, recommended
from tests.pictures import draw_dataset
from tests.run.runs import Listener, assert_same_weights, run

DIVERGES = {"learning_rate": 1.0, "early_stopping_patience": 1, "validation_steps": 2, "epochs": 8, "save_steps": 100}
"""So high a rate that all pictures are soon predicted worse than by the base."""


@pytest.fixture
def settings(tmp_path, tiny_base):
    return {
        "train_data_dir": str(draw_dataset(tmp_path / "data", 7)),
        "base_model": str(tiny_base),
        "output_dir": str(tmp_path / "out"),
        "output_name": "disc",
        "resolution": 64,
        "lora_rank": 4,
        "batch_size": 2,
        "epochs": 2,
        "learning_rate": 1e-3,
        "save_precision": "fp32",
        "tensorboard": False,
        "validation_share": 0.2,
        "validation_steps": 3,
        "trigger_word": "zwx",
    }


def measured(folder):
    lines = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("kind") == "validation"], [line for line in lines if "kind" not in line]


def test_a_run_measures_pictures_that_it_does_not_train(settings, tmp_path):
    listener = Listener()
    result = run(settings, listener)
    measurements, steps = measured(tmp_path / "out")
    assert result.total_steps == len(steps) == 6 and sum(line["images"] for line in steps) == 2 * 5, "7 pictures, 2 out"
    assert [line["step"] for line in measurements] == [0, 3, 6] and measurements[0]["drift"] == 0
    assert all(line["validation"] > 0 and line["training"] > 0 for line in measurements)
    assert measurements[-1]["drift"] > 0
    assert any("Not trained, but measured" in warning for warning in listener.warnings)
    assert result.verdict in summary(result)


def test_measuring_changes_nothing_of_the_result(settings, tmp_path):
    often = run(settings, validation_steps=1, dropout=0.2, caption_dropout=0.3, output_dir=str(tmp_path / "often"))
    seldom = run(settings, validation_steps=100, dropout=0.2, caption_dropout=0.3, output_dir=str(tmp_path / "seldom"))
    assert_same_weights(often.lora, seldom.lora)


def test_a_run_that_was_interrupted_measures_and_says_the_same(settings, tmp_path):
    whole = run(settings, output_dir=str(tmp_path / "whole"), epochs=3)
    commands = TrainCommands()
    stop = Listener(lambda report: commands.stop_and_save() if report.step == 4 else None)
    assert run(settings, stop, commands, epochs=3).status == "stopped"
    resumed = run(settings, epochs=3)
    assert resumed.status == "finished" and resumed.verdict == whole.verdict
    assert_same_weights(whole.lora, resumed.lora)
    assert measured(tmp_path / "out")[0] == measured(tmp_path / "whole")[0]


@pytest.mark.slow
def test_stopped_early_and_gone_on_with_more_patience_is_as_if_never_stopped(settings, tmp_path):
    whole = run(settings, **DIVERGES, early_stopping="off", output_dir=str(tmp_path / "whole"))
    listener = Listener()
    stopped = run(settings, listener, **DIVERGES, early_stopping="stop")
    assert stopped.status == "stopped" and 0 < stopped.step < whole.step
    assert any("learning rate is too high" in warning for warning in listener.warnings)
    gone_on = run(settings, **{**DIVERGES, "early_stopping_patience": 900}, early_stopping="stop")
    assert gone_on.status == "finished" and gone_on.step == whole.step
    assert_same_weights(whole.lora, gone_on.lora)


@pytest.mark.slow
def test_the_best_one_is_kept_whatever_keep_checkpoints_says(settings, tmp_path):
    listener = Listener()
    run(settings, listener, keep_checkpoints=1, save_steps=1, validation_steps=1, epochs=3)
    measurements, _ = measured(tmp_path / "out")
    best = recommended([Measurement(**{n: v for n, v in line.items() if n != "kind"}) for line in measurements]).step
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len([name for name in files if "-step" in name]) == 1
    assert ("disc-best.safetensors" in files) == (best > 0)
    if 0 < best < measurements[-1]["step"]:
        again = run(settings, validation_steps=100, save_steps=best, epochs=3, output_dir=str(tmp_path / "again"))
        assert again.status == "finished"
        assert_same_weights(
            tmp_path / "again" / f"disc-step{best:08d}.safetensors", tmp_path / "out" / "disc-best.safetensors"
        )


@pytest.mark.slow
def test_advice_is_given_once_and_the_run_goes_on(settings):
    listener = Listener()
    result = run(settings, listener, **DIVERGES, early_stopping="advise")
    assert result.status == "finished"
    said = [re.sub("from .*", "", warning) for warning in listener.warnings if "has risen since step" in warning]
    assert said and len(said) == len(set(said))


def test_too_few_pictures_are_refused(settings, tmp_path):
    few = draw_dataset(tmp_path / "few", 3)
    with pytest.raises(UserError, match="too few") as error:
        run(settings, train_data_dir=str(few))
    assert error.value.field == "validation_share"


@pytest.mark.parametrize(("kind", "best", "expected"), [("memorising", 4, 4), ("too fast", 4, 4), ("learning", 4, None),
                                                        ("memorising", 8, None), ("memorising", 0, None)])  # fmt: skip
def test_a_step_is_recommended_where_going_on_made_it_worse(tmp_path, kind, best, expected):
    config = TrainConfig(output_dir=str(tmp_path), output_name="disc")
    outputs = Outputs.of(config, "digest")
    if best:
        outputs.best.touch()
    outcome = Outcome("finished", 8, 8, 2, None, 1.0, None, Verdict(kind, best, "A sentence."))
    assert engine._result(config, None, outputs, outcome).recommended == expected
