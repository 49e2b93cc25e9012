"""A job's folder: what lies in it, and what is deleted with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_trainer.errors import UserError
from lora_trainer.jobs.worker import JobManager
from tests.jobs.fakes import wait_for, wait_status


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
    assert manager.store.jobs() == []


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
