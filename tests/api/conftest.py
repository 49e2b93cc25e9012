from __future__ import annotations

import base64
import functools

import fastapi
import fastapi.routing
import fastapi.utils
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lora_trainer.api import PREFIX, add_routes
from lora_trainer.jobs.worker import JobManager
from tests.jobs.fakes import FakeHost, FakeTrain, make_pictures

ROOT = "http://localhost:7860"


class Client(TestClient):
    """Paths are those under the prefix; sends JSON as the tab does."""

    def __init__(self, app: FastAPI):
        super().__init__(app, base_url=ROOT)

    def request(self, method, url, **options):
        return super().request(method, PREFIX + str(url) if str(url).startswith("/") else url, **options)


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def host(tmp_path):
    return FakeHost(tmp_path)


@pytest.fixture
def train():
    return FakeTrain(free=True)


@pytest.fixture
def manager(host, train):
    manager = JobManager(host, train=train)
    yield manager
    manager.close()


@pytest.fixture(scope="session", autouse=True)
def response_models_are_cloned_once():
    """As FastAPI does since 0.95.1; before, it clones every model of a response anew for each route of each app, which
    is most of the time that an app takes to make."""
    if tuple(int(part) for part in fastapi.__version__.split(".")[:3]) >= (0, 95, 1):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        shared = functools.partial(fastapi.utils.create_cloned_field, cloned_types={})
        patch.setattr(fastapi.routing, "create_cloned_field", shared)
        yield


@pytest.fixture
def app(manager, host):
    app = FastAPI()
    add_routes(app, manager, host)
    return app


@pytest.fixture
def client(app):
    return Client(app)


@pytest.fixture
def settings(tmp_path):
    return {"train_data_dir": str(make_pictures(tmp_path / "photos")), "output_name": "cat"}
