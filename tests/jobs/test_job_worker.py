from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import lora_trainer.jobs as jobs
from lora_trainer.config import from_mapping, parse_yaml
from lora_trainer.errors import ConfigError, UserError
from lora_trainer.jobs.lease import WorkerLease
from lora_trainer.jobs.worker import JobManager
from tests.jobs.fakes import FakeHost, FakeTrain, wait_for


def status_of(manager, job):
    return manager.store.get(job.id).status


def wait_status(manager, job, status):
    wait_for(lambda: status_of(manager, job) == status, status)
    return manager.store.get(job.id)


def wait_step(manager, job, step):
    wait_for(lambda: _lines(manager, job) >= step, f"step {step}")


def _lines(manager, job):
    path = manager.folders.metrics(manager.store.get(job.id))
    return len(path.read_text().splitlines()) if path.exists() else 0


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
    assert name == "cat" and path.read_bytes() == b"weights at step 4"
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


def test_the_job_has_its_own_folder_and_the_pictures_stay_alone(manager, train, settings):
    train.free = True
    before = sorted(Path(settings["train_data_dir"]).iterdir())
    job = wait_status(manager, manager.submit(settings), "finished")
    folder = manager.folders.of(job)
    assert folder.name == f"{job.id:05d}-cat" and folder.parent == manager.folders.jobs
    config = train.configs[0]
    assert config.output_dir == str(folder / "output") and config.output_name == "cat"
    assert config.cache_dir == str(manager.folders.cache)
    assert (folder / "config.yaml").read_text() == job.config
    assert sorted(Path(settings["train_data_dir"]).iterdir()) == before


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
    assert job.attempt == 2 and _lines(manager, job) == 4
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
    assert _lines(manager, job) == 1 and status_of(manager, job) == "paused"


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
    assert (host.root / "Lora" / "cat.safetensors").read_bytes() == b"weights at step 2"


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


def test_a_model_that_cannot_be_trained_fails_the_job_beside_its_field(manager, settings, host):
    host.checkpoints = lambda: [type("C", (), {"title": "missing", "path": None})()]
    job = wait_status(manager, manager.submit({**settings, "base_model": "missing"}), "failed")
    assert job.error.field == "base_model"


NOT_PUBLISHED = [UserError("full", field="output_name", remedy="Free some."), OSError(28, "full"), ValueError("?")]


@pytest.mark.parametrize("error", NOT_PUBLISHED)
def test_a_publishing_failure_is_a_warning_and_can_be_repeated(manager, train, settings, host, error):
    train.free, host.publish_error = True, error
    job = wait_status(manager, manager.submit(settings), "finished")
    assert len(job.warnings) == 1 and "publish it from" in job.warnings[0].remedy
    assert manager.result_file(job.id, "lora").read_bytes() == b"weights at step 4"
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
    assert (path.read_bytes(), chosen.result["published_step"]) == (b"weights at step 2", 2)
    assert host.published[-1][1].notes.splitlines()[1].startswith("2 steps")
    with pytest.raises(UserError, match="no LoRA of step 3"):
        manager.publish(job.id, step=3)
    last = manager.publish(job.id, step=4)
    assert (path.read_bytes(), last.result["published_step"]) == (b"weights at step 4", None)


@pytest.mark.parametrize("verdict, verified", [(None, True), ("It changed nothing.", False), (OSError("busy"), None)])
def test_the_host_checks_the_lora_and_what_is_wrong_is_told(manager, train, settings, host, verdict, verified):
    train.free, host.verdict = True, verdict
    job = wait_status(manager, manager.submit(settings), "finished")
    assert job.result["verified"] is verified and job.result["published"]
    told = [warning.message for warning in job.warnings]
    assert told == [] if verified else len(told) == 1 and str(verdict) in told[0]


def test_names_that_are_taken_are_refused_before_anything_starts(idle, settings, host):
    (host.root / "Lora" / "cat.safetensors").touch()
    with pytest.raises(UserError) as caught:
        idle.submit(settings)
    assert caught.value.field == "output_name"
    idle.submit({**settings, "overwrite": True})
    (host.root / "Lora" / "cat.safetensors").unlink()
    with pytest.raises(UserError, match="Another job"):
        idle.submit({**settings, "output_name": "CAT"})
    assert len(idle.store.list()) == 1 and len(list(idle.folders.jobs.iterdir())) == 1


def test_two_that_start_at_once_do_not_get_one_name(idle, settings):
    begin = threading.Barrier(6)

    def start(_):
        begin.wait()
        with suppress(UserError):
            idle.submit(settings)
        begin.wait()
        return idle.duplicate(1).name

    with ThreadPoolExecutor(6) as pool:
        names = list(pool.map(start, range(6)))
    assert sorted([*names, "cat"]) == sorted({job.name for job in idle.store.list()}) and len(set(names)) == 6


@pytest.mark.parametrize("there", ["people/cat.safetensors", "CAT.pt", "cat.json"])
def test_what_publishing_would_refuse_is_refused_before_the_training(idle, settings, host, there):
    """The picker knows a LoRA by its name alone, wherever it lies."""
    path = host.root / "Lora" / there
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"already\."):
        idle.submit(settings)


def test_a_name_that_the_webui_never_finds_is_refused_before_the_training(idle, settings):
    with pytest.raises(UserError, match="keeps it for itself"):
        idle.submit({**settings, "output_name": "None"})


def test_a_name_is_found_where_none_is_given(idle, settings):
    del settings["output_name"]
    assert [idle.submit(settings).name for _ in range(3)] == ["photos", "photos_2", "photos_3"]
    assert idle.submit({**settings, "output_dir": "./output/my_style"}).name == "my_style"


def test_settings_come_as_yaml_and_all_their_problems_at_once(idle, settings):
    text = f"train_data_dir: {settings['train_data_dir']}\nlearning_rate: 2e-4\nrank: 8\n"
    job = idle.submit(text)
    assert idle.effective_config(job).lora_rank == 8 and idle.effective_config(job).learning_rate == 2e-4
    with pytest.raises(ConfigError) as caught:
        idle.submit({**settings, "rank": 0, "epochs": -1})
    assert [problem.field for problem in caught.value.problems] == ["rank", "epochs"]
    with pytest.raises(UserError, match="No pictures"):
        idle.submit({})


def test_a_few_lines_that_stand_for_gigabytes_are_refused_at_once(idle):
    pairs = zip("abcdefgh", "bcdefghi")
    levels = "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairs)
    with pytest.raises(UserError, match="alias"):
        idle.submit(f"a: &a [{', '.join('x' * 10)}]\n{levels}lora_rank: *i\n")


def test_duplicate_takes_changes_and_continue_starts_from_the_lora(manager, train, settings):
    train.free = True
    job = wait_status(manager, manager.submit({**settings, "network_dim": 4}), "finished")
    again = manager.duplicate(job.id, {"lora_rank": 8}, held=True)
    config = manager.effective_config(again)
    assert (again.name, config.lora_rank, config.trigger_word) == ("cat_2", 8, "zwx")
    more = manager.continue_from(job.id, held=True)
    assert manager.effective_config(more).init_lora == str(manager.result_file(job.id, "lora"))
    with pytest.raises(UserError, match="has not made"):
        manager.continue_from(again.id)


def test_delete_removes_the_jobs_own_folder_only(manager, train, settings, host):
    train.free = True
    job = wait_status(manager, manager.submit(settings), "finished")
    folder = manager.folders.of(job)
    outside = host.root / "keep"
    outside.mkdir()
    (outside / "file").touch()
    (folder / "link").symlink_to(outside)
    with pytest.raises(UserError, match="removes"):
        manager.delete(job.id)
    manager.delete(job.id, confirm=True)
    assert not folder.exists() and (outside / "file").exists()
    assert (host.root / "Lora" / "cat.safetensors").exists()
    assert len(list(Path(settings["train_data_dir"]).iterdir())) == 6
    assert manager.store.list() == []


@pytest.mark.parametrize("folder", ["", ".", "..", "../..", "other"])
def test_delete_touches_no_folder_without_the_jobs_mark(idle, settings, folder):
    job = idle.submit(settings)
    (idle.folders.jobs / "other").mkdir()
    (idle.folders.jobs / "other" / "file").touch()
    idle.store.update(job.id, folder=folder)
    try:
        idle.delete(job.id, confirm=True)
    except UserError as error:
        assert "nothing was deleted" in error.message
    assert (idle.folders.jobs / "other" / "file").exists() and idle.folders.of(job).exists()


def test_a_new_list_of_jobs_leaves_the_folders_of_the_former_one_alone(manager, train, settings, host):
    """Renaming jobs.sqlite is the remedy for a broken one; numbers then begin anew, and names are often the same."""
    train.free = True
    first = manager.submit(settings)
    wait_for(lambda: manager.store.get(first.id).is_over)
    manager.close()
    for path in manager.folders.data.glob("jobs.sqlite*"):
        path.rename(path.with_name(f"old-{path.name}"))
    before = {path: path.read_bytes() for path in manager.folders.of(first).rglob("*") if path.is_file()}
    train.total_steps = 6
    second_manager = JobManager(host, train=train)
    second = second_manager.submit(settings | {"overwrite": True})
    assert (second.id, second.name) == (first.id, first.name)
    second_manager.start_worker()
    wait_for(lambda: second_manager.store.get(second.id).is_over)
    second_manager.close()
    assert {path: path.read_bytes() for path in manager.folders.of(first).rglob("*") if path.is_file()} == before


def test_a_finished_job_that_cannot_be_deleted_stays_finished(manager, train, settings, monkeypatch):
    train.free = True
    job = manager.submit(settings)
    wait_for(lambda: manager.store.get(job.id).is_over)

    def rmtree(path):
        raise PermissionError(13, "in use")

    monkeypatch.setattr("shutil.rmtree", rmtree)
    with pytest.raises(UserError, match="could not be deleted"):
        manager.delete(job.id, confirm=True)
    assert manager.store.get(job.id).status == "finished"


def test_a_running_job_is_not_deleted(manager, train, settings):
    job = manager.submit(settings)
    wait_status(manager, job, "running")
    with pytest.raises(UserError, match="Stop it first"):
        manager.delete(job.id, confirm=True)


def test_commands_that_make_no_sense_say_so(manager, train, settings):
    train.free = True
    job = wait_status(manager, manager.submit(settings), "finished")
    for command in ("pause", "stop", "save_now", "preview_now", "stop_and_save", "start", "resume"):
        with pytest.raises(UserError, match="finished"):
            getattr(manager, command)(job.id)


def test_reload_ui_finds_the_same_manager_and_the_job_in_it(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(jobs, "_managers", {})
    before, after = FakeHost(tmp_path), FakeHost(tmp_path)
    manager = jobs.manager(before)
    manager._train = train = FakeTrain()
    job = manager.submit(settings)
    train.allow(1)
    wait_step(manager, job, 1)
    again = jobs.manager(after)
    assert again is manager and again.host is after
    train.allow(3)
    wait_status(again, job, "finished")
    assert after.published and not before.published
    manager.close()


def test_closing_offers_the_job_for_resuming(host, settings):
    train = FakeTrain()
    manager = JobManager(host, train=train)
    manager.start_worker()
    job = manager.submit(settings)
    train.allow(2)
    wait_step(manager, job, 2)
    manager.close()
    again = JobManager(host, train=train)
    assert status_of(again, job) == "interrupted"
    again.start_worker()
    again.resume(job.id)
    train.allow(2)
    job = wait_status(again, job, "finished")
    assert job.attempt == 2 and _lines(again, job) == 4
    again.close()


def test_the_status_is_written_at_most_four_times_a_second(manager, train, settings):
    train.total_steps, train.free = 500, True
    writes = []
    update = manager.store.update
    manager.store.update = lambda *args, **values: (writes.append(values), update(*args, **values))
    job = wait_status(manager, manager.submit(settings), "finished")
    assert job.step == 500 and _lines(manager, job) == 500
    assert sum("step" in values for values in writes) <= 2 + 4 * (job.finished - job.started + 0.25)


def test_a_second_server_does_not_steal_the_job(manager, train, settings, host):
    job = manager.submit(settings)
    train.allow(1)
    wait_step(manager, job, 1)
    second = JobManager(host, train=FakeTrain(free=True))
    second.start_worker()
    wait_for(lambda: second.trouble, "the second server's trouble")
    assert str(os.getpid()) in second.trouble.message
    assert status_of(second, job) == "running"
    with pytest.raises(UserError, match="Another WebUI"):
        second.pause(job.id)
    later = second.submit({**settings, "output_name": "later"})
    train.free = True
    wait_status(manager, later, "finished")
    second.close()


SERVER = """
import sys
from pathlib import Path
from lora_trainer.jobs.worker import JobManager
from tests.jobs.fakes import FakeHost, FakeTrain
root, data, action = sys.argv[1:4]
train = FakeTrain()
manager = JobManager(FakeHost(Path(root)), train=train)
manager.start_worker()
job = manager.submit({"train_data_dir": data, "output_name": "cat"})
train.allow(2)
while train.configs == [] or not list(manager.folders.output(job).glob("state/*")) or \\
        (manager.folders.output(job) / "state/cat.state").read_text() != "2":
    pass
print("ready", flush=True)
if action == "exit":
    import os
    os._exit(0)
sys.stdin.read()
"""


@pytest.mark.parametrize("action", ["exit", "kill"])
def test_a_job_cut_off_is_interrupted_and_goes_on(tmp_path, settings, host, action):
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path), settings["train_data_dir"], action],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert server.stdout.readline() == "ready\n"
    if action == "kill":
        waiting = JobManager(host, train=FakeTrain())
        waiting.start_worker()
        wait_for(lambda: waiting.trouble)
        assert [job.status for job in waiting.store.list()] == ["running"], "it belongs to the other server"
        waiting.close()
        server.kill()
    server.wait()
    server.stdin.close(), server.stdout.close()
    train = FakeTrain()
    manager = JobManager(host, train=train)
    manager.start_worker()
    job = manager.store.list()[0]
    wait_status(manager, job, "interrupted")
    manager.resume(job.id)
    train.allow(2)
    job = wait_status(manager, job, "finished")
    assert (job.step, job.attempt, _lines(manager, job)) == (4, 2, 4)
    manager.close()


def test_the_lock_belongs_to_one_and_is_free_when_it_is_let_go(tmp_path):
    first, second = WorkerLease(tmp_path / "lock"), WorkerLease(tmp_path / "lock")
    assert first.acquire() and first.acquire() and not second.acquire()
    assert second.owner()["pid"] == os.getpid()
    first.release()
    assert second.acquire()
    second.release()


def test_the_lender_gets_the_runs_precision_and_the_hosts_options(manager, train, settings, host):
    train.free = True
    host.options = {"lora_trainer_hold_model": True}
    wait_status(manager, manager.submit({**settings, "clip_skip": 2}), "finished")
    options = host.lender_options[0]
    assert options.hold and not options.wait_for_model and options.clip_skip == 2


def test_a_job_keeps_the_model_that_was_loaded_when_it_was_sent(idle, settings):
    job = idle.submit(settings)
    assert job.base_model == "tiny.safetensors [abc]"
    assert from_mapping(parse_yaml(job.effective_config)).base_model == "tiny.safetensors [abc]"
    assert "base_model" not in parse_yaml(job.config), "a copy of the job means what is loaded then"
