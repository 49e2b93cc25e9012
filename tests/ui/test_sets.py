"""Data sets on the page: seen with a picture and their size, opened, renamed, deleted."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
from lora_trainer.workspace.library import DatasetLibrary
from tests.jobs.fakes import make_pictures
from tests.ui.person import add, start, text, wait_for_text


def names(manager):
    return sorted(path.name for path in manager.folders.datasets.iterdir())


@pytest.fixture
def sets(manager, page):
    """Three data sets, one of them put there by hand; yields their list on the page."""
    library = DatasetLibrary(manager.folders.data)
    for name in ("cats", "dogs"):
        make_pictures(library.create(name))
    make_pictures(manager.folders.datasets / "theirs")
    page.evaluate("loraTrainer.openSubTab('Dataset')")
    page.wait_for_selector("#lora_trainer_sets li >> nth=2")
    return page.locator("#lora_trainer_sets > li")


def test_a_data_set_shows_a_picture_and_its_size(sets, page, manager):
    cats = sets.filter(has_text="cats")
    size = sum(path.stat().st_size for path in (manager.folders.datasets / "cats").iterdir())
    assert f"3 pictures · {max(1, round(size / 1024))} KB" in cats.inner_text()
    images = "[...document.querySelectorAll('#lora_trainer_sets img')]"
    page.wait_for_function(f"() => {images}.every((one) => one.naturalWidth)")
    assert sets.filter(has_text="theirs").get_by_role("button").all_inner_texts() == ["Train with them", "Edit"]
    cats.get_by_text("Train with them").click()
    wait_for_text(page, "pictures", "cats · 3 pictures are fine")


def test_a_new_name_goes_along_to_step_1_and_to_earlier_runs(sets, page, manager, train):
    train.free = True
    sets.filter(has_text="cats").get_by_text("Train with them").click()
    start_with(page, "first")
    wait_for_text(page, "job_state", "finished")
    page.evaluate("loraTrainer.editor.other = true; loraTrainer.openSubTab('Dataset')")
    sets.filter(has_text="cats").get_by_text("Rename").click()
    field = sets.get_by_label("New name")
    field.fill("dogs")
    sets.get_by_text("Rename it").click()
    sets.get_by_text("There is a dataset dogs already.").wait_for()
    field.fill("kittens")
    field.press("Enter")
    sets.filter(has_text="kittens").wait_for()
    assert names(manager) == ["dogs", "kittens", "theirs"]
    page.evaluate("loraTrainer.openSubTab('Train')")
    wait_for_text(page, "pictures", "kittens · 3 pictures are fine")
    page.click("#lora_trainer_job_buttons >> text=Run again with changes")
    page.wait_for_function("() => loraTrainer.form.given.output_name === 'first_2'")
    page.click("#lora_trainer_start")
    wait_for_text(page, "job_name", "first_2")
    wait_for_text(page, "job_state", "finished")
    assert train.config(1).train_data_dir.endswith("kittens")


def start_with(page, name):
    page.fill("#lora_trainer_field_output_name", name)
    page.click("#lora_trainer_start")
    page.wait_for_selector("#lora_trainer_live:not([hidden])")


def test_deleting_says_what_goes_and_asks_once_more(sets, page, manager):
    cats = sets.filter(has_text="cats")
    cats.get_by_text("Delete …").click()
    assert "3 pictures with their captions" in cats.inner_text() and "LoRAs made with them stay" in cats.inner_text()
    cats.get_by_text("Keep them").click()
    assert names(manager) == ["cats", "dogs", "theirs"]
    cats.get_by_text("Delete …").click()
    cats.get_by_text("Delete them").click()
    page.wait_for_function("() => document.querySelectorAll('#lora_trainer_sets > li').length === 2")
    assert names(manager) == ["dogs", "theirs"]


def test_pictures_that_wait_for_their_training_stay(page, files, manager):
    start(page, files)
    name = page.evaluate("loraTrainer.pictures.chosen")
    page.evaluate("loraTrainer.openSubTab('Dataset'); loraTrainer.editor.other = true")
    row = page.locator("#lora_trainer_sets > li")
    row.get_by_text("Delete …").click()
    row.get_by_text("Delete them").click()
    row.get_by_text("hat_v1 is being trained on").wait_for()
    assert names(manager) == [name]


def test_what_is_deleted_is_not_trained_on(page, files, manager):
    add(page, files)
    page.evaluate("loraTrainer.editor.other = true; loraTrainer.openSubTab('Dataset')")
    row = page.locator("#lora_trainer_sets > li")
    row.get_by_text("Delete …").click()
    row.get_by_text("Delete them").click()
    page.wait_for_selector("#lora_trainer_sets_empty", state="visible")
    assert page.evaluate("loraTrainer.pictures.chosen") is None and names(manager) == []
    page.evaluate("loraTrainer.openSubTab('Train')")
    page.click("#lora_trainer_start")
    wait_for_text(page, "problem_train_data_dir", "No pictures are chosen")


PICTURE = """async (name) => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 64;
    const blob = await new Promise((done) => canvas.toBlob(done));
    await loraTrainer.pictures.add([new File([blob], "a.png")], name);
    await loraTrainer.pictures.choose(null);
}"""


def test_a_folder_that_is_dropped_gives_its_name(page, manager):
    for name in ("my cat", "my cat", "con"):
        page.evaluate(PICTURE, name)
        page.wait_for_timeout(1100)  # the usual name has the second in it
    first, *others = names(manager)
    assert first == "my cat" and len(others) == 2 and all(name.startswith("pictures 2") for name in others)
    page.evaluate("loraTrainer.openSubTab('Dataset')")
    page.wait_for_selector("#lora_trainer_sets >> text=my cat")
    assert "1 picture ·" in text(page, "sets")
