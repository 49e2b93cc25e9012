"""One page of the tab in a browser, against the real routes and queue; only the host and the training are fakes."""

from __future__ import annotations

import csv
import json
import random
import time
from pathlib import Path

import pytest
from fastapi import FastAPI
from PIL import Image

from lora_trainer.api import add_routes
from lora_trainer.jobs import reporting
from lora_trainer.jobs.worker import JobManager
from tests.jobs.fakes import FakeHost, FakeTrain
from tests.ui.browser import LATENCY, served

PICTURES = 12


def pytest_collection_modifyitems(config, items):
    """A test of the page that fails is run once more where pytest-rerunfailures is there; the summary names it (RERUN).

    Browser, server and training share the processor: what a test does not wait for comes late once in some thousand.
    """
    if config.pluginmanager.hasplugin("rerunfailures") and not LATENCY:
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.flaky(reruns=1))


class LateTrain(FakeTrain):
    """Begins up to LORA_TRAINER_LATENCY seconds late, as on a machine that is busy."""

    def __call__(self, *args, **options):
        time.sleep(random.random() * LATENCY)
        return super().__call__(*args, **options)


@pytest.fixture
def train():
    return LateTrain(total_steps=20)


@pytest.fixture
def manager(tmp_path, train, monkeypatch):
    monkeypatch.setattr(reporting, "MIN_INTERVAL", 0)  # every step is written, so that tests can wait for one
    manager = JobManager(FakeHost(tmp_path), train=train)
    manager.start_worker()
    yield manager
    manager.close()


@pytest.fixture
def site(manager):
    app = FastAPI()
    add_routes(app, manager, manager.host)
    with served(app) as address:
        yield address


@pytest.fixture
def open_page(browser, site):
    """Opens a page of the tab; every further one is another browser. No script may have failed at the end."""
    errors, contexts = [], []

    def open_one(width=1400, words=None):
        """words: what the host's localisation replaces; None for a page in English."""
        contexts.append(browser.new_context(viewport={"width": width, "height": 1000}))
        page = contexts[-1].new_page()
        if words is not None:
            page.add_init_script(f"window.localization = {json.dumps(words)}")
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(site)
        page.wait_for_selector("#lora_trainer_field_base_model option:nth-child(1)", state="attached")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def page(open_page):
    return open_page()


@pytest.fixture
def files(tmp_path):
    """Pictures and their captions in a table, as a person has them."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = []
    for index in range(PICTURES):
        Image.new("RGB", (96, 64), (index * 20, 90, 30)).save(folder / f"{index:02d}.png")
        rows.append((f"{index:02d}.png", f'a "red" **hat**, number {index}'))
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as table:
        csv.writer(table).writerows([("filename", "prompt"), *rows])
    return sorted(folder.iterdir())
