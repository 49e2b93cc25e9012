from __future__ import annotations

import sqlite3
import threading

import pytest

from lora_trainer.errors import Problem, UserError
from lora_trainer.jobs.job import UnknownJobError
from lora_trainer.jobs.migrations import MIGRATIONS
from lora_trainer.jobs.store import ORDERS, JobStore
from tests.counting import calls


@pytest.fixture
def store(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    yield store
    store.close()


def test_a_job_comes_back_as_it_was_written(store, tmp_path):
    job = store.add("猫", "epochs: 3\n", dataset="photos")
    store.update(job.id, step=7, loss=0.25, result={"lora": "output/x.safetensors"}, error=Problem("m", "f", "r"))
    store.close()
    again = JobStore(tmp_path / "jobs.sqlite").get(job.id)
    assert (again.name, again.config, again.dataset, again.step, again.loss) == ("猫", "epochs: 3\n", "photos", 7, 0.25)
    assert again.result == {"lora": "output/x.safetensors"} and again.error == Problem("m", "f", "r")
    assert again.status == "queued" and not again.active


def test_the_queue_runs_in_its_order_and_reorder_changes_it(store):
    first, second, third = (store.add(name, "") for name in "abc")
    assert store.next_queued().id == first.id
    store.reorder([third.id, first.id])
    assert [job.id for job in store.jobs(("queued",))] == [third.id, first.id, second.id]
    store.claim(third.id)
    with pytest.raises(UserError, match="does not wait"):
        store.reorder([third.id])
    assert [job.id for job in store.jobs()] == [third.id, first.id, second.id]


def test_only_one_of_many_claims_wins(store):
    job = store.add("a", "")
    won = []
    threads = [threading.Thread(target=lambda: won.append(store.claim(job.id))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claimed is not None for claimed in won) == 1
    assert store.get(job.id).attempt == 1


def test_what_was_in_hand_is_interrupted_and_a_held_job_is_not(store):
    job, held = store.add("a", ""), store.add("b", "", status="paused")
    store.claim(job.id)
    store.set_status(job.id, "paused")
    assert store.mark_interrupted() == [job.id]
    assert store.get(job.id).status == "interrupted" and not store.get(job.id).active
    assert store.get(held.id).status == "paused"


def test_every_change_moves_the_revision(store):
    job = store.add("a", "")
    seen = [store.revision()]
    for change in (
        lambda: store.update(job.id, step=1),
        lambda: store.set_status(job.id, "stopped"),
        lambda: store.add_event(job.id, "saved", "x"),
        lambda: store.add_warning(job.id, Problem("careful")),
        lambda: store.delete(job.id),
    ):
        change()
        seen.append(store.revision())
    assert seen == sorted(set(seen))


def test_warnings_are_kept_once(store):
    job = store.add("a", "")
    for _ in range(3):
        store.add_warning(job.id, Problem("careful", None, "do this"))
    assert store.get(job.id).warnings == (Problem("careful", None, "do this"),)
    assert [event.kind for event in store.events(job.id)] == ["warning"]


def test_a_loss_that_is_no_number_is_missing(store):
    job = store.add("a", "")
    store.update(job.id, loss=float("nan"))
    assert store.get(job.id).loss is None


def test_events_go_with_their_job(store):
    job = store.add("a", "")
    store.add_event(job.id, "saved", "x", {"step": 3})
    assert store.events(job.id)[0].data == {"step": 3}
    store.delete(job.id)
    assert store.events() == []
    for use in (lambda: store.get(job.id), lambda: store.update(job.id, step=1), lambda: store.delete(job.id)):
        with pytest.raises(UnknownJobError):
            use()


def test_a_failed_preparation_leaves_no_job(store):
    def fail(job_id):
        raise UserError("disk full")

    with pytest.raises(UserError):
        store.add("a", "", fail)
    assert store.jobs() == []


def test_an_older_database_opens_and_a_copy_of_it_is_kept(tmp_path):
    path = tmp_path / "jobs.sqlite"
    old = JobStore(path)
    job = old.add("from before", "epochs: 3\n")
    old.close()
    newer = (*MIGRATIONS, ("ALTER TABLE jobs ADD COLUMN color TEXT NOT NULL DEFAULT 'red'",))
    store = JobStore(path, newer)
    assert store.get(job.id).name == "from before"
    assert store._connection().execute("SELECT color FROM jobs").fetchone() == ("red",)
    store.close()
    copy = sqlite3.connect(path.with_name(f"jobs.sqlite.format{len(MIGRATIONS)}.bak"))
    assert copy.execute("SELECT name FROM jobs").fetchone() == ("from before",)
    assert copy.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    copy.close()


def test_a_migration_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "jobs.sqlite"
    JobStore(path).close()
    broken = (*MIGRATIONS, ("ALTER TABLE jobs ADD COLUMN color TEXT", "ALTER TABLE nothing ADD COLUMN x TEXT"))
    with pytest.raises(UserError, match="cannot be opened"):
        JobStore(path, broken)
    store = JobStore(path)
    assert "color" not in [row[1] for row in store._connection().execute("PRAGMA table_info(jobs)")]
    store.close()


def test_a_newer_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "jobs.sqlite"
    JobStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(UserError, match="newer version") as caught:
        JobStore(path)
    assert "Update the extension" in caught.value.remedy
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"these are my notes" * 100)
    with pytest.raises(UserError, match="cannot be opened"):
        JobStore(path)
    assert path.read_bytes() == b"these are my notes" * 100


def test_five_hundred_jobs_list_fast(store):
    for index in range(500):
        store.add(f"job {index}", "x" * 4000, effective_config="y" * 4000, status="finished")
    assert len(store.jobs()) == 500 and calls(store.jobs) < 500 * 50


def test_what_runs_or_waits_comes_first_in_every_order(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    rows = [("b", "finished", 9.0), ("Ä", "stopped", 1.0), ("c", "paused", 0), ("d", "queued", 0), ("a", "failed", 5.0),
            ("e", "queued", 0)]  # fmt: skip
    for name, status, seconds in rows:
        store.add(name, "x: 1", status=status, seconds=seconds, base_model=f"model-{name}", dataset=f"/data/set {name}")
    store.update(1, status="running", active=True)
    store.reorder([6])
    found = {order: "".join(job.name for job in store.jobs(order=order)) for order in ORDERS}
    assert found == {"newest": "bedcaÄ", "oldest": "bedcÄa", "name": "bedcaÄ", "model": "bedcaÄ", "longest": "bedcaÄ"}
    store.update(2, seconds=7.0)
    assert [job.name for job in store.jobs(order="longest")][-2:] == ["Ä", "a"]


def test_jobs_are_found_by_words_in_any_script(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    store.add("ÄRGER mit 猫", "x: 1", base_model="SDXL base", dataset="/secret/home/cats", status="finished")
    store.add("100%_real", "x: 1", base_model="v1-5", dataset="/secret/home/dogs", status="stopped")
    found = {
        words: [job.id for job in store.jobs(search=words)]
        for words in ("ärger", "sdxl CATS", "sdxl dogs", "猫", "%", "_", "home", "", "'; DROP TABLE jobs; --")
    }
    assert found == {
        "ärger": [1], "sdxl CATS": [1], "sdxl dogs": [], "猫": [1], "%": [2], "_": [2], "home": [], "": [2, 1],
        "'; DROP TABLE jobs; --": [],
    }, "a folder of the server is not found by what lies above it"  # fmt: skip
    assert store.count(search="e") == 2 and store.count(("stopped",), search="e") == 1
