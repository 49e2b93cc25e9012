"""A job from its start to its end: trained, paused, stopped, failed, published."""

from __future__ import annotations

import sqlite3
import threading
import time

import pytest

from lora_trainer.api.context import Context
from lora_trainer.errors import UserError
from lora_trainer.jobs.execution import RECOMMENDED_OPTION
from tests.jobs.fakes import lines_of, status_of, wait_for, wait_status, wait_step, weights_at


def test_a_job_is_trained_and_published_with_a_complete_card(manager, train, settings, host):
    job = manager.submit({**settings, "description": "my cat"})
    train.allow(1)
    wait_step(manager, job, 1)
    manager.preview_now(job.id)
    manager.save_now(job.id)
    train.allow(3)
    job = wait_status(manager, job, "finished")
    assert (job.step, job.total_steps, job.loss, job.active) == (4, 4, 0.25, False)
    assert (job.base_model, job.family, job.error, train.saves) == ("tiny-model", "sd1", None, 1)
    (name, card), path = host.published[0], host.root / "Lora" / "cat.safetensors"
    assert name == "cat" and path.read_bytes() == weights_at(4)
    assert job.result["published"] == str(path)
    assert (card.activation_text, card.preferred_weight, card.sd_version) == ("zwx, red hat", 0.8, "SD1")
    assert card.description == "my cat" and "3 pictures" in card.notes and "rank 16" in card.notes
    assert card.thumbnail.getpixel((0, 0)) == (200, 0, 0)
    kinds = [event.kind for event in manager.store.events(job.id)]
    assert kinds.count("preview") == 1 and "saved" in kinds and kinds[-1] == "status"


def test_without_a_preview_the_first_picture_is_the_thumbnail(manager, train, settings, host):
    train.free = True
    wait_status(manager, manager.submit(settings), "finished")
    assert host.published[0][1].thumbnail.getpixel((0, 0)) == (0, 30, 90)


def test_a_command_reaches_a_job_that_is_just_being_taken_up(manager, train, settings, monkeypatch):
    claim, claimed = manager.store.claim, threading.Event()

    def slow_claim(job_id):
        job = claim(job_id)
        claimed.set()
        time.sleep(0.3)  # running as the store has it, and not in the worker's hand yet
        return job

    monkeypatch.setattr(manager.store, "claim", slow_claim)
    job = manager.submit(settings)
    assert claimed.wait(10)
    assert manager.pause(job.id).status == "paused"
    train.free = True
    manager.resume(job.id)
    wait_status(manager, job, "finished")


def test_a_command_to_a_job_that_is_just_over_says_so(manager, train, settings, monkeypatch):
    settle, settling = manager._settle, threading.Event()

    def slow_settle(*args):
        settling.set()
        time.sleep(0.3)
        settle(*args)

    monkeypatch.setattr(manager, "_settle", slow_settle)
    train.free = True
    job = manager.submit(settings)
    assert settling.wait(10)
    with pytest.raises(UserError, match="cat is finished"):
        manager.pause(job.id)
    assert status_of(manager, job) == "finished"


def test_pause_resume_stop_and_start_again_go_on_where_it_was(manager, train, settings):
    job = manager.submit(settings)
    train.allow(2)
    wait_step(manager, job, 2)
    assert manager.pause(job.id).status == "paused"
    train.allow(1)
    assert manager.resume(job.id).status == "running"
    wait_step(manager, job, 3)
    assert manager.stop(job.id).status in ("stopping", "stopped")
    wait_status(manager, job, "stopped")
    assert not manager.host.published
    manager.start(job.id)
    train.allow(1)
    job = wait_status(manager, job, "finished")
    assert job.attempt == 2 and lines_of(manager, job) == 4
    assert [config.resume for config in train.configs] == ["auto", "auto"]


def test_paused_takes_no_step(manager, train, settings):
    job = manager.submit(settings)
    train.allow(1)
    wait_step(manager, job, 1)
    manager.pause(job.id)
    train.allow(3)
    manager.preview_now(job.id)  # would be drawn after the next step
    looks = iter(range(20))
    wait_for(lambda: next(looks) == 19)
    assert lines_of(manager, job) == 1 and status_of(manager, job) == "paused"


def test_a_paused_job_keeps_the_device_free_and_its_place(manager, train, settings):
    first = manager.submit(settings)
    train.allow(1)
    wait_step(manager, first, 1)
    manager.pause(first.id)
    second = manager.submit({**settings, "output_name": "second"})
    train.free = True
    looks = iter(range(20))
    wait_for(lambda: next(looks) == 19)
    assert (status_of(manager, first), status_of(manager, second)) == ("paused", "queued")
    manager.stop(first.id)
    wait_status(manager, second, "finished")
    manager.resume(first.id)
    wait_status(manager, first, "finished")


def test_stop_and_save_publishes(manager, train, settings, host):
    job = manager.submit(settings)
    train.allow(2)
    wait_step(manager, job, 2)
    manager.stop_and_save(job.id)
    job = wait_status(manager, job, "stopped")
    assert (host.root / "Lora" / "cat.safetensors").read_bytes() == weights_at(2)


def test_jobs_run_one_after_the_other(manager, train, settings):
    jobs = [manager.submit({**settings, "output_name": name}) for name in ("a", "b", "c")]
    wait_status(manager, jobs[0], "running")
    manager.reorder([jobs[2].id])
    train.free = True
    for job in jobs:
        wait_status(manager, job, "finished")
    assert [config.output_name for config in train.configs] == ["a", "c", "b"]


def test_a_held_job_waits_for_start(manager, train, settings):
    train.free = True
    held = manager.submit(settings, held=True)
    other = manager.submit({**settings, "output_name": "other"})
    wait_status(manager, other, "finished")
    assert status_of(manager, held) == "paused" and train.configs[0].output_name == "other"
    manager.start(held.id)
    wait_status(manager, held, "finished")


def test_the_model_is_away_and_comes_back(manager, train, settings):
    job = manager.submit(settings)
    train.allow(1)
    wait_step(manager, job, 1)
    train.away = "Another checkpoint is loaded."
    job = wait_status(manager, job, "waiting")
    assert job.phase == "Another checkpoint is loaded."
    manager.pause(job.id)
    assert status_of(manager, job) == "paused"
    manager.resume(job.id)
    assert status_of(manager, job) == "waiting"
    train.away = None
    train.allow(3)
    wait_status(manager, job, "finished")
    assert [event.kind for event in manager.store.events(job.id)].count("waiting") == 2


def test_a_job_that_waits_for_what_can_be_switched_back_says_so(manager, train, settings):
    job = manager.submit(settings)
    train.allow(1)
    wait_step(manager, job, 1)
    with pytest.raises(UserError, match="switched back"):
        manager.switch_back(job.id)
    train.away, train.returns = "Another checkpoint is selected.", True
    wait_status(manager, job, "waiting")
    shown = Context(manager).job(manager.store.get(job.id))
    assert shown["switches_back"] and shown["phase"] == "Another checkpoint is selected."
    manager.switch_back(job.id)
    train.allow(1)
    wait_status(manager, job, "running")
    assert not Context(manager).job(manager.store.get(job.id))["switches_back"]
    train.allow(2)
    wait_status(manager, job, "finished")


def test_a_user_error_stays_with_field_and_remedy(manager, train, settings):
    train.free, train.error = True, UserError("It is too dark.", field="train_data_dir", remedy="Add light.")
    job = wait_status(manager, manager.submit(settings), "failed")
    assert (job.error.message, job.error.field, job.error.remedy) == ("It is too dark.", "train_data_dir", "Add light.")
    assert "It is too dark" in manager.folders.log(job).read_text()
    train.error = None
    manager.start(job.id)
    assert wait_status(manager, job, "finished").error is None


@pytest.mark.parametrize("error", [ZeroDivisionError("what"), SystemExit(3), KeyboardInterrupt()])
def test_an_unforeseen_error_names_the_log_and_the_queue_goes_on(manager, train, settings, error):
    train.free, train.error = True, error
    job = wait_status(manager, manager.submit(settings), "failed")
    assert type(error).__name__ in job.error.message and str(manager.folders.log(job)) in job.error.remedy
    assert "Traceback" in manager.folders.log(job).read_text()
    train.error = None
    wait_status(manager, manager.submit({**settings, "output_name": "next"}), "finished")


def test_trouble_after_the_training_ends_the_job_too(manager, train, settings, monkeypatch):
    train.free = True
    with monkeypatch.context() as broken:

        def files(*args):
            raise sqlite3.OperationalError("database is locked")

        broken.setattr("lora_trainer.jobs.execution._files", files)
        job = manager.submit(settings)
        failed = wait_for(lambda: (it := manager.store.get(job.id)).is_over and it)
    assert failed.status == "failed" and not failed.active and "database is locked" in failed.error.message
    manager.start(job.id)
    assert wait_for(lambda: (it := manager.store.get(job.id)).is_over and it).status == "finished"


def test_out_of_memory_says_what_helps(manager, train, settings):
    train.free, train.error = True, MemoryError()
    job = wait_status(manager, manager.submit(settings), "failed")
    assert job.error.field == "batch_size" and "gradient_checkpointing" in job.error.remedy


def test_a_model_that_cannot_be_trained_any_more_fails_the_job_beside_its_field(manager, train, settings, host):
    running = manager.submit(settings)
    job = manager.submit({**settings, "output_name": "later"})
    host.refused = UserError("There is no such model.", field="base_model", remedy="Choose another.")
    train.free = True
    wait_status(manager, running, "finished")
    job = wait_status(manager, job, "failed")
    assert job.error.field == "base_model" and job.fails_again
    with pytest.raises(UserError, match="no such model"):
        manager.resume(job.id)
    assert status_of(manager, job) == "failed"
    host.refused = None
    manager.resume(job.id)
    assert wait_status(manager, job, "finished").error is None


def test_the_queue_says_of_a_job_behind_what_would_stop_it(manager, train, settings, host):
    first = manager.submit(settings)
    behind = [manager.submit({**settings, "output_name": name}) for name in ("next", "b", "c")]
    wait_status(manager, first, "running")
    host.refused = UserError("It is FLUX.1.", field="base_model", remedy="Choose another.")
    train.allow(4)
    wait_status(manager, behind[0], "failed")
    waiting = {job.name: job for job in manager.store.jobs(("queued",))}
    assert all(job.error.message == "It is FLUX.1." for job in waiting.values())
    assert waiting or status_of(manager, behind[2]) == "failed"


def test_who_fails_by_what_may_pass_is_not_said_to_fail_again(manager, train, settings):
    train.free = True
    for index, field in enumerate((None, "device", "learning_rate")):
        train.error = UserError("No.", field=field)
        job = wait_status(manager, manager.submit({**settings, "output_name": f"n{index}"}), "failed")
        assert job.fails_again == (field == "learning_rate")


NOT_PUBLISHED = [UserError("full", field="output_name", remedy="Free some."), OSError(28, "full"), ValueError("?")]


@pytest.mark.parametrize("error", NOT_PUBLISHED)
def test_a_publishing_failure_is_a_warning_and_can_be_repeated(manager, train, settings, host, error):
    train.free, host.publish_error = True, error
    job = wait_status(manager, manager.submit(settings), "finished")
    assert len(job.warnings) == 1 and "publish it from" in job.warnings[0].remedy
    assert manager.result_file(job.id, "lora").read_bytes() == weights_at(4)
    host.publish_error = None
    job = manager.publish(job.id, "another")
    assert job.result["published"] == str(host.root / "Lora" / "another.safetensors")
    assert (host.root / "Lora" / "another.safetensors").exists()
    with pytest.raises(UserError, match="cannot be a name"):
        manager.publish(job.id, "../evil")


def test_an_earlier_checkpoint_can_be_published_instead(manager, train, settings, host):
    train.free, train.checkpoints = True, (2,)
    job = wait_status(manager, manager.submit(settings), "finished")
    path = host.root / "Lora" / "cat.safetensors"
    chosen = manager.publish(job.id, step=2)
    assert (path.read_bytes(), chosen.result["published_step"]) == (weights_at(2), 2)
    assert host.published[-1][1].notes.splitlines()[1].startswith("2 steps")
    with pytest.raises(UserError, match="no LoRA of step 3"):
        manager.publish(job.id, step=3)
    last = manager.publish(job.id, step=4)
    assert (path.read_bytes(), last.result["published_step"]) == (weights_at(4), None)


def test_the_recommended_step_is_what_is_published_and_its_card_says_so(manager, train, settings, host):
    train.free, train.best = True, 2
    job = wait_status(manager, manager.submit(settings), "finished")
    path = host.root / "Lora" / "cat.safetensors"
    assert (path.read_bytes(), job.result["published_step"]) == (weights_at(2), 2)
    notes = host.published[-1][1].notes
    assert "2 steps" in notes and "recommended. It memorises." in notes and "Last loss" not in notes
    last = manager.publish(job.id, step=4)
    assert (path.read_bytes(), last.result["published_step"]) == (weights_at(4), None)
    assert "are recommended" not in host.published[-1][1].notes
    again = manager.publish(job.id, step=2, weight=0.5)
    assert path.read_bytes() == weights_at(2) and host.published[-1][1].preferred_weight == 0.5
    assert manager.publish(again.id, "other").result["chosen_weight"] == 0.5
    assert host.published[-1][1].preferred_weight == 0.5
    with pytest.raises(UserError, match="no weight") as error:
        manager.publish(job.id, weight=0)
    assert error.value.field == "weight"


def test_the_last_step_is_published_where_the_settings_say_so(manager, train, settings, host):
    train.free, train.best = True, 2
    host.options[RECOMMENDED_OPTION] = False
    job = wait_status(manager, manager.submit(settings), "finished")
    assert (host.root / "Lora" / "cat.safetensors").read_bytes() == weights_at(4)
    assert (job.result["published_step"], job.result["recommended_step"]) == (None, 2)


def test_a_step_whose_file_was_replaced_is_not_offered_any_more(manager, train, settings, host):
    """The best LoRA has one file: a better one takes the place of the former one."""
    train.free, train.total_steps, train.best = True, 6, 4
    job = wait_status(manager, manager.submit(settings), "finished")
    manager.store.add_event(job.id, "saved", "", {"step": 2, "kind": "lora", "path": "output/cat-best.safetensors"})
    with pytest.raises(UserError, match="no LoRA of step 2"):
        manager.publish(job.id, step=2)
    assert list(manager.results.loras(job)) == [4, 6]


@pytest.mark.parametrize("verdict, verified", [(None, True), ("It changed nothing.", False), (OSError("busy"), None)])
def test_the_host_checks_the_lora_and_what_is_wrong_is_told(manager, train, settings, host, verdict, verified):
    train.free, host.verdict = True, verdict
    job = wait_status(manager, manager.submit(settings), "finished")
    assert job.result["verified"] is verified and job.result["published"]
    told = [warning.message for warning in job.warnings]
    assert told == [] if verified else len(told) == 1 and str(verdict) in told[0]


def test_publishing_and_the_check_in_the_webui_are_phases(manager, train, settings, host, monkeypatch):
    asked, answer = threading.Event(), threading.Event()

    def slow_verify(lora, prompt):
        asked.set()
        assert answer.wait(10)

    monkeypatch.setattr(host, "verify", slow_verify)
    train.free = True
    job = manager.submit(settings)
    assert asked.wait(10)
    assert (manager.store.get(job.id).phase, status_of(manager, job)) == ("verifying", "running")
    answer.set()
    job = wait_status(manager, job, "finished")
    phases = [event.text for event in manager.store.events(job.id) if event.kind == "phase"]
    assert phases[-2:] == ["publishing", "verifying"] and job.phase == ""


def test_commands_that_make_no_sense_say_so(manager, train, settings):
    train.free = True
    job = wait_status(manager, manager.submit(settings), "finished")
    for command in ("pause", "stop", "save_now", "preview_now", "stop_and_save", "start", "resume"):
        with pytest.raises(UserError, match="finished"):
            getattr(manager, command)(job.id)


def test_the_status_is_written_at_most_four_times_a_second(manager, train, settings):
    train.total_steps, train.free = 500, True
    writes = []
    update = manager.store.update
    manager.store.update = lambda *args, **values: (writes.append(values), update(*args, **values))
    job = wait_status(manager, manager.submit(settings), "finished")
    assert job.step == 500 and lines_of(manager, job) == 500
    assert sum("step" in values for values in writes) <= 2 + 4 * (job.finished - job.started + 0.25)


def test_a_new_name_publishes_the_checkpoint_that_was_chosen(manager, settings, train):
    train.free, train.checkpoints = True, (1, 2)
    manager.start_worker()
    job = wait_status(manager, manager.submit(settings), "finished")

    def weights(name):
        return (manager.host.root / "Lora" / f"{name}.safetensors").read_bytes()

    manager.publish(job.id, "last")
    assert weights("last") == weights_at(4)
    manager.publish(job.id, step=1)
    assert manager.publish(job.id, "chosen").result["published_step"] == 1 and weights("chosen") == weights_at(1)
    manager.publish(job.id, "other", step=2)
    manager.publish(job.id, "finished", step=4)
    manager.publish(job.id, "again")
    assert (weights("other"), weights("finished"), weights("again")) == (
        weights_at(2), weights_at(4), weights_at(4))  # fmt: skip
