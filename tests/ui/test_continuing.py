"""Ways back: from continuing another run, from old pictures, from a checkpoint that was chosen."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("playwright.sync_api")
from PIL import Image
from playwright.sync_api import expect

from lora_trainer.errors import UserError
from tests.jobs.fakes import weights_at
from tests.ui.person import add, estimated, start, text, wait_for_text


@pytest.fixture
def more(tmp_path):
    """Other pictures than ``files``, with captions."""
    folder = tmp_path / "more"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (96, 64), (10, index * 60, 200)).save(folder / f"new{index}.png")
        (folder / f"new{index}.txt").write_text("a blue ring", encoding="utf-8")
    return sorted(folder.iterdir())


def continue_it(page, files, train):
    train.free = True
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Continue from it")
    wait_for_text(page, "origin", "Continues from hat_v1")


def begins_with(page, train):
    """The LoRA that the next training begins with."""
    known = len(train.configs)
    estimated(page)
    page.click("#lora_trainer_start")
    page.wait_for_function("(count) => loraTrainer.live.job && loraTrainer.live.job.id > count", arg=known)
    wait_for_text(page, "job_state", "finished")
    return train.config(known).init_lora


def test_continuing_can_be_taken_back(page, files, train):
    continue_it(page, files, train)
    page.click("#lora_trainer_origin >> text=Begin anew instead")
    page.wait_for_selector("#lora_trainer_origin", state="hidden")
    page.reload()
    page.wait_for_function("() => loraTrainer.begun && loraTrainer.pictures.chosen")
    assert not page.is_visible("#lora_trainer_origin")
    assert not begins_with(page, train)


@pytest.mark.parametrize("way", ["added", "folder", "earlier"])
def test_continuing_does_not_stick_to_other_pictures(page, files, more, train, way):
    other = None
    if way == "earlier":
        add(page, more)
        other = page.evaluate("loraTrainer.pictures.chosen")
        page.evaluate("loraTrainer.pictures.choose(null)")
        page.wait_for_timeout(1100)  # data sets are named by the second
    continue_it(page, files, train)
    page.click("#lora_trainer_pictures >> text=Take others")
    if way == "added":
        page.wait_for_timeout(1100)
        add(page, more)
    else:
        folder = other if way == "earlier" else str(more[0].parent)
        page.evaluate("(folder) => loraTrainer.pictures.choose(folder)", folder)
        page.wait_for_selector("#lora_trainer_pictures:not([hidden])")
    wait_for_text(page, "origin", "this does not continue from hat_v1 any more")
    assert not begins_with(page, train)


def test_continuing_with_other_pictures_is_possible_when_it_is_meant(page, files, more, train):
    continue_it(page, files, train)
    page.evaluate("(folder) => loraTrainer.pictures.choose(folder)", str(more[0].parent))
    page.click("#lora_trainer_origin >> text=Continue from it all the same")
    wait_for_text(page, "origin", "Continues from hat_v1")
    assert begins_with(page, train).endswith("hat_v1.safetensors")


def test_continuing_with_more_pictures_goes_on(page, files, more, train):
    continue_it(page, files, train)
    add(page, more)
    wait_for_text(page, "pictures", "15 pictures")
    assert "Continues from hat_v1" in text(page, "origin")
    assert begins_with(page, train).endswith("hat_v1.safetensors")


def test_the_same_pictures_again_continue_again(page, files, train):
    continue_it(page, files, train)
    folder = page.evaluate("loraTrainer.pictures.chosen")
    page.evaluate("async (folder) => { await loraTrainer.pictures.choose('elsewhere'); "
                  "await loraTrainer.pictures.choose(folder); }", folder)  # fmt: skip
    wait_for_text(page, "origin", "Continues from hat_v1")


# -- step 1 beside a base model that cannot be trained


@pytest.fixture
def untrainable(manager, monkeypatch):
    def refuse(checkpoint, options):
        raise UserError("This one cannot be trained.", field="base_model", remedy="Choose another.")

    monkeypatch.setattr(manager.host, "lender", refuse)


def test_pictures_are_summed_up_and_can_be_exchanged_whatever_the_base_model_is(page, files, more, untrainable):
    add(page, files)
    assert "12 pictures" in text(page, "pictures") and "12 with a caption" in text(page, "pictures")
    assert "cannot be trained" in text(page, "problem_base_model")
    assert page.is_visible("#lora_trainer_picture_links")
    first = page.evaluate("loraTrainer.pictures.chosen")
    page.click("#lora_trainer_pictures >> text=Take others")
    page.wait_for_selector("#lora_trainer_pictures", state="hidden")
    page.wait_for_timeout(1100)
    add(page, more)
    assert page.evaluate("loraTrainer.pictures.chosen") != first and "3 pictures" in text(page, "pictures")
    folder = str(files[0].parent)
    page.evaluate("(folder) => loraTrainer.pictures.choose(folder)", folder)
    wait_for_text(page, "pictures", folder)
    assert "Take others" in text(page, "pictures")


@pytest.mark.parametrize("trainable", [True, False])
def test_pictures_that_join_earlier_ones_say_so(page, files, more, manager, monkeypatch, request, trainable):
    if not trainable:
        request.getfixturevalue("untrainable")
    add(page, files)
    assert "added to" not in text(page, "pictures")
    add(page, more)
    wait_for_text(page, "pictures", "3 new, added to 12 that were here.")
    page.click("#lora_trainer_pictures >> text=Exclude the earlier ones")
    wait_for_text(page, "pictures", "12 excluded")
    assert "3 pictures" in text(page, "pictures") and "added to" not in text(page, "pictures")
    dataset = manager.folders.datasets / page.evaluate("loraTrainer.pictures.chosen")
    assert len(list(dataset.glob("*.png"))) == 15, "no file is deleted"


# -- a checkpoint that was chosen


def test_use_this_one_answers_at_once(page, files, train, manager, monkeypatch):
    """Drawing the picture that checks a LoRA takes a WebUI seconds."""
    train.free, train.checkpoints = True, (5, 10)
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Compare checkpoints")
    shown = page.locator("#lora_trainer_previews .lora_trainer_checkpoint")
    go, verify = threading.Event(), manager.host.verify
    monkeypatch.setattr(manager.host, "verify", lambda *given: go.wait(20) and verify(*given))
    shown.nth(0).get_by_text("Use this one").click()
    shown.nth(0).get_by_text("on its way to your Lora tab").wait_for(timeout=1000)
    assert shown.nth(1).get_by_text("Use this one").is_disabled()
    go.set()
    shown.nth(0).get_by_text("in your Lora tab", exact=True).wait_for()
    expect(shown.nth(1).get_by_text("Use this one")).to_be_enabled()


def test_use_this_one_that_fails_can_be_tried_again(page, files, train, manager):
    train.free, train.checkpoints = True, (5,)
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Compare checkpoints")
    shown = page.locator("#lora_trainer_previews .lora_trainer_checkpoint")
    manager.host.publish_error = UserError("The disk is full.", remedy="Free some space.")
    shown.nth(0).get_by_text("Use this one").click()
    wait_for_text(page, "trouble", "The disk is full.")
    manager.host.publish_error = None
    shown.nth(0).get_by_text("Use this one").click()
    shown.nth(0).get_by_text("in your Lora tab", exact=True).wait_for()


def test_publishing_under_a_new_name_takes_the_chosen_checkpoint(page, files, train, manager):
    train.free, train.checkpoints = True, (5, 10)
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Files")
    inside = page.locator(".lora_trainer_inside")
    inside.get_by_text("Compare checkpoints").click()
    inside.get_by_text("Use this one").nth(0).click()
    page.wait_for_function("() => loraTrainer.runs.jobs[0].published_step === 5")
    inside.get_by_label("Name in the Lora tab").fill("chosen")
    inside.get_by_text("Publish again").click()
    page.wait_for_function("() => loraTrainer.runs.jobs[0].published === 'chosen'")
    assert (manager.host.root / "Lora" / "chosen.safetensors").read_bytes() == weights_at(5)
    inside.get_by_text("chosen as it was at step 5").wait_for()
