"""A run that was killed or ended goes on from its state, or says why it does not."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.errors import UserError
from tests.training.fakes import OPTIMIZERS, Killed, Run, configuration, kill, metrics, same


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema_decay": 0.9, "train_text_encoder": True, "random_crop": True, "flip": True, "rank_dropout": 0.3},
        {"shuffle_tags": True, "tag_dropout": 0.3, "caption_dropout": 0.3, "lr_scheduler": "constant", "preserve": 0.4},
        {"preserve": 0.5, "preserve_pictures": 3, "trigger_word": "zwx"},
    ],
    ids=["plain", "everything", "captions", "base pictures"],
)
def test_killed_after_any_step_and_resumed_the_result_is_the_same_to_the_bit(tmp_path, optimizer, settings):
    settings = {"optimizer": optimizer, "epochs": 3, "save_steps": 2, "lr_warmup_steps": 2, **settings}
    whole = Run(configuration(tmp_path / "whole", **settings))
    outcome = whole.trainer.run()
    assert outcome.status == "finished" and outcome.step == 6
    for step in range(1, 7):
        folder = tmp_path / f"killed{step}"
        config = configuration(folder, **settings)
        with pytest.raises(Killed):
            Run(config, on={step: kill}).trainer.run()
        torch.manual_seed(step)  # what the host did to the global generator meanwhile
        resumed = Run(config)
        assert resumed.trainer.run().loss == outcome.loss
        assert resumed.recorder.reports[0].step == (step - 1) // 2 * 2 + 1, "it went on from the last state"
        assert same(resumed.final, whole.final)
        assert metrics(resumed) == metrics(whole)


@pytest.mark.parametrize("micro", range(4))
def test_killed_in_the_middle_of_an_accumulation(tmp_path, micro, monkeypatch):
    settings = {"batch_size": 1, "gradient_accumulation_steps": 2, "epochs": 2, "save_steps": 1}
    whole = Run(configuration(tmp_path / "whole", **settings))
    whole.trainer.run()
    config = configuration(tmp_path / "killed", **settings)
    killed = Run(config)
    predict, calls = killed.model.predict, iter(range(100))

    def dies(*arguments):
        if next(calls) == micro:
            raise Killed
        return predict(*arguments)

    killed.model.predict = dies
    with pytest.raises(Killed):
        killed.trainer.run()
    resumed = Run(config)
    resumed.trainer.run()
    assert same(resumed.final, whole.final) and metrics(resumed) == metrics(whole)


def test_killed_while_the_state_or_the_final_lora_is_written(tmp_path, monkeypatch):
    whole = Run(configuration(tmp_path / "whole", save_steps=1))
    whole.trainer.run()
    for number, victim in enumerate(["save_file", "os.replace"]):
        for call in range(1, 5):
            config = configuration(tmp_path / f"{number}-{call}", save_steps=1)
            run, calls = Run(config), iter(range(1, 100))
            with monkeypatch.context() as patch:
                module = "lora_trainer.training.state.save_file" if victim == "save_file" else "os.replace"
                original = __import__("safetensors.torch").torch.save_file if number == 0 else __import__("os").replace

                def dies(*arguments, original=original, calls=calls, call=call, **options):
                    if next(calls) == call:
                        raise Killed
                    return original(*arguments, **options)

                patch.setattr(module, dies)
                with pytest.raises(Killed):
                    run.trainer.run()
            resumed = Run(config)
            resumed.trainer.run()
            assert same(resumed.final, whole.final) and metrics(resumed) == metrics(whole)


def test_a_finished_run_is_not_trained_again(tmp_path):
    config = configuration(tmp_path)
    first = Run(config)
    first.trainer.run()
    again = Run(config)
    assert again.trainer.run().status == "finished"
    assert not again.recorder.reports and same(again.final, first.final)
    assert "finished before" in again.recorder.warnings[0]


def test_other_settings_start_anew_and_leave_the_old_state(tmp_path):
    first = Run(configuration(tmp_path), run_key={"learning_rate": 1e-2, "images": "a"})
    first.trainer.run()
    other = Run(configuration(tmp_path), run_key={"learning_rate": 1e-3, "images": "a"})
    other.trainer.run()
    assert "learning_rate" in other.recorder.warnings[0] and "images" not in other.recorder.warnings[0]
    assert other.recorder.reports[0].step == 1
    assert len(list((tmp_path / "out" / "state").iterdir())) == 2
    assert (tmp_path / "out" / "logs" / "metrics-1.jsonl").exists(), "the curves of the first run are kept"


def test_resume_never_and_resume_by_path_with_a_new_learning_rate(tmp_path):
    first = Run(configuration(tmp_path, save_steps=2), on={3: kill})
    with pytest.raises(Killed):
        first.trainer.run()
    path = first.trainer.states.path(2)
    anew = Run(configuration(tmp_path, resume="never"))
    anew.trainer.run()
    assert anew.recorder.reports[0].step == 1
    faster = configuration(tmp_path, resume=str(path), learning_rate=0.5, lr_scheduler="constant")
    onward = Run(faster)
    onward.trainer.run()
    assert onward.recorder.reports[0].step == 3 and onward.recorder.reports[0].lr == 0.5
    assert "learning_rate" in onward.recorder.warnings[0]


@pytest.mark.parametrize("old, new", [("adamw", "adafactor"), ("adafactor", "adamw")])
def test_a_state_of_another_optimizer_is_refused_by_its_name(tmp_path, old, new):
    first = Run(configuration(tmp_path, optimizer=old, epochs=1), run_key={"optimizer": old})
    first.trainer.run()
    path = next((tmp_path / "out" / "state").glob("*.state"))
    config = configuration(tmp_path / "new", optimizer=new, resume=str(path), epochs=3)
    with pytest.raises(UserError, match=old) as error:
        Run(config, run_key={"optimizer": new}).trainer.run()
    assert error.value.field == "resume" and len(str(error.value)) < 300


def test_the_new_settings_count_when_a_state_is_named(tmp_path):
    first = Run(configuration(tmp_path, epochs=1, optimizer_args={"weight_decay": 0.5, "betas": [0.5, 0.6]}))
    first.trainer.run()
    path = next((tmp_path / "out" / "state").glob("*.state"))
    arguments = {"optimizer_args": {"weight_decay": 0.25}, "ema_decay": 0.9}
    run = Run(configuration(tmp_path / "new", epochs=3, resume=str(path), **arguments))
    run.trainer._resume()
    (group,) = run.trainer.train_step.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.25, (0.9, 0.999))
    with run.trainer.train_step.averaged():
        assert same(run.adapters.state_dict(), first.final), "the average begins at the state, not at an empty LoRA"


def test_a_state_of_another_adapter_or_optimizer_is_refused_with_the_field(tmp_path):
    Run(configuration(tmp_path / "a")).trainer.run()
    (path,) = (tmp_path / "a" / "out" / "state").iterdir()
    for index, settings in enumerate([{"lora_rank": 2}, {"optimizer": "adafactor", "train_text_encoder": True}]):
        with pytest.raises(UserError) as error:
            Run(configuration(tmp_path / str(index), resume=str(path), **settings)).trainer.run()
        assert error.value.field == "resume" and error.value.remedy
