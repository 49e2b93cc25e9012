"""From pictures to the prompt in a browser, and what can be wrong on the way."""

from __future__ import annotations

import errno
import os
import sys
import time

import pytest

pytest.importorskip("playwright.sync_api")
from lora_trainer.errors import UserError
from tests.jobs.fakes import make_pictures
from tests.ui.person import add, curve, estimated, start, text, wait_for_text


def test_from_pictures_to_the_prompt(page, files, train, manager):
    add(page, files)
    assert "12 pictures are fine" in text(page, "pictures") and "12 with a caption" in text(page, "pictures")
    assert page.locator("#lora_trainer_thumbnails img").count() == 12
    page.check("input[value=style]")
    page.fill("#lora_trainer_field_output_name", "hat_v1")
    estimated(page)
    assert page.input_value("#lora_trainer_field_trigger_word") == "zwxht"
    assert page.input_value("#lora_trainer_field_lora_rank") == "8", "what the kind suggests"
    assert text(page, "fact_steps") == "240"
    assert text(page, "fact_sum") == "12 pictures × 8 repeats × 10 epochs / batch 4"
    page.click("#lora_trainer_start")
    page.wait_for_selector("#lora_trainer_live:not([hidden])")
    train.allow(5)
    wait_for_text(page, "job_facts", "step 5 of 20")
    early = curve(page)
    train.allow(5)
    wait_for_text(page, "job_facts", "step 10 of 20")
    assert curve(page) != early and curve(page).count("L") == 9
    page.reload()
    wait_for_text(page, "job_facts", "step 10 of 20")
    assert curve(page).count("L") == 9, "the curve is the server's"
    assert page.input_value("#lora_trainer_field_output_name") == "hat_v1", "the form is this browser's"
    train.allow(10)
    wait_for_text(page, "job_message", "in your Lora tab as hat_v1")
    assert page.evaluate("refreshed") == 1, "the picker was told"
    config = train.config()
    assert (config.lora_rank, config.trigger_word, config.output_name) == (8, "zwxht", "hat_v1")
    page.click("#lora_trainer_job_buttons >> text=Try it")
    page.wait_for_selector("#txt2img_prompt textarea")
    assert page.input_value("#txt2img_prompt textarea") == "zwxht <lora:hat_v1:0.8>"


def test_a_picture_can_be_left_out_and_taken_in_again(page, files, manager):
    add(page, files)
    page.hover(".lora_trainer_small_picture >> nth=2")
    page.click(".lora_trainer_take_out >> nth=2")
    wait_for_text(page, "pictures", "11 pictures are fine")
    assert "1 excluded" in text(page, "pictures") and page.locator("#lora_trainer_thumbnails img").count() == 11
    dataset = manager.folders.datasets / page.evaluate("loraTrainer.pictures.chosen")
    assert (dataset / "02.png").exists() and not page.is_visible("#lora_trainer_refused")
    page.click("text=Include them again")
    wait_for_text(page, "pictures", "12 pictures are fine")


def test_captions_that_came_along_are_kept(page, files, manager):
    add(page, files)
    dataset = page.evaluate("loraTrainer.pictures.chosen")
    written = (manager.folders.datasets / dataset / "03.txt").read_text(encoding="utf-8")
    assert written == 'a "red" **hat**, number 3\n'


def test_captions_that_come_after_their_pictures_are_taken(page, files, manager):
    add(page, files[:-1])
    wait_for_text(page, "pictures", "no captions yet")
    page.set_input_files("#lora_trainer_files", files[-1:])
    wait_for_text(page, "pictures", "12 with a caption")
    dataset = page.evaluate("loraTrainer.pictures.chosen")
    written = (manager.folders.datasets / dataset / "03.txt").read_text(encoding="utf-8")
    assert written == 'a "red" **hat**, number 3\n'
    page.set_input_files("#lora_trainer_files", files[-1:])
    wait_for_text(page, "problem_train_data_dir", "Captions go by the file names")


def test_all_pictures_can_be_left_out_and_taken_in_again(page, files):
    add(page, files[:2])
    page.fill("#lora_trainer_field_trigger_word", "zwx")
    for left in (1, 0):
        page.click("#lora_trainer_thumbnails button >> nth=0")
        page.wait_for_function(f"() => document.querySelectorAll('#lora_trainer_thumbnails img').length === {left}")
    wait_for_text(page, "pictures", "0 pictures are fine · 2 excluded")
    page.wait_for_selector("#lora_trainer_problem_train_data_dir", state="hidden")
    page.click("text=Include them again")
    wait_for_text(page, "pictures", "2 pictures are fine")


def test_a_folder_may_come_in_the_quotes_of_windows(page, tmp_path, files):
    page.click("#lora_trainer_other_pictures > summary")
    page.fill("#lora_trainer_folder", f'"{files[0].parent}"')
    page.press("#lora_trainer_folder", "Enter")
    wait_for_text(page, "pictures", "12 pictures are fine")


def test_what_a_run_said_of_a_setting_stays_beside_it_until_something_is_changed(page, files, train):
    train.error = UserError("is too small.", field="resolution", remedy="Use 512.")
    train.free = True
    start(page, files)
    wait_for_text(page, "problem_resolution", "Use 512.")
    estimated(page)
    assert "Use 512." in text(page, "problem_resolution")
    page.evaluate("loraTrainer.form.set('epochs', 3)")
    estimated(page)
    assert page.is_hidden("#lora_trainer_problem_resolution")


MODELS = {"a.safetensors [1]": (True, True), "b.safetensors [2]": (False, False)}


def until_shown(page, base):
    wait = "(text) => loraTrainer.get('field_base_model').selectedOptions[0]?.innerText === text"
    page.wait_for_function(wait, arg=base)


def test_the_page_follows_the_model_that_is_selected_in_the_webui(page, files, manager, monkeypatch):
    host, described = manager.host, []
    lender = host.lender

    def noting(name, options):
        described.append(host.selected())
        return lender(name, options)

    monkeypatch.setattr(host, "lender", noting)
    host.models = dict(MODELS)
    until_shown(page, "a.safetensors [1] (loaded)")
    add(page, files)
    estimated(page)
    host.models = {"a.safetensors [1]": (False, True), "b.safetensors [2]": (True, False)}  # with the tab open
    until_shown(page, "b.safetensors [2] (selected)")
    for _ in range(100):
        if described[-1].title.startswith("b."):
            break
        page.wait_for_timeout(50)
    assert described[-1].title == "b.safetensors [2]", "time and memory are asked for anew"


def test_another_model_than_the_page_shows_is_not_trained(page, files, manager):
    host = manager.host
    host.models = dict(MODELS)
    until_shown(page, "a.safetensors [1] (loaded)")
    add(page, files)
    page.fill("#lora_trainer_field_output_name", "hat_v1")
    estimated(page)
    page.evaluate("loraTrainer.live.look = async () => {}")  # no look at the server before Start
    host.models = {"a.safetensors [1]": (False, True), "b.safetensors [2]": (True, False)}
    page.click("#lora_trainer_start")
    wait_for_text(page, "problem_base_model", "model is b.safetensors [2] now, and a.safetensors [1] was shown.")
    assert not manager.store.jobs()
    page.reload()
    until_shown(page, "b.safetensors [2] (selected)")
    page.click("#lora_trainer_start")
    wait_for_text(page, "job_base", "on tiny-model")
    assert "base_model: b.safetensors [2]" in manager.store.get(1).effective_config


PROBLEMS = {
    "no captions": ("trigger_word", {"bare": True, "trigger_word": ""}, "Your pictures have no captions"),
    "no pictures": ("train_data_dir", {}, "No pictures are chosen"),
    "wrong folder": ("train_data_dir", {"folder": "/there/is/nothing"}, "/there/is/nothing"),
    "name that exists": ("output_name", {"pictures": True, "output_name": "old"}, "There is a LoRA named old already"),
    "no name": ("output_name", {"pictures": True, "output_name": "a/b"}, "cannot be"),
    "no package": ("optimizer", {"pictures": True, "set": {"optimizer": "lion"}}, "needs the package"),
    "no LoRA": ("init_lora", {"pictures": True, "set": {"init_lora": "/not/there.safetensors"}}, "/not/there"),
    "no state": ("resume", {"pictures": True, "set": {"resume": "/not/there.state"}}, "/not/there.state"),
    "no format": ("mixed_precision", {"pictures": True, "set": {"mixed_precision": "fp16"}}, "fp16 training needs"),
    "no whole path": ("merge_into_base", {"pictures": True, "set": {"merge_into_base": "m.safetensors"}}, "whole path"),
    "too many": ("max_train_steps", {"pictures": True, "set": {"max_train_steps": 1e99}}, "above 100000000"),
    "no number": ("learning_rate", {"pictures": True, "learning_rate": "much"}, "'much' is not a number"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_problem_stands_beside_what_it_concerns(page, files, manager, monkeypatch, case):
    field, given, words = PROBLEMS[case]
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    (manager.host.root / "Lora" / "old.safetensors").write_bytes(b"")
    if "pictures" in given:
        add(page, files)
    if "folder" in given:
        page.click("#lora_trainer_other_pictures > summary")
        page.fill("#lora_trainer_folder", given["folder"])
        page.press("#lora_trainer_folder", "Enter")
    if "bare" in given:
        add(page, files[:-1])
    for name, value in given.get("set", {}).items():
        page.evaluate("([name, value]) => loraTrainer.form.set(name, value)", [name, value])
    for name in set(given) - {"pictures", "folder", "bare", "set"}:
        page.evaluate("document.querySelectorAll('#lora_trainer details').forEach((one) => (one.open = true))")
        page.fill(f"#lora_trainer_field_{name}", given[name])
        page.evaluate("document.querySelectorAll('#lora_trainer details').forEach((one) => (one.open = false))")
    page.click("#lora_trainer_start")
    page.wait_for_selector(f"#lora_trainer_problem_{field}:visible")
    assert words in text(page, f"problem_{field}")
    assert not manager.store.jobs(), "nothing was started"


def test_a_taken_name_can_be_replaced(page, files, manager, train):
    train.free = True
    (manager.host.root / "Lora" / "old.safetensors").write_bytes(b"before")
    add(page, files)
    page.fill("#lora_trainer_field_output_name", "old")
    page.click("#lora_trainer_start")
    page.click("text=Replace it")
    page.click("#lora_trainer_start")
    wait_for_text(page, "job_message", "in your Lora tab as old")
    assert (manager.host.root / "Lora" / "old.safetensors").read_bytes() != b"before"


def test_a_name_is_said_to_be_taken_while_it_is_typed_and_not_of_its_own_training(page, files, manager, train):
    train.free = True
    (manager.host.root / "Lora" / "old.safetensors").write_bytes(b"before")
    add(page, files)
    page.fill("#lora_trainer_field_output_name", "old")
    wait_for_text(page, "problem_output_name", "There is a LoRA named old already")
    page.fill("#lora_trainer_field_output_name", "hat_v1")
    page.wait_for_selector("#lora_trainer_problem_output_name", state="hidden")
    page.click("#lora_trainer_start")
    wait_for_text(page, "job_message", "in your Lora tab as hat_v1")
    estimated(page)
    assert not page.is_visible("#lora_trainer_problem_output_name") and not page.is_visible("#lora_trainer_problem_")


def test_what_is_no_picture_is_named_and_the_rest_is_used(page, files, tmp_path):
    broken, note = tmp_path / "broken.png", tmp_path / "note.pdf"
    broken.write_bytes(b"no picture")
    note.write_bytes(b"%PDF")
    add(page, [*files, broken, note])
    assert "12 pictures are fine" in text(page, "pictures")
    assert "broken.png" in text(page, "refused") and "note.pdf" in text(page, "refused")


def test_nothing_but_what_is_no_picture(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.set_input_files("#lora_trainer_files", [broken])
    wait_for_text(page, "problem_train_data_dir", "None of these files can be used.")
    assert "broken.png" in text(page, "refused") and page.evaluate("loraTrainer.pictures.chosen") is None


def test_a_full_disk_is_said_once(page, files, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        page.set_input_files("#lora_trainer_files", files)
        wait_for_text(page, "problem_train_data_dir", "The disk is full")
    assert not page.is_visible("#lora_trainer_refused")
    time.sleep(1)  # the new folder is named by the second
    add(page, files)
    assert "12 pictures are fine" in text(page, "pictures")
    assert not page.is_visible("#lora_trainer_problem_train_data_dir")


def test_words_of_others_are_text(page, tmp_path, manager, train):
    attack = '<img src="x" onerror="window.broken = 1">'
    make_pictures(manager.folders.datasets / "theirs", 2, attack)
    page.evaluate("loraTrainer.pictures.library = null; loraTrainer.pictures.choose('theirs')")
    page.wait_for_selector("#lora_trainer_thumbnails img")
    train.error = RuntimeError(attack)
    page.fill("#lora_trainer_field_output_name", "theirs")
    page.click("#lora_trainer_start")
    train.allow(1)
    wait_for_text(page, "job_message", "onerror")
    page.click("#lora_trainer_job_buttons >> text=Files")
    page.wait_for_selector(".lora_trainer_inside")
    assert page.evaluate("window.broken") is None


def test_a_phone(open_page, files, train):
    page = open_page(width=390)
    start(page, files)
    train.allow(2)
    wait_for_text(page, "job_facts", "step 2 of 20")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_pictures_that_follow_go_where_the_first_went(page, files, manager):
    page.set_input_files("#lora_trainer_files", files[:4])
    page.set_input_files("#lora_trainer_files", files[4:8])
    wait_for_text(page, "pictures", "8 pictures are fine")
    assert len(list(manager.folders.datasets.iterdir())) == 1


def test_a_file_that_is_too_large_takes_no_other_along(page, files, tmp_path):
    film = tmp_path / "film.mp4"
    with open(film, "wb") as handle:
        handle.truncate(80 << 20)
    add(page, [*files, film])
    assert "12 pictures are fine" in text(page, "pictures")
    assert "film.mp4 has 80 MB; up to 64 MB are accepted" in text(page, "refused")


def test_an_upload_that_breaks_off_goes_on_where_it_was(page, manager, tmp_path):
    photos = sorted(make_pictures(tmp_path / "many", 20).glob("*.png"))
    sent = []

    def second_fails(route):
        sent.append(route)
        route.abort() if len(sent) == 2 else route.continue_()

    page.route("**/datasets/*/pictures", second_fails)
    page.set_input_files("#lora_trainer_files", photos)
    wait_for_text(page, "problem_train_data_dir", "does not answer")
    page.set_input_files("#lora_trainer_files", photos)
    wait_for_text(page, "pictures", "20 pictures are fine")
    assert len(list(manager.folders.datasets.iterdir())) == 1
