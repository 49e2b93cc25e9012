"""The loop on a model of a few hundred weights: resume to the bit, commands, saves, previews, what is not finite."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext

import pytest
import torch

from lora_trainer.errors import UserError
from lora_trainer.training import loop, state
from lora_trainer.training.ranks import Ranks
from tests.training.fakes import OPTIMIZERS, Killed, Run, configuration, kill, metrics, same


@pytest.mark.parametrize("maximum", [0.0, 1e-3])
def test_the_norm_of_the_gradient_is_written_as_it_was_before_clipping(tmp_path, maximum):
    run = Run(configuration(tmp_path, max_grad_norm=maximum, epochs=1))
    found = []

    def look(*arguments):
        grads = [parameter.grad for parameter in run.adapters.parameters() if parameter.grad is not None]
        found.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))

    run.trainer.train_step.optimizer.register_step_pre_hook(look)
    run.trainer.run()
    written = [line["grad_norm"] for line in metrics(run)]
    if maximum:
        assert found == pytest.approx([maximum] * len(written), rel=1e-3) and min(written) > maximum
    else:
        assert written == pytest.approx(found, rel=1e-5)


def test_every_picture_is_seen_in_every_epoch(tmp_path):
    run = Run(configuration(tmp_path, batch_size=2, gradient_accumulation_steps=3, epochs=3))
    run.trainer.run()
    seen = {}
    for line in metrics(run):
        seen[line["epoch"]] = seen.get(line["epoch"], 0) + line["images"]
    assert seen == {1: 5, 2: 5, 3: 5}


def test_max_train_steps_wins_over_epochs_both_ways(tmp_path):
    for steps in (1, 3, 7):
        run = Run(configuration(tmp_path / str(steps), epochs=2, max_train_steps=steps))
        assert run.trainer.run().step == steps
        assert [line["step"] for line in metrics(run)] == list(range(1, steps + 1))


def test_stop_saves_nothing_and_stop_and_save_goes_on_to_the_same_result(tmp_path):
    whole = Run(configuration(tmp_path / "whole"))
    whole.trainer.run()
    config = configuration(tmp_path / "stopped")
    run = Run(config)
    run.recorder._on = {2: run.commands.stop}
    outcome = run.trainer.run()
    assert (outcome.status, outcome.step, run.recorder.saved) == ("stopped", 2, [])
    run = Run(config)
    run.recorder._on = {3: run.commands.stop_and_save}
    outcome = run.trainer.run()
    assert (outcome.status, outcome.step) == ("stopped", 3) and [kind for _, kind, _ in run.saved] == ["stopped"]
    resumed = Run(config)
    resumed.trainer.run()
    assert resumed.recorder.reports[0].step == 4 and same(resumed.final, whole.final)


def test_pausing_is_outside_the_turn_and_serves_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PAUSE_POLL_SECONDS", 0.02)
    run = Run(configuration(tmp_path))
    run.recorder._on = {1: run.commands.pause}
    thread = threading.Thread(target=run.trainer.run)
    thread.start()
    wait_for(lambda: run.commands.paused)
    run.commands.save_now()
    wait_for(lambda: len(run.recorder.saved) == 2)  # the LoRA and the state
    assert not run.turns.held and len(run.recorder.reports) == 1
    run.commands.resume()
    thread.join(20)
    assert not thread.is_alive() and len(run.recorder.reports) == 4 and run.saved[0][:2] == (1, "step")


def test_a_stop_ends_a_pause(tmp_path):
    run = Run(configuration(tmp_path))
    run.commands.pause()
    thread = threading.Thread(target=run.trainer.run)
    thread.start()
    run.commands.stop()
    thread.join(20)
    assert not thread.is_alive() and not run.recorder.reports


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_saves_come_when_due(tmp_path):
    run = Run(configuration(tmp_path, epochs=4, save_steps=3, save_epochs=1))
    run.trainer.run()
    assert [(step, kind) for step, kind, _ in run.saved] == [
        (2, "step"), (3, "step"), (4, "step"), (6, "step"), (8, "final")
    ]  # fmt: skip
    assert len(list((tmp_path / "out" / "state").iterdir())) == 2


def test_a_state_is_saved_by_the_clock_too(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STATE_SECONDS", 0.0)
    run = Run(configuration(tmp_path))
    run.trainer.run()
    assert [step for kind, step, _ in run.recorder.saved if kind == "state"] == [1, 2, 3, 4, 4]


def poison(run: Run, steps: set[int]) -> None:
    """Make the model answer NaN in these steps (counted from 1)."""
    predict = run.model.predict

    def poisoned(*arguments):
        answer = predict(*arguments)
        return answer * float("nan") if run.trainer.step + 1 in steps else answer

    run.model.predict = poisoned


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing_and_is_told(tmp_path, optimizer):
    run = Run(configuration(tmp_path, epochs=3, save_steps=1, optimizer=optimizer, learning_rate=0.01))
    poison(run, {3, 4})
    run.trainer.run()
    weights = {step: tensors for step, _, tensors in run.saved}
    assert same(weights[2], weights[3]) and same(weights[3], weights[4]) and not same(weights[4], weights[5])
    assert all(torch.isfinite(tensor).all() for tensor in run.final.values())
    assert [line["loss"] is None for line in metrics(run)] == [False, False, True, True, False, False]
    assert len(run.recorder.warnings) >= 1


def test_it_ends_with_advice_when_nothing_is_finite_any_more(tmp_path):
    run = Run(configuration(tmp_path, epochs=50))
    poison(run, set(range(5, 200)))
    with pytest.raises(UserError) as error:
        run.trainer.run()
    assert error.value.field == "learning_rate" and "Lower it" in error.value.remedy
    assert run.trainer.step == 4 + loop.NON_FINITE_LIMIT


def test_a_model_that_never_gave_a_number_is_not_blamed_on_the_learning_rate(tmp_path):
    run = Run(configuration(tmp_path, epochs=10))
    poison(run, set(range(1000)))
    with pytest.raises(UserError, match="before anything was learned") as error:
        run.trainer.run()
    assert error.value.field == "base_model" and run.trainer.step == loop.NON_FINITE_LIMIT


def test_an_infinite_gradient_of_a_finite_loss_is_left_out_too(tmp_path):
    run = Run(configuration(tmp_path, save_steps=1))
    parameter = run.trainer.train_step.parameters[0]
    parameter.register_hook(lambda gradient: gradient * float("inf") if run.trainer.step == 1 else gradient)
    run.trainer.run()
    assert [report.loss is None for report in run.recorder.reports] == [False, True, False, False]
    assert same(run.saved[0][2], run.saved[1][2])


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch < 2.3 has GradScaler for CUDA only")
def test_fp16_scaling_skips_and_resumes(tmp_path):
    def scaled(config):
        run = Run(config)
        run.trainer.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        return run

    settings = {"epochs": 3, "save_steps": 2}
    whole = scaled(configuration(tmp_path / "whole", **settings))
    poison(whole, {3})
    whole.trainer.run()
    plain = Run(configuration(tmp_path / "plain", **settings))
    poison(plain, {3})
    plain.trainer.run()
    for name, value in plain.final.items():
        torch.testing.assert_close(whole.final[name], value, rtol=1e-4, atol=1e-6)
    assert whole.trainer.train_step.scaler.get_scale() != 2.0**16
    config = configuration(tmp_path / "killed", **settings)
    killed = scaled(config)
    poison(killed, {3})
    killed.recorder._on = {5: kill}
    with pytest.raises(Killed):
        killed.trainer.run()
    resumed = scaled(config)
    resumed.trainer.run()
    assert same(resumed.final, whole.final)


def test_the_first_step_after_a_resume_and_every_save_may_take_longer(tmp_path):
    class Asked(Ranks):
        def __init__(self):
            self.seconds = []

        def unhurried(self, seconds=None):
            self.seconds.append(seconds)
            return nullcontext()

    run = Run(configuration(tmp_path, epochs=1))
    run.trainer.ranks = Asked()
    assert run.trainer.run().step == 2
    save = run.trainer.train_step.bytes / loop.SLOW_DISK
    assert run.trainer.ranks.seconds == [loop.FIRST_STEP_SECONDS, 0, save, save, save], "a state, the LoRA, the state"


def test_out_of_memory_saves_the_state_and_names_what_helps(tmp_path):
    run = Run(configuration(tmp_path, epochs=3))  # what it tries before: test_memory
    predict = run.model.predict

    def too_large(*arguments):
        if run.trainer.step == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(*arguments)

    run.model.predict = too_large
    with pytest.raises(UserError) as error:
        run.trainer.run()
    assert error.value.field == "resolution" and "lora_rank" in error.value.remedy
    assert [(kind, step) for kind, step, _ in run.recorder.saved] == [("state", 2)]
    assert Run(run.config).trainer.states.newest().step == 2


def test_what_a_step_lacked_memory_for_is_said_also_where_no_memory_is_left_to_save(tmp_path, monkeypatch):
    run = Run(configuration(tmp_path, epochs=3))
    predict = run.model.predict

    def too_large(*arguments, **named):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    run.model.predict = lambda *given: too_large() if run.trainer.step == 2 else predict(*given)
    monkeypatch.setattr(state, "save_file", too_large)
    with pytest.raises(UserError, match="memory does not suffice for step 3"):
        run.trainer.run()


def test_memory_that_is_short_while_something_is_saved_is_freed_and_it_is_saved(tmp_path, monkeypatch):
    settings = {"ema_decay": 0.5, "save_steps": 1}
    plenty, short = (Run(configuration(tmp_path / name, **settings)) for name in ("plenty", "short"))
    plenty.trainer.run()
    freed = []

    def short_once(write):
        def writes(*arguments, **named):
            if not attempts:
                attempts.append(1)
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return write(*arguments, **named)

        attempts = []
        return writes

    saver = type(short.trainer.saver)
    monkeypatch.setattr(saver, "__call__", short_once(saver.__call__))
    monkeypatch.setattr(state, "save_file", short_once(state.save_file))
    short.trainer.make_room = lambda: freed.append(short.trainer.step)
    short.trainer.run()
    assert freed == [1, 1], "for the LoRA and for the state"
    assert short.recorder.saved == plenty.recorder.saved
    assert all(same(one[2], other[2]) for one, other in zip(short.saved, plenty.saved))


def test_gradient_checkpointing_is_asked_for(tmp_path):
    run = Run(configuration(tmp_path, gradient_checkpointing=True))
    run.trainer.run()
    assert run.model.checkpointing


def test_warnings_about_settings_that_cannot_work(tmp_path):
    run = Run(configuration(tmp_path, lr_warmup_steps=100, zero_terminal_snr=True))
    run.trainer.turn = nullcontext
    run.trainer._warn_about_settings()
    assert "lr_warmup_steps" in run.recorder.warnings[0] and "zero_terminal_snr" in run.recorder.warnings[1]
