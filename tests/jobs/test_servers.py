"""Servers that start anew, end, or share the jobs with another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lora_trainer.jobs as jobs
from lora_trainer.api.context import Context
from lora_trainer.errors import UserError
from lora_trainer.jobs.execution import RESUME_OPTION
from lora_trainer.jobs.lease import WorkerLease
from lora_trainer.jobs.status import look
from lora_trainer.jobs.worker import JobManager
from tests.jobs.fakes import FakeHost, FakeTrain, lines_of, status_of, wait_for, wait_status, wait_step


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
    assert job.attempt == 2 and lines_of(again, job) == 4
    again.close()


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
while not (manager.folders.output(job) / "state/cat-00000000-step00000002.state").exists():
    pass
print("ready", flush=True)
if action == "exit":
    import os
    os._exit(0)
sys.stdin.read()
"""


@pytest.mark.parametrize("action", [pytest.param("exit", marks=pytest.mark.slow), "kill"])
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
        assert [job.status for job in waiting.store.jobs()] == ["running"], "it belongs to the other server"
        waiting.close()
        server.kill()
    server.wait()
    server.stdin.close(), server.stdout.close()
    train = FakeTrain()
    manager = JobManager(host, train=train)
    manager.start_worker()
    job = manager.store.jobs()[0]
    wait_status(manager, job, "interrupted")
    manager.resume(job.id)
    train.allow(2)
    job = wait_status(manager, job, "finished")
    assert (job.step, job.attempt, lines_of(manager, job)) == (4, 2, 4)
    manager.close()


def leave_cut_off(host, job_id, *, step, saved, status="running"):
    """Leave the queue and the job's folder as a server does that is killed at ``step`` of the job."""
    killed = JobManager(host, train=FakeTrain())
    job = killed.store.claim(job_id)
    killed.store.update(job_id, step=step, total_steps=20)
    if saved:
        state = killed.folders.output(job) / "state" / f"{job.name}-00000000-step{saved:08d}.state"
        state.parent.mkdir(parents=True, exist_ok=True)
        state.touch()
        killed.store.add_event(job_id, "saved", state.name, {"step": saved, "kind": "state"})
    if status != "running":
        killed.store.set_status(job_id, status)
    killed.store.close()


@pytest.fixture
def two_jobs(host, settings):
    """The first is cut off at step 11 and was saved at step 8; the second waits behind it."""
    manager = JobManager(host, train=FakeTrain())
    first = manager.submit(settings)
    second = manager.submit({**settings, "output_name": "second"})
    manager.store.close()
    leave_cut_off(host, first.id, step=11, saved=8)
    return first, second


def test_a_job_that_was_cut_off_is_offered_while_the_next_one_runs(host, two_jobs):
    first, second = two_jobs
    manager = JobManager(host, train=FakeTrain(20))
    manager.start_worker()
    try:
        wait_status(manager, second, "running")
        snapshot = look(manager)
        assert snapshot.running.id == second.id and [job.id for job in snapshot.interrupted] == [first.id]
        shown = Context(manager).job(snapshot.interrupted[0])
        assert (shown["step"], shown["saved_step"]) == (11, 8)
        manager.resume(first.id)
        assert [job.id for job in look(manager).queue] == [first.id] and not look(manager).interrupted
        manager.stop(first.id)
    finally:
        manager.close()


def test_an_offer_can_be_declined_for_good(host, two_jobs):
    first, second = two_jobs
    manager = JobManager(host, train=FakeTrain(20))
    manager.start_worker()
    try:
        wait_status(manager, second, "running")
        assert manager.stop(first.id).status == "stopped" and not look(manager).interrupted
    finally:
        manager.close()


@pytest.mark.parametrize("option, goes_on", [(True, True), (False, False)])
def test_an_option_resumes_by_itself_what_was_cut_off(host, two_jobs, option, goes_on):
    first, _ = two_jobs
    host.options[RESUME_OPTION] = option
    train = FakeTrain(20)
    manager = JobManager(host, train=train)
    manager.start_worker()
    try:
        wait_for(lambda: train.configs)
        assert train.configs[0].output_name == ("cat" if goes_on else "second")
        assert status_of(manager, first) == ("running" if goes_on else "interrupted")
    finally:
        manager.close()


def test_what_was_paused_and_what_ends_every_server_waits_for_a_person(host, settings, two_jobs):
    first, _ = two_jobs
    host.options[RESUME_OPTION] = True

    def restart():
        manager = JobManager(host, train=FakeTrain(20))
        manager.store.mark_interrupted()
        manager._resume_by_itself()
        status = status_of(manager, first)
        manager.store.close()
        return status

    assert restart() == "queued", "cut off for the first time since it was saved"
    leave_cut_off(host, first.id, step=9, saved=0)
    assert restart() == "interrupted", "and once more, with nothing saved in between"
    manager = JobManager(host, train=FakeTrain())
    manager.resume(first.id)
    manager.store.close()
    leave_cut_off(host, first.id, step=12, saved=12, status="paused")
    assert restart() == "interrupted", "a person had paused it"


def test_the_lock_belongs_to_one_and_is_free_when_it_is_let_go(tmp_path):
    first, second = WorkerLease(tmp_path / "lock"), WorkerLease(tmp_path / "lock")
    assert first.acquire() and first.acquire() and not second.acquire()
    assert second.owner()["pid"] == os.getpid()
    first.release()
    assert second.acquire()
    second.release()
