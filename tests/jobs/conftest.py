from __future__ import annotations

import pytest

from lora_trainer.jobs.worker import JobManager
from tests.jobs.fakes import FakeHost, FakeTrain, make_pictures


@pytest.fixture
def host(tmp_path):
    return FakeHost(tmp_path)


@pytest.fixture
def train():
    return FakeTrain()


@pytest.fixture
def manager(host, train):
    """A manager with its worker running."""
    manager = JobManager(host, train=train)
    manager.start_worker()
    yield manager
    manager.close()


@pytest.fixture
def idle(host, train):
    """A manager without a worker: jobs stay queued."""
    manager = JobManager(host, train=train)
    yield manager
    manager.close()


@pytest.fixture
def settings(tmp_path):
    return {"train_data_dir": str(make_pictures(tmp_path / "photos")), "trigger_word": "zwx", "output_name": "cat"}
