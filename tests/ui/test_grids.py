"""Grids on the page: drawn by one click from a finished run; a click on a picture publishes it at its weight."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
from PIL import Image

from tests.jobs.fakes import weights_at
from tests.ui.person import start, wait_for_text

GRID = "#lora_trainer_previews .lora_trainer_grid_table"


@pytest.fixture
def drawn(page, files, train, manager, monkeypatch):
    """A finished run, with its grid."""

    def draw(request):  # greener by the weight, bluer by the step
        step = 0 if request.lora is None else 10 if "step10" in request.lora.name else 20
        return Image.new("RGB", (96, 96), (90, int(200 * request.lora_weight * bool(step)), 12 * step))

    monkeypatch.setattr(manager.host, "draw", draw)
    train.free, train.checkpoints = True, (10,)
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Draw a grid")
    page.wait_for_selector(GRID)
    return page


def test_one_click_draws_the_grid_and_one_publishes(drawn, manager):
    page = drawn
    heads = [one.inner_text() for one in page.locator(f"{GRID} thead th").all()]
    assert heads == ["", "base model", "step 10", "step 20"]
    assert [one.inner_text() for one in page.locator(f"{GRID} tbody th[scope=row]").all()] == ["× 0.5", "× 0.8", "× 1"]
    page.wait_for_function("() => [...document.querySelectorAll('#lora_trainer_previews .lora_trainer_grid_table img')]"
                           ".every((one) => one.complete && one.naturalWidth === 96)")  # fmt: skip
    in_tab = page.locator(f"{GRID} [aria-pressed=true]")
    assert in_tab.get_attribute("title") == "Put step 20 at weight 0.8 into your Lora tab"
    page.locator(f"{GRID} tbody tr").nth(1).locator("button").first.click()  # step 10 at 0.5
    page.wait_for_function("() => loraTrainer.live.job.published_step === 10")
    assert (manager.host.root / "Lora" / "hat_v1.safetensors").read_bytes() == weights_at(10)
    assert manager.host.published[-1][1].preferred_weight == 0.5
    page.wait_for_selector(f"{GRID} [aria-pressed=true][title*='step 10 at weight 0.5']")
    with page.expect_download() as download:
        page.click("#lora_trainer_previews >> text=Save as one picture")
    assert Image.open(download.value.path()).width > 3 * 96


def test_a_save_that_took_the_place_of_another_is_offered_alone(drawn):
    """The best LoRA has one file."""
    event = "({id: 0, job_id: 1, kind: 'saved', text: '', data: {kind: 'lora', step, path: 'output/best.safetensors'}})"
    drawn.evaluate(f"loraTrainer.live.previews.add([3, 7].map((step) => {event}))")
    assert drawn.evaluate("[...loraTrainer.live.previews.saved]") == [10, 20, 7]
    cards = drawn.locator("#lora_trainer_previews .lora_trainer_checkpoint")
    assert "step 7" in cards.first.inner_text() and cards.first.get_by_text("Use this one").count() == 0, "it is gone"


def test_the_steps_are_walked_through_by_a_slider_and_the_pictures_made_larger(drawn):
    page = drawn
    step, size = (page.locator("#lora_trainer_previews .lora_trainer_grid_slider input").nth(index) for index in (1, 0))
    step.fill("1")
    assert [one.inner_text() for one in page.locator(f"{GRID} thead th:visible").all()] == ["", "base model", "step 10"]
    before = page.locator(f"{GRID} img").first.bounding_box()["width"]
    size.fill("320")
    assert page.locator(f"{GRID} img").first.bounding_box()["width"] == 320 > before
    step.fill("0")
    assert page.locator(f"{GRID} thead th:visible").count() == 4


def test_what_is_wrong_is_said_beside_the_grid(drawn):
    page = drawn
    grids = page.locator("#lora_trainer_previews .lora_trainer_grids")
    fields = grids.locator(".lora_trainer_grid_form input")
    for index, typed, sentence in ((0, "much", "Weights are numbers"), (1, "15", "No LoRA of step 15 is there.")):
        before = fields.nth(index).input_value()
        fields.nth(index).fill(typed)
        grids.get_by_role("button", name="Draw a grid").click()
        grids.get_by_role("alert").filter(has_text=sentence).wait_for()
        fields.nth(index).fill(before)
    fields.nth(0).fill("0.7")
    grids.get_by_role("button", name="Draw a grid").click()
    page.wait_for_function("(grid) => document.querySelectorAll(grid + ' tbody th[scope=row]').length === 1", arg=GRID)
    assert grids.get_by_role("alert").count() == 0 and fields.nth(0).input_value() == "0.7"
    grids.get_by_label("Grid that is shown").select_option(index=1)
    assert page.locator(f"{GRID} tbody th[scope=row]").count() == 3
