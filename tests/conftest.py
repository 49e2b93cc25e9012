from __future__ import annotations

import gc
from pathlib import Path

import pytest


def pytest_collection_finish() -> None:
    """Thousands of tests and all modules that they import are there by now and stay to the end. The garbage collector
    passes over what is frozen: a full collection then takes milliseconds instead of half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD 1.x checkpoint so small that a whole run takes a second."""
    from tests.tiny import tiny_sd1

    path = tmp_path_factory.mktemp("base") / "tiny-sd1.safetensors"
    return tiny_sd1(path, mult=(1, 1), depths=(1, 0), layers=1)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; skips where there is none."""
    from tests.ui.browser import chromium

    with chromium() as browser:
        yield browser
