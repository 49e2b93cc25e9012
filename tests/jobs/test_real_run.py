"""The queue with the real training on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.host.publishing import place_lora
from lora_trainer.jobs import reporting
from lora_trainer.jobs.worker import JobManager
from lora_trainer.models.base import ModelAwayError
from lora_trainer.run import file_lender
from tests.jobs.fakes import FakeHost, wait_for
from tests.pictures import draw_dataset

ROOT = Path(__file__).parents[2]


class RealHost(FakeHost):
    """A host whose loaded model is the tiny one, with a real LoRA folder; what is put there is told with its step."""

    base = ""
    lora_folder = True

    def folders(self):
        folders = super().folders()
        return folders if self.lora_folder else dataclasses.replace(folders, lora=None)

    def publish(self, lora, name, card, *, overwrite=False):
        path = place_lora(lora, self.root / "Lora", name, card, overwrite=overwrite)
        with safe_open(str(path), framework="pt") as file:
            self.published.append((int(file.metadata()["ss_steps"]), card))
        return path

    def lender(self, checkpoint, options):
        return file_lender(from_mapping({"base_model": self.base}))

    def draw(self, request):
        if request.lora is not None:
            with safe_open(str(request.lora), framework="pt") as file:
                self.requests.append((request, file.metadata()["ss_base_model_version"], len(list(file.keys()))))
        return super().draw(request)


@pytest.fixture
def host(tmp_path, tiny_base):
    host = RealHost(tmp_path)
    host.base = str(tiny_base)
    return host


@pytest.fixture
def settings(tmp_path):
    return {
        "train_data_dir": str(draw_dataset(tmp_path / "pictures", 4)),
        "output_name": "disc",
        "resolution": 64,
        "bucket_step": 32,
        "lora_rank": 2,
        "epochs": 3,
        "save_steps": 2,
        "save_precision": "fp32",
        "tensorboard": False,
        "trigger_word": "zwx",
    }


def finish(manager, job):
    end = ("finished", "failed", "stopped", "interrupted")
    return wait_for(lambda: (one := manager.store.get(job.id)).status in end and not one.active and one)


def weights(manager, job):
    return load_file(str(manager.result_file(job.id, "lora")))


def test_a_job_trains_and_is_published(host, settings):
    manager = JobManager(host)
    manager.start_worker()
    job = finish(manager, manager.submit(settings))
    assert (job.status, job.error, job.warnings) == ("finished", None, ())
    assert (job.step, job.total_steps, job.family) == (12, 12, "sd1") and 0 < job.loss < 10
    (step, card) = host.published[-1]
    assert step == 12 and card.activation_text == "zwx, disc" and card.sd_version == "SD1"
    assert card.thumbnail is not None and "4 pictures" in card.notes
    manager.close()


def test_previews_are_the_hosts_with_the_lora_in_training(host, settings):
    host.name = "a1111"
    manager = JobManager(host)
    manager.start_worker()
    job = finish(manager, manager.submit({**settings, "preview_prompts": ["a disc"], "preview_steps": 6}))
    assert job.status == "finished" and job.result["thumbnail"].startswith("output/previews/")
    told = [one for one in host.requests if isinstance(one, tuple)]
    assert len(told) >= 2 and {version for _, version, _ in told} == {"sd_v1"}
    request, _, keys = told[0]
    assert keys > 0 and request.prompt == "a disc" and (request.width, request.height) == (64, 64)
    assert not request.lora.exists(), "the weights are gone with the picture"
    manager.close()


@pytest.mark.parametrize("error", [UserError("interrupted"), ModelAwayError("switched"), RuntimeError("host trouble")])
def test_a_preview_that_fails_is_a_warning(host, settings, error):
    def fail(request):
        raise error

    host.name, host.draw = "a1111", fail
    manager = JobManager(host)
    manager.start_worker()
    job = finish(manager, manager.submit({**settings, "preview_prompts": ["a disc"], "preview_steps": 6}))
    assert job.status == "finished" and any(str(error) in warning.message for warning in job.warnings)
    manager.close()


def trained(host, settings):
    manager = JobManager(host)
    manager.start_worker()
    job = finish(manager, manager.submit(settings))
    made = weights(manager, job)
    manager.close()
    return job, made


def test_the_newest_weights_are_in_the_lora_folder_while_it_trains(host, settings):
    job, made = trained(host, {**settings, "save_steps": 4})
    assert (job.status, job.warnings) == ("finished", ())
    assert [step for step, _ in host.published] == [4, 8, 12]
    assert "step 4 of 12" in host.published[0][1].notes and "Still" not in host.published[-1][1].notes
    assert job.result["published_step"] is None and job.result["verified"] is True
    assert sorted(path.name for path in (host.root / "Lora").iterdir()) == [
        "disc.json", "disc.preview.png", "disc.safetensors",
    ]  # fmt: skip
    host.lora_folder = False
    _, alone = trained(host, {**settings, "save_steps": 4, "output_name": "alone"})
    assert made.keys() == alone.keys() and all(torch.equal(made[key], alone[key]) for key in made)


def test_a_failed_run_leaves_what_was_saved_last(host, settings, monkeypatch):
    monkeypatch.setattr(reporting, "MIN_INTERVAL", 0)  # stopped at the very step, however fast they are

    def fail(path, prompt):
        raise AssertionError("nothing is finished")

    host.verify = fail
    manager = JobManager(host)
    manager.store.update = stop_at(manager, 5)
    manager.start_worker()
    job = finish(manager, manager.submit({**settings, "save_steps": 4}))
    assert job.status == "stopped" and job.result["published_step"] == 4
    assert (host.root / "Lora" / "disc.safetensors").exists() and job.result["published"]
    manager.close()


def stop_at(manager, step):
    update = manager.store.update

    def stopping(job_id, **values):
        update(job_id, **values)
        if values.get("step", 0) >= step:
            manager.stop(job_id)

    return stopping


@pytest.mark.parametrize("replaces", [False, True])
def test_somebody_elses_lora_stays_while_it_trains(host, settings, replaces):
    """Also one that the finished LoRA may replace. It came when the job was in the queue already."""
    theirs = host.root / "Lora" / "mine" / "disc.safetensors"
    theirs.parent.mkdir()
    seen = []
    original = host.publish

    def publish(lora, name, card, *, overwrite=False):
        if not seen:
            theirs.write_bytes(b"theirs")
        seen.append(theirs.read_bytes())
        return original(lora, name, card, overwrite=overwrite)

    host.publish = publish
    job, _ = trained(host, {**settings, "save_steps": 4, "overwrite": replaces})
    assert job.status == "finished" and seen == [b"theirs"] * 3
    assert any("before it is finished" in warning.message for warning in job.warnings)
    assert (theirs.read_bytes() == b"theirs") is not replaces


SERVER = """
import os, signal, sys
from pathlib import Path
from lora_trainer.jobs import reporting
from lora_trainer.jobs.worker import JobManager
from tests.jobs.test_real_run import RealHost
import json
root, base, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
host = RealHost(Path(root))
host.base = base
manager = JobManager(host)
original = manager.store.add_event
def event(job_id, kind, text, data=None):
    original(job_id, kind, text, data)
    if kind == "saved" and data["kind"] == "state" and data["step"] >= 4:
        os.kill(os.getpid(), signal.SIGKILL)
manager.store.add_event = event
manager.start_worker()
manager.submit(settings)
manager._thread.join()
"""


@pytest.mark.slow
def test_a_killed_server_goes_on_exactly(tmp_path, host, settings):
    undisturbed = JobManager(host)
    undisturbed.start_worker()
    twin = finish(undisturbed, undisturbed.submit({**settings, "output_name": "twin"}))
    expected = weights(undisturbed, twin)
    undisturbed.close()
    command = [sys.executable, "-c", SERVER, str(tmp_path), host.base, json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    manager = JobManager(host)
    manager.start_worker()
    job = manager.store.jobs()[0]
    wait_for(lambda: manager.store.get(job.id).status == "interrupted")
    assert manager.store.get(job.id).step in range(1, 12)
    manager.resume(job.id)
    job = finish(manager, job)
    assert (job.status, job.attempt, job.step) == ("finished", 2, 12)
    actual = weights(manager, job)
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)
    metrics = manager.folders.metrics(job).read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, 13))
    manager.close()
