"""From two pictures of a gallery to the strip of a slider LoRA in a real WebUI.

Clicks and seconds are printed (pytest -s); LORA_TRAINER_SHOTS names a folder for a screenshot of each station.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.webui.person import Walk
from tests.webui.test_tab import FIELDS, page, until  # noqa: F401 - fixtures
from tests.webui.test_walk import TXT2IMG, drawing_shapes, drawn

PROMPT = "a big red {} on a grey background"
STRIP = "#lora_trainer_previews .lora_trainer_grid_table"


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    with drawing_shapes(tmp_path_factory.mktemp("webui")) as server:
        yield server


@pytest.fixture(scope="module")
def address(webui):
    return webui.url("/")


def test_from_two_pictures_of_the_gallery_to_the_strip(page, webui):  # noqa: F811
    page.wait_for_selector("#txt2img_generate")
    page.wait_for_function("() => window.loraTrainer && loraTrainer.begun")
    page.evaluate(FIELDS, list(TXT2IMG.items()))
    walk = Walk(page, "change")
    for place, shape in (("before", "circle"), ("after", "square")):
        walk.click("#tabs > .tab-nav >> text=txt2img")
        page.fill("#txt2img_prompt textarea", PROMPT.format(shape))
        drawn(page, walk)
        if place == "before":
            walk.station("drawn")
        walk.click(f"#lora_trainer_{place}_of_txt2img")
        page.wait_for_function(f"() => loraTrainer.pair.shown.{place}")
        walk.station(place)
    until(page, "loraTrainer.get('fact_steps').innerText === '50'")
    settings = page.evaluate("loraTrainer.form.settings()")
    assert (settings["task"], settings["resolution"], settings.get("base_model")) == ("pair", "128x128", None)
    assert page.input_value("#lora_trainer_pair_prompt") == PROMPT.format("circle")
    page.evaluate("loraTrainer.form.set('output_name', 'rounder')")
    walk.station("ready")
    walk.click("#lora_trainer_start")
    until(page, "loraTrainer.live.job && loraTrainer.live.job.status === 'finished'", 1800)
    walk.station("finished")
    job = page.evaluate("loraTrainer.live.job")
    assert (job["task"], job["published"], job["verified"]) == ("pair", "rounder", True), job
    walk.click("#lora_trainer_job_buttons >> text=Draw a strip")
    loaded = "(all) => all.length === 5 && all.every((one) => one.complete && one.naturalWidth)"
    until(page, f"({loaded})([...document.querySelectorAll('{STRIP} img')])", 1800)
    walk.station("strip")
    pictures = webui.data / "lora_trainer" / "jobs"
    cells = [np.asarray(Image.open(path)) for path in sorted(pictures.glob("*/output/compare/*/cells/*.png"))]
    assert len({one.tobytes() for one in cells}) == 5, "each weight makes another picture"
    page.locator(f"{STRIP} tbody button").nth(2).click()
    until(page, "loraTrainer.live.job.chosen_weight === 0.5")
    walk.station("weight chosen")
    card = next(webui.data.glob("models/Lora/rounder.json"))
    assert json.loads(card.read_text(encoding="utf-8"))["preferred weight"] == 0.5
