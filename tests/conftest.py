from __future__ import annotations

from pathlib import Path

import pytest


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
