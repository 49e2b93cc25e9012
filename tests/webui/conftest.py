"""Everything here needs a WebUI that is already on this machine; see ``server.py`` for how to name it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.webui.server import FORGE, Server

NEEDED = ("LORA_TRAINER_WEBUI", "LORA_TRAINER_WEBUI_PYTHON", "LORA_TRAINER_WEBUI_MODELS")
COLORS = ("red", "green", "blue", "orange", "purple", "black")


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    if all(os.environ.get(name) for name in NEEDED):
        return
    skip = pytest.mark.skip(reason=f"needs a WebUI: set {', '.join(NEEDED)}")
    for item in items:
        # The tab's tests can do with one that is running.
        has_one = "address" in getattr(item, "fixturenames", ()) and os.environ.get("LORA_TRAINER_WEBUI_URL")
        if here in Path(item.path).parents and not has_one:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("webui")) as server:
        yield server


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Six drawn pictures with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, color in enumerate(COLORS):
        picture = Image.new("RGB", (128, 128), "beige")
        ImageDraw.Draw(picture).ellipse((20 + index, 30, 90, 100 - index), fill=color)
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"zwx, a {color} ellipse", encoding="utf-8")
    return folder


@pytest.fixture
def settings(pictures) -> dict:
    """A short run; two of them with the same seed make the same file."""
    return {
        "train_data_dir": str(pictures), "resolution": "64" if FORGE else "128", "min_bucket_resolution": 64,
        "max_train_steps": 6, "lora_rank": 4, "mixed_precision": "no", "save_precision": "fp32", "seed": 7,
        "tensorboard": False, "train_text_encoder": True, "learning_rate": 1e-3, "export_diffusers": False,
    }  # fmt: skip
