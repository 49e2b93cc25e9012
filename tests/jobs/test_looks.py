"""What pages read: the curve and the status."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.curves import thinned
from lora_trainer.jobs.metrics import read_points
from lora_trainer.jobs.status import Cursor, look
from tests.counting import calls
from tests.jobs.fakes import wait_for


def lines(path, steps, mode="a"):
    with path.open(mode) as handle:
        handle.writelines(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps)


def test_points_come_once_and_only_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_points(path).points == []
    lines(path, range(1, 4))
    with path.open("a") as handle:
        handle.write('{"step": 4, "lo')
    first = read_points(path)
    assert [point["step"] for point in first.points] == [1, 2, 3] and first.complete
    with path.open("a") as handle:
        handle.write('ss": NaN}\nnonsense\n[1]\n{"step": "x"}\n')
    second = read_points(path, first.offset)
    assert second.points == [{"step": 4, "loss": None}] and second.complete
    assert read_points(path, second.offset).points == []


def test_a_curve_that_was_cut_back_begins_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines(path, range(1, 100))
    offset = read_points(path).offset
    lines(path, range(1, 11), "w")
    again = read_points(path, offset)
    assert not again.complete and len(again.points) == 10
    assert not read_points(path, 5).complete  # not at the end of a line


@pytest.mark.parametrize("count", [999, 1000, 1001, 100_000])
def test_long_curves_are_thinned_and_keep_both_ends(tmp_path, count):
    path = tmp_path / "metrics.jsonl"
    lines(path, range(1, count + 1))
    steps = [point["step"] for point in read_points(path).points]
    assert len(steps) == min(count, 1000) and steps[0] == 1 and steps[-1] == count and steps == sorted(set(steps))


def test_thinned_points_are_means_of_the_steps_between_and_measurements_stay():
    steps = [{"step": step, "loss": None if step == 50 else step % 2, "lr": step} for step in range(1, 2001)]
    measured = [{"kind": "validation", "step": 700, "validation": 0.5}]
    found = thinned([*steps[:700], *measured, *steps[700:]], 101)
    points = [line for line in found if "kind" not in line]
    assert [line for line in found if "kind" in line] == measured
    assert len(points) == 101 and points[0]["step"] == 1 and points[-1]["step"] == 2000
    assert all(0.44 < line["loss"] < 0.56 and line["lr"] == line["step"] for line in points[1:])
    assert found[[line["step"] for line in found].index(700) + 1]["step"] > 699, "in their order"


def test_a_page_follows_a_job_without_missing_or_repeating_a_point(manager, train, settings):
    job = manager.submit(settings)
    cursor, steps, statuses, over = None, [], set(), []
    for step in range(1, 5):
        train.allow(1)
        wait_for(lambda step=step: manager.store.get(job.id).step >= step or _curve(manager, job) >= step)
        wait_for(lambda step=step: _curve(manager, job) >= step)
        snapshot = look(manager, cursor)
        cursor = snapshot.cursor
        assert cursor != "" and snapshot.metrics_job in (job.id, None)
        if snapshot.metrics and not snapshot.metrics.complete:
            steps = []
        steps += [point["step"] for point in snapshot.metrics.points] if snapshot.metrics else []
        statuses |= {snapshot.running.status} if snapshot.running else set()
        over += [one.id for one in snapshot.changed]
    wait_for(lambda: manager.store.get(job.id).status == "finished")
    last = look(manager, cursor)
    assert steps == [1, 2, 3, 4] and statuses == {"running"}
    assert last.running is None and over + [one.id for one in last.changed] == [job.id]
    assert wait_for(lambda: look(manager, look(manager, last.cursor).cursor).unchanged)
    fresh = look(manager)
    assert len(fresh.metrics.points) == 4 and fresh.metrics_job == job.id


def test_a_job_that_began_and_ended_between_two_looks_is_the_one_shown(manager, train, settings):
    train.free = True
    jobs = [manager.submit({**settings, "output_name": name}) for name in ("a", "b")]
    wait_for(lambda: manager.store.get(jobs[1].id).is_over)
    cursor = look(manager).cursor
    newer = manager.submit({**settings, "output_name": "c"})
    wait_for(lambda: manager.store.get(newer.id).is_over)
    seen = look(manager, cursor)
    assert seen.metrics_job == newer.id and not seen.metrics.complete and seen.metrics.points
    manager.store.update(jobs[0].id, step=1)  # what happens to an older one does not bring it back
    assert look(manager, seen.cursor).metrics_job == newer.id


def _curve(manager, job):
    path = manager.folders.metrics(manager.store.get(job.id))
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_half_a_line_that_a_full_disk_left_is_no_news(manager, train, settings):
    train.free = True
    job = manager.submit(settings)
    wait_for(lambda: manager.store.get(job.id).is_over)
    cursor = look(manager).cursor
    with manager.folders.metrics(job).open("a") as handle:
        handle.write('{"step": 5, "lo')
    assert look(manager, cursor).unchanged
    with manager.folders.metrics(job).open("a") as handle:
        handle.write('ss": 1}\n')
    assert [point["step"] for point in look(manager, cursor).metrics.points] == [5]


def test_another_model_that_is_selected_is_news(idle):
    host = idle.host
    first = look(idle)
    assert first.base.title == "tiny.safetensors [abc]" and look(idle, first.cursor).unchanged
    host.models = {"tiny.safetensors [abc]": (False, True), "other.safetensors": (True, False)}
    second = look(idle, first.cursor)
    assert (second.base.title, second.base.loaded) == ("other.safetensors", False)
    host.models = {"other.safetensors": (True, True)}
    assert look(idle, second.cursor).base.loaded and not look(idle, second.cursor).changed


def test_two_pages_agree(manager, train, settings):
    train.free = True
    job = manager.submit(settings)
    wait_for(lambda: manager.store.get(job.id).status == "finished")
    first, second = look(manager), look(manager)
    assert first == second
    held = manager.submit({**settings, "output_name": "held"}, held=True)
    assert look(manager, first.cursor) == look(manager, second.cursor)
    assert [one.id for one in look(manager, first.cursor).queue] == [held.id]


@given(st.one_of(st.text(max_size=80), st.from_regex(r"[0-9a-z]+(-\d{1,20}){6}", fullmatch=True)))
def test_any_text_is_a_cursor(text):
    assert isinstance(Cursor.parse(text), Cursor)
    assert Cursor.parse(str(Cursor("ab", 1, 2, 3, 4, 5, 6))) == Cursor("ab", 1, 2, 3, 4, 5, 6)


def test_an_idle_look_is_cheap_with_five_hundred_jobs(idle):
    for index in range(500):
        idle.store.add(f"job {index}", "epochs: 1\n" * 50, status="finished", folder=f"{index}")
    snapshot = look(idle)
    assert len(snapshot.changed) == 100 and calls(lambda: look(idle)) < 10_000
    assert look(idle, snapshot.cursor).unchanged and calls(lambda: look(idle, snapshot.cursor)) < 500


def test_measurements_are_points_of_their_own_and_are_not_thinned(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = []
    for step in range(1, 201):
        lines.append({"step": step, "loss": 0.1})
        if step % 20 == 0:
            lines.append({"kind": "validation", "step": step, "validation": 0.2, "training": 0.1, "drift": 0.0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = read_points(path, limit=10).points
    assert [point["step"] for point in points if "kind" in point] == list(range(20, 201, 20))
    steps = [point["step"] for point in points if "kind" not in point]
    assert len(steps) == 10 and steps[0] == 1 and steps[-1] == 200
