"""What is told before a run: pictures, steps, buckets, who writes the captions."""

from __future__ import annotations

import pytest

from lora_trainer.captioning.base import HostCaptioner
from lora_trainer.dataset import images
from lora_trainer.errors import UserError
from lora_trainer.jobs.estimating import estimate_job
from tests.jobs.fakes import make_pictures


def test_a_picture_is_decoded_once_for_all_estimates(idle, host, tmp_path, settings, monkeypatch):
    make_pictures(tmp_path / "photos", 3)
    (tmp_path / "photos" / "broken.png").write_bytes(b"not a picture")
    looked, look_at = [], images.measure
    monkeypatch.setattr(images, "measure", lambda path: looked.append(path.name) or look_at(path))
    options = {**settings, "train_data_dir": str(tmp_path / "photos"), "trigger_word": "zwx"}
    first = estimate_job(options, host, idle.store)
    assert sorted(looked) == ["0000.png", "0001.png", "0002.png", "broken.png"]
    assert estimate_job(options, host, idle.store) == first and len(looked) == 4 and len(first["refused"]) == 1
    (tmp_path / "photos" / "0001.png").write_bytes(b"changed")
    assert len(estimate_job(options, host, idle.store)["refused"]) == 2 and len(looked) == 5


def test_the_estimate_of_pictures_without_captions_says_who_writes_them(idle, host, tmp_path, settings):
    make_pictures(tmp_path / "photos", 4)
    settings = {**settings, "trigger_word": ""}
    (tmp_path / "photos" / "0001.txt").unlink()
    facts = estimate_job({**settings, "epochs": 2}, host, idle.store)
    (problem,) = facts["problems"]
    assert (facts["pictures"], facts["steps"], facts["captioner"]) == (4, 8, None)
    assert "1 of 4 pictures have no caption" in problem.message and problem.field == "train_data_dir"
    for path in (tmp_path / "photos").glob("*.txt"):
        path.unlink()
    host.captioners = lambda: {"host-blip": HostCaptioner("BLIP", lambda settings: None)}
    facts = estimate_job({**settings, "epochs": 2}, host, idle.store)
    assert (facts["pictures"], facts["steps"], facts["captioner"], facts["problems"]) == (4, 8, "host-blip", [])
    assert estimate_job({**settings, "trigger_word": "sks"}, host, idle.store)["captioner"] is None
    host.captioners = lambda: {"host-blip": HostCaptioner("BLIP", lambda settings: None, "no weights", "fetch them")}
    assert estimate_job(settings, host, idle.store)["problems"]


def test_the_estimate_counts_pictures_steps_and_buckets(idle, host, tmp_path, settings):
    make_pictures(tmp_path / "photos", 7)
    (tmp_path / "photos" / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "photos" / "broken.txt").write_text("x")
    options = {**settings, "batch_size": 2, "gradient_accumulation_steps": 3, "epochs": 5, "repeats": 2}
    facts = estimate_job(options, host, idle.store)
    assert (facts["pictures"], facts["steps_per_epoch"], facts["steps"]) == (7, 3, 15)
    assert [one["file"].endswith("broken.png") for one in facts["refused"]] == [True]
    assert sum(bucket["count"] for bucket in facts["buckets"]) == 14
    assert facts["minutes"] is None and facts["resolution"] == "512" and facts["family"] == "sd1"
    assert estimate_job({**options, "max_train_steps": 4}, host, idle.store)["steps"] == 4
    with pytest.raises(UserError) as caught:
        estimate_job({**options, "train_data_dir": str(tmp_path / "nowhere")}, host, idle.store)
    assert caught.value.field == "train_data_dir"
