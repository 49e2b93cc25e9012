"""Data sets that are renamed and deleted while jobs and editors know them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lora_trainer.errors import UserError
from lora_trainer.jobs.datasets import StoredDatasets
from lora_trainer.jobs.submitting import stored_config
from lora_trainer.workspace.library import DatasetLibrary
from tests.jobs.fakes import make_pictures, wait_status, wait_step

PAGE_NAME = "pictures 2026-11-28 09.54.01"


def stored(manager, name="cats"):
    """The data sets of a manager, one of them with three pictures."""
    library = DatasetLibrary(manager.folders.data)
    make_pictures(library.create(name))
    return StoredDatasets(library, manager.store, manager.sessions)


def names(manager):
    return sorted(path.name for path in manager.folders.datasets.iterdir())


def test_a_job_that_was_stopped_goes_on_with_a_data_set_that_was_renamed(manager, train):
    datasets = stored(manager)
    job = manager.submit({"train_data_dir": "cats", "output_name": "cat"})
    train.allow(2)
    wait_step(manager, job, 2)
    with pytest.raises(UserError, match="cat is being trained on cats"):
        datasets.rename("cats", "kittens")
    assert names(manager) == ["cats"]
    manager.stop(job.id)
    wait_status(manager, job, "stopped")
    assert datasets.resumable() == {str(manager.folders.datasets / "cats"): 1}
    datasets.rename("cats", "kittens")
    manager.start(job.id)
    train.allow(2)
    wait_status(manager, job, "finished")
    assert Path(train.configs[-1].train_data_dir) == manager.folders.datasets / "kittens"
    again = manager.duplicate(job.id, held=True)
    assert again.dataset == str(manager.folders.datasets / "kittens")


def test_jobs_that_wait_follow_in_every_setting(idle):
    datasets = stored(idle)
    root = idle.folders.datasets
    make_pictures(root / "cats" / "masks")
    settings = {
        "train_data_dir": str(root / "cats"), "reg_data_dir": str(root / "cats" / "masks"), "output_name": "cat",
        "more_folders": [f"2_cat={root / 'cats'}", str(root / "cats-not")], "description": "cats",
    }  # fmt: skip
    other = idle.submit({"train_data_dir": str(make_pictures(root / "cats-not")), "output_name": "other"})
    before = other.effective_config
    job = idle.submit(settings, held=True)
    datasets.rename("cats", "猫: a".replace(":", ""))
    config = stored_config(idle.store.get(job.id))
    new = root / "猫 a"
    assert (config.train_data_dir, config.reg_data_dir) == (str(new), str(new / "masks"))
    assert config.more_folders == [f"2_cat={new}", str(root / "cats-not")] and config.description == "cats"
    assert "猫 a" in idle.store.get(job.id).config
    assert idle.store.get(other.id).effective_config == before


@pytest.mark.parametrize("new", ["dogs", "DOGS", "a/b", "../x", "", ".hidden", "con"])
def test_a_name_that_is_taken_or_cannot_be_one_changes_nothing(idle, new):
    datasets = stored(idle)
    for name in {"dogs", new} & {"dogs", "DOGS"}:
        (idle.folders.datasets / name).mkdir()
    job = idle.submit({"train_data_dir": "cats", "output_name": "cat"})
    with pytest.raises(UserError) as raised:
        datasets.rename("cats", new)
    assert raised.value.field == "name"
    assert idle.store.get(job.id) == job and "cats" in names(idle)


def test_deleting_is_confirmed_and_refused_while_a_job_waits(idle):
    datasets = stored(idle)
    library = DatasetLibrary(idle.folders.data)
    thumbnail = library.thumbnail(library.picture("cats", "0000.png"))
    job = idle.submit({"train_data_dir": "cats", "output_name": "cat"}, held=True)
    with pytest.raises(UserError, match="removes its pictures") as raised:
        datasets.delete("cats")
    assert "confirm" in raised.value.remedy
    with pytest.raises(UserError, match="cat is being trained on cats, or waits for it"):
        datasets.delete("cats", confirm=True)
    assert names(idle) == ["cats"]
    idle.stop(job.id)
    datasets.delete("cats", confirm=True)
    assert names(idle) == [] and not thumbnail.exists()
    assert idle.store.get(job.id).status == "stopped", "the run stays in the list"


@pytest.mark.parametrize("act", ["rename", "delete"])
def test_only_what_the_trainer_made_is_touched(idle, tmp_path, act):
    datasets = stored(idle)
    mine = make_pictures(tmp_path / "mine")
    (idle.folders.datasets / "linked").symlink_to(mine, target_is_directory=True)
    make_pictures(idle.folders.datasets / "put there")
    (idle.folders.datasets / "twin").symlink_to(idle.folders.datasets / "cats", target_is_directory=True)
    for name in ("linked", "put there", "twin", "../../mine", str(mine)):
        with pytest.raises(UserError):
            datasets.rename(name, "new") if act == "rename" else datasets.delete(name, confirm=True)
    assert len(list(mine.glob("*.png"))) == 3 and names(idle) == ["cats", "linked", "put there", "twin"]
    (idle.folders.datasets / "cats" / "inside").symlink_to(mine, target_is_directory=True)
    datasets.delete("cats", confirm=True)
    assert len(list(mine.glob("*.png"))) == 3, "what a link inside leads to stays"


def test_data_sets_of_earlier_releases_are_known_by_their_names(idle):
    datasets = stored(idle)
    make_pictures(idle.folders.datasets / PAGE_NAME)
    datasets.rename(PAGE_NAME, "hats")
    datasets.delete("hats", confirm=True)
    assert names(idle) == ["cats"]


@pytest.mark.parametrize("act", ["rename", "delete"])
def test_what_is_unsaved_in_the_editor_is_not_lost(idle, act):
    datasets = stored(idle)
    editor = idle.sessions.open("cats")
    editor.session.set_captions({"0000.png": "another caption"})

    def do():
        datasets.rename("cats", "kittens") if act == "rename" else datasets.delete("cats", confirm=True)

    with pytest.raises(UserError, match="1 changes are not saved"):
        do()
    editor.session.save()
    do()
    with pytest.raises(UserError, match="not open any more"):
        idle.sessions.get(editor.id)
    assert names(idle) == (["kittens"] if act == "rename" else [])


def test_a_job_is_not_taken_while_its_data_set_moves(idle, monkeypatch):
    """The worker takes a job within milliseconds: it must not find the old folder gone."""
    datasets = stored(idle)
    job = idle.submit({"train_data_dir": "cats", "output_name": "cat"})
    claimed = []
    worker = threading.Thread(target=lambda: claimed.append(idle.store.claim(job.id)))
    rename = DatasetLibrary.rename

    def slowly(library, name, new):
        worker.start()
        worker.join(0.3)
        assert not claimed
        return rename(library, name, new)

    monkeypatch.setattr(DatasetLibrary, "rename", slowly)
    datasets.rename("cats", "kittens")
    worker.join()
    assert stored_config(claimed[0]).train_data_dir.endswith("kittens")


def test_a_name_that_differs_in_case_alone_is_another(idle):
    datasets = stored(idle)
    datasets.rename("cats", "Cats")
    assert names(idle) == ["Cats"]
