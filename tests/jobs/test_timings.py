"""What is remembered of a run's pace: its parts, without waiting, and whatever else the computer did meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_trainer.config import from_mapping
from lora_trainer.dataset.cache import forget
from lora_trainer.jobs.reporting import JobReporter
from lora_trainer.jobs.worker import JobManager
from lora_trainer.planning.duration import Length, to_come
from lora_trainer.training.callbacks import StepReport
from tests.jobs.test_real_run import finish, host, settings

__all__ = ["host", "settings"]


class Clock:
    """Stands for the stopwatch: each lap is as long as the test says."""

    def __init__(self):
        self.since = 0.0

    def lap(self, *, computing=False):
        seconds, self.since = self.since, 0.0
        return seconds


@pytest.fixture
def reporter(tmp_path):
    from lora_trainer.jobs.store import JobStore

    store = JobStore(tmp_path / "jobs.db")
    job = store.add("cat", "")
    reporter = JobReporter(store, job.id, tmp_path / "output", lambda waiting: "waiting" if waiting else "running")
    reporter._watch = Clock()
    yield reporter
    store.close()


def test_each_part_gets_its_seconds_and_counts(reporter, tmp_path):
    def after(seconds):
        reporter._watch.since += seconds
        return reporter

    def step(number, working):
        reporter.on_step(StepReport(number, 4, 1, 1, 0.1, 1e-4, 50.0, 3, working))

    after(5).on_phase("pictures", 0, 6)
    after(1).on_phase("latents", 2, 6)
    after(8).on_phase("latents", 6, 6)
    after(0).on_phase("captions", 0, 6)
    after(2).on_phase("captions", 6, 6)
    after(0).on_phase("known", 2, 5)
    after(4).on_phase("known", 5, 5)
    after(7).on_preview(tmp_path / "a.png", 0, "x")
    after(9)
    step(1, 4.0)
    after(60)  # the WebUI drew pictures in between
    step(2, 1.0)
    after(2).on_saved(tmp_path / "a.safetensors", 2, "lora")
    after(1).on_saved(tmp_path / "a.state", 2, "state")
    after(100).on_waiting("The model is away.")
    after(500)
    step(3, 1.5)
    after(6).on_preview(tmp_path / "b.png", 3, "x")
    after(1).on_phase("publishing", 0, 0)
    after(3)
    assert reporter.timings() == {
        "loading": [10.0, 1], "encoding": [10.0, 10], "previews": [13.0, 2], "training": [2.5, 6],
        "saving": [3.0, 1], "ending": [3.0, 1], "known": [4.0, 3],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "step", "saving", "previews"),
    [
        ({"save_steps": 10}, 0, 10, 0),
        ({"save_steps": 10, "preview_prompts": ["a", "b"]}, 0, 10, 22),
        ({"save_steps": 10, "preview_prompts": ["a", "b"]}, 35, 7, 14),
        ({"save_steps": 10, "preview_prompts": ["a", "b"]}, 40, 7, 14),  # those of step 40 follow its report
        ({"save_steps": 10, "preview_prompts": ["a"]}, 100, 1, 1),
        ({"save_steps": 10, "save_epochs": 1, "preview_prompts": ["a"], "preview_steps": 50}, 10, 12, 2),
        ({"preview_prompts": ["a"]}, 99, 1, 1),
    ],
)
def test_what_is_still_to_be_saved_and_drawn(settings, step, saving, previews):
    length = Length(0, 0, 100, 25)
    assert to_come(from_mapping(settings), step, length) == {"saving": saving, "previews": previews}


def test_the_time_left_counts_coming_previews_saves_and_measurements(reporter, tmp_path):
    def after(seconds):
        reporter._watch.since += seconds
        return reporter

    def left(number):
        reporter.on_step(StepReport(number, 8, 1, 1, 0.1, 1e-4, 2.0, 1, 2.0, 8))
        reporter.flush()
        return reporter._store.get(1).seconds_left

    reporter.config = from_mapping({"save_steps": 2, "preview_prompts": ["a", "b"]})
    after(0).on_phase("measuring", 0, 0)
    after(3).on_phase("previews", 0, 2)
    after(10).on_preview(tmp_path / "a.png", 0, "a")
    after(10).on_preview(tmp_path / "b.png", 0, "b")
    assert left(1) == pytest.approx(7 * 2 + 4 * 2 * 10), "no save has shown yet what it takes"
    reporter.refresh_status()  # each step is timed by itself
    assert left(2) == pytest.approx(6 * 2 + 4 * 2 * 10)
    after(0).on_phase("saving", 0, 0)
    after(5).on_saved(tmp_path / "a.safetensors", 2, "lora")
    after(0).on_phase("previews", 0, 2)
    after(10).on_preview(tmp_path / "a.png", 2, "a")
    after(10).on_preview(tmp_path / "b.png", 2, "b")
    after(0).on_phase("measuring", 0, 0)
    after(3).on_phase("training", 2, 8)
    assert left(3) == pytest.approx(5 * 2 + 3 * 2 * 10 + 3 * 5 + 3 * 5 / 3)


def test_a_real_run_remembers_its_pace(host, settings):
    manager = JobManager(host)
    manager.start_worker()
    job = finish(manager, manager.submit({**settings, "epochs": 1}))
    manager.close()
    assert {"training", "loading", "encoding", "saving"} <= set(job.timings)
    assert job.timings["training"][1] == 4 - 1, "all pictures but those of the first step"
    assert job.timings["encoding"][1] > 4 and job.timings["saving"][1] == 2
    assert 0 < job.timings["training"][0] < job.finished - job.started
    cache = manager.folders.cache
    assert list(cache.rglob("*.cache"))
    forget(cache, Path(settings["train_data_dir"]))
    assert not list(cache.rglob("*.cache")), "what a run encodes is known to be of its pictures"
