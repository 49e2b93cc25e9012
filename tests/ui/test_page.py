"""The tab in a browser, against the real routes and queue; only the host and the training are fakes."""

from __future__ import annotations

import csv
import errno
import os
import time

import pytest
from PIL import Image

pytest.importorskip("playwright.sync_api")
from fastapi import FastAPI

from lora_trainer.api import add_routes
from lora_trainer.errors import UserError
from lora_trainer.jobs import reporting
from lora_trainer.jobs.worker import JobManager
from tests.jobs.fakes import FakeHost, FakeTrain, make_pictures
from tests.ui.browser import chromium, served

PICTURES = 12


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def train():
    return FakeTrain(total_steps=20)


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

    def open_one(width=1400):
        contexts.append(browser.new_context(viewport={"width": width, "height": 1000}))
        page = contexts[-1].new_page()
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


def add(page, files):
    page.set_input_files("#lora_trainer_files", files)
    page.wait_for_selector("#lora_trainer_pictures:not([hidden])")


def text(page, name):
    return page.inner_text(f"#lora_trainer_{name}")


def wait_for_text(page, name, part):
    page.wait_for_function("([id, part]) => document.getElementById(id).innerText.includes(part)",
                           arg=[f"lora_trainer_{name}", part])  # fmt: skip


def estimated(page):
    """Until the numbers follow what was changed last."""
    page.evaluate("() => loraTrainer.estimate.now()")


def start(page, files, name="hat_v1"):
    add(page, files)
    page.fill("#lora_trainer_field_output_name", name)
    page.click("#lora_trainer_start")
    page.wait_for_selector("#lora_trainer_live:not([hidden])")


def curve(page):
    return page.get_attribute("#lora_trainer_curve .lora_trainer_raw", "d") or ""


def test_from_pictures_to_the_prompt(page, files, train, manager):
    add(page, files)
    assert "12 pictures are fine" in text(page, "pictures") and "12 with a caption" in text(page, "pictures")
    assert page.locator("#lora_trainer_thumbnails img").count() == 12
    page.check("input[value=style]")
    page.fill("#lora_trainer_field_output_name", "hat_v1")
    estimated(page)
    assert page.input_value("#lora_trainer_field_trigger_word") == "hat"
    assert page.input_value("#lora_trainer_field_lora_rank") == "8", "what the kind suggests"
    assert text(page, "fact_steps") == "240" and text(page, "fact_visits") == "12 × 80"
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
    config = train.configs[0]
    assert (config.lora_rank, config.trigger_word, config.output_name) == (8, "hat", "hat_v1")
    page.click("#lora_trainer_job_buttons >> text=Try it")
    page.wait_for_selector("#txt2img_prompt textarea")
    assert page.input_value("#txt2img_prompt textarea") == "hat <lora:hat_v1:0.8>"


def test_a_picture_can_be_left_out_and_taken_in_again(page, files, manager):
    add(page, files)
    page.hover(".lora_trainer_small_picture >> nth=2")
    page.click(".lora_trainer_take_out >> nth=2")
    wait_for_text(page, "pictures", "11 pictures are fine")
    assert "1 left out" in text(page, "pictures") and page.locator("#lora_trainer_thumbnails img").count() == 11
    dataset = manager.folders.datasets / page.evaluate("loraTrainer.pictures.chosen")
    assert (dataset / "02.png").exists() and not page.is_visible("#lora_trainer_refused")
    page.click("text=Take them in again")
    wait_for_text(page, "pictures", "12 pictures are fine")


def test_captions_that_came_along_are_kept(page, files, manager):
    add(page, files)
    dataset = page.evaluate("loraTrainer.pictures.chosen")
    written = (manager.folders.datasets / dataset / "03.txt").read_text(encoding="utf-8")
    assert written == 'a "red" **hat**, number 3\n'


def test_two_pages_agree(page, open_page, files, train):
    start(page, files)
    train.allow(3)
    other = open_page()
    wait_for_text(other, "job_facts", "step 3 of 20")
    other.click("#lora_trainer_job_buttons >> text=Pause")
    wait_for_text(page, "job_state", "paused")
    page.click("#lora_trainer_job_buttons >> text=Resume")
    wait_for_text(other, "job_state", "training")
    train.allow(2)
    for one in (page, other):
        wait_for_text(one, "job_facts", "step 5 of 20")
    other.click("#lora_trainer_job_buttons >> text=Preview now")
    train.allow(1)
    for one in (page, other):
        one.wait_for_selector("#lora_trainer_previews img")
    page.click("#lora_trainer_job_buttons >> text=Stop and save")
    for one in (page, other):
        wait_for_text(one, "job_state", "stopped")


def test_the_queue_waits_its_turn(page, files, train):
    start(page, files)
    for name in ("second", "third"):
        page.fill("#lora_trainer_field_output_name", name)
        page.click("#lora_trainer_start")
        wait_for_text(page, "queue", name)
    page.locator("#lora_trainer_queue_list li", has_text="third").get_by_text("First").click()
    page.wait_for_function("() => document.querySelector('#lora_trainer_queue_list li').innerText.includes('third')")
    page.locator("#lora_trainer_queue_list li", has_text="second").get_by_text("Remove").click()
    page.wait_for_function("() => document.querySelectorAll('#lora_trainer_queue_list li').length === 1")


PROBLEMS = {
    "no captions": ("trigger_word", {"bare": True, "trigger_word": ""}, "Your pictures have no captions"),
    "no pictures": ("train_data_dir", {}, "No pictures are chosen"),
    "wrong folder": ("train_data_dir", {"folder": "/there/is/nothing"}, "/there/is/nothing"),
    "name that exists": ("output_name", {"pictures": True, "output_name": "old"}, "There is a LoRA named old already"),
    "no name": ("output_name", {"pictures": True, "output_name": "a/b"}, "cannot be"),
    "no number": ("learning_rate", {"pictures": True, "learning_rate": "much"}, "'much' is not a number"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_problem_stands_beside_what_it_concerns(page, files, manager, case):
    field, given, words = PROBLEMS[case]
    (manager.host.root / "Lora" / "old.safetensors").write_bytes(b"")
    if "pictures" in given:
        add(page, files)
    if "folder" in given:
        page.click("#lora_trainer_other_pictures > summary")
        page.fill("#lora_trainer_folder", given["folder"])
        page.press("#lora_trainer_folder", "Enter")
    if "bare" in given:
        add(page, files[:-1])
    for name in set(given) - {"pictures", "folder", "bare"}:
        page.evaluate("document.querySelectorAll('#lora_trainer details').forEach((one) => (one.open = true))")
        page.fill(f"#lora_trainer_field_{name}", given[name])
        page.evaluate("document.querySelectorAll('#lora_trainer details').forEach((one) => (one.open = false))")
    page.click("#lora_trainer_start")
    page.wait_for_selector(f"#lora_trainer_problem_{field}:visible")
    assert words in text(page, f"problem_{field}")
    assert not manager.store.list(), "nothing was started"


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


def test_settings_as_yaml(page, files):
    add(page, files)
    page.fill("#lora_trainer_field_output_name", "hat_v1")
    page.click("#lora_trainer_advanced > summary")
    page.click("text=As YAML, in and out")
    page.click("text=Show the settings here")
    page.wait_for_function("() => loraTrainer.get('yaml').value.includes('output_name: hat_v1')")
    page.fill("#lora_trainer_yaml", "network_dim: 32\nlearning_rate: 5e-5\nepochs: 3\noutput_name: other")
    page.click("text=Use these settings")
    page.wait_for_function("() => loraTrainer.form.control('lora_rank').value === '32'")
    assert page.input_value("#lora_trainer_field_learning_rate") == "5e-5"
    assert page.input_value("#lora_trainer_field_output_name") == "other"
    page.fill("#lora_trainer_yaml", "epocs: 3")
    page.click("text=Use these settings")
    wait_for_text(page, "problem_yaml", "Did you mean 'epochs'?")


def test_a_changed_value_stays_until_it_is_reset(page, files):
    add(page, files)
    page.click("#lora_trainer_advanced > summary")
    page.click("[data-group=optimization] > summary")
    page.fill("#lora_trainer_field_epochs", "3")
    page.check("input[value=style]")
    estimated(page)
    assert page.input_value("#lora_trainer_field_epochs") == "3" and text(page, "changed") == "1 changed"
    page.click("[data-reset=epochs]")
    assert page.input_value("#lora_trainer_field_epochs") == "10" and text(page, "changed") == ""


def test_checkpoints_are_chosen_by_their_pictures(page, files, train, manager):
    train.free, train.checkpoints = True, (5, 10)
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Compare checkpoints")
    shown = page.locator("#lora_trainer_previews .lora_trainer_checkpoint")
    said = [one.inner_text().split("\n") for one in shown.all()]
    assert said == [["step 5", "Use this one"], ["step 10", "Use this one"]]
    shown.nth(0).get_by_text("Use this one").click()
    wait_for_text(page, "job_message", "keeps hat_v1 as it was at step 5")
    assert (manager.host.root / "Lora" / "hat_v1.safetensors").read_bytes() == b"weights at step 5"
    assert "in your Lora tab" in shown.nth(0).inner_text()
    page.click("#lora_trainer_job_buttons >> text=Files")
    inside = page.locator(".lora_trainer_inside")
    inside.get_by_text("Compare checkpoints").click()
    inside.get_by_text("Use this one").click()
    page.wait_for_function("() => loraTrainer.live.job.published_step === 10")
    assert (manager.host.root / "Lora" / "hat_v1.safetensors").read_bytes() == b"weights at step 10"


def test_the_title_and_a_notification_tell_the_end(open_page, files, train):
    page = open_page()
    page.evaluate("""() => {
        window.told = [];
        window.Notification = class { constructor(title, {body}) { window.told.push([title, body]); } };
        Notification.permission = "granted";
        document.title = "Stable Diffusion";
    }""")
    before = page.title()
    start(page, files)
    train.allow(5)
    page.wait_for_function("() => document.title.startsWith('25 % hat_v1')")
    train.allow(15)
    page.wait_for_function("() => document.title.startsWith('hat_v1: finished')")
    assert page.evaluate("told") == [["hat_v1: finished", "It is in your Lora tab as hat_v1."]]
    page.wait_for_function("(before) => document.title === before", arg=before)


def test_history(page, files, train, manager):
    train.free = True
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Files")
    inside = page.locator(".lora_trainer_inside")
    inside.get_by_text("Files", exact=True).click()
    assert "hat_v1.safetensors" in inside.inner_text()
    inside.get_by_text("Continue from it").click()
    wait_for_text(page, "origin", "Continues from hat_v1")
    assert page.input_value("#lora_trainer_field_output_name") == "hat_v2"
    page.click("#lora_trainer_start")
    wait_for_text(page, "job_name", "hat_v2")
    wait_for_text(page, "job_state", "finished")
    assert train.configs[1].init_lora.endswith("hat_v1.safetensors")
    page.evaluate("loraTrainer.openSubTab('Runs')")
    page.wait_for_selector("#lora_trainer_run_2")
    page.click("#lora_trainer_run_2 > button")
    page.click("#lora_trainer_run_2 >> text=Delete …")
    page.click("#lora_trainer_run_2 >> text=Delete it")
    page.wait_for_selector("#lora_trainer_run_2", state="detached")
    assert [job.id for job in manager.store.list()] == [1]
    assert (manager.host.root / "Lora" / "hat_v2.safetensors").exists(), "the published LoRA stays"


def test_five_hundred_runs_open_in_a_second(manager, open_page, tmp_path):
    config = "train_data_dir: x\n"
    for index in range(500):
        manager.store.add(f"run_{index}", config, status="finished", dataset="x", base_model="m", host="standalone")
    page = open_page()
    begin = time.perf_counter()
    page.evaluate("loraTrainer.openSubTab('Runs')")
    page.wait_for_selector(".lora_trainer_run")
    assert time.perf_counter() - begin < 1
    assert text(page, "runs_count") == "50 of 500"
    page.click("#lora_trainer_runs_more")
    wait_for_text(page, "runs_count", "100 of 500")


def test_an_idle_page_leaves_the_hosts_page_alone(page):
    """A1111 runs every extension's callbacks whenever a node comes or goes."""
    changes = page.evaluate("""async () => {
        let changes = 0;
        new MutationObserver((found) => (changes += found.length)).observe(document, {childList: true, subtree: true});
        for (let look = 0; look < 5; look++) await loraTrainer.live.look();
        return changes;
    }""")
    assert changes == 0


def test_a_phone(open_page, files, train):
    page = open_page(width=390)
    start(page, files)
    train.allow(2)
    wait_for_text(page, "job_facts", "step 2 of 20")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_server_that_is_away_is_said_and_found_again(page, files, train):
    start(page, files)
    page.context.set_offline(True)
    wait_for_text(page, "trouble", "does not answer")
    page.context.set_offline(False)
    page.wait_for_selector("#lora_trainer_trouble", state="hidden")
    train.allow(4)
    wait_for_text(page, "job_facts", "step 4 of 20")


def test_runs_stay_open_while_others_go_on(page, files, train, manager):
    """Under a filter that the running job does not pass, every look at the server once loaded the list anew."""
    train.free = True
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    train.free = False
    page.evaluate("loraTrainer.openSubTab('Runs')")
    page.select_option("#lora_trainer_runs_filter", "finished")
    page.click("#lora_trainer_run_1 > button")
    page.wait_for_selector(".lora_trainer_inside")
    page.evaluate("""() => {
        window.lists = 0;
        const before = window.fetch;
        window.fetch = (url, ...rest) => ((lists += String(url).includes("/jobs?")), before(url, ...rest));
    }""")
    second = manager.duplicate(1)
    for step in range(1, 4):
        train.allow(1)
        page.wait_for_function("([id, step]) => loraTrainer.live.job.id === id && loraTrainer.live.job.step === step",
                               arg=[second.id, step])  # fmt: skip
    assert page.evaluate("lists") == 0
    train.allow(20)
    page.wait_for_selector("#lora_trainer_run_2")
    assert page.locator("#lora_trainer_run_1 .lora_trainer_inside").count() == 1, "it stays open when the list grows"


def test_the_page_turns_to_no_other_tab_by_itself(page, files, train):
    start(page, files)
    page.evaluate("loraTrainer.openSubTab('Runs')")
    page.click("#lora_trainer_run_1 > button")
    page.wait_for_selector(".lora_trainer_inside >> text=Stop and save")
    page.evaluate("loraTrainer.openSubTab('Train')")
    train.allow(20)
    wait_for_text(page, "job_state", "finished")
    page.wait_for_selector(".lora_trainer_inside >> text=Compare checkpoints", state="attached")
    assert page.is_visible("#lora_trainer_tab_train") and page.locator(".lora_trainer_inside").count() == 1


def test_a_phone_that_has_no_notifications_shows_the_end_all_the_same(page, files, train):
    page.evaluate("""() => {
        window.Notification = class { constructor() { throw new TypeError("Illegal constructor"); } };
        Notification.permission = "granted";
    }""")
    start(page, files)
    train.allow(20)
    page.wait_for_function("() => !loraTrainer.live.seenRunning.size && loraTrainer.live.job.status === 'finished'")
    assert not page.is_visible("#lora_trainer_trouble")


def test_a_command_that_is_refused_is_said_long_enough(page, files, train, manager, monkeypatch):
    def refused(*args, **more):
        raise UserError("Not now.", remedy="Later.")

    start(page, files)
    page.wait_for_selector("#lora_trainer_job_buttons >> text=Save now")
    monkeypatch.setattr(manager, "_command", refused)
    page.click("#lora_trainer_job_buttons >> text=Save now")
    wait_for_text(page, "trouble", "Not now. Later.")
    train.allow(2)
    wait_for_text(page, "job_facts", "step 2 of 20")
    assert text(page, "trouble") == "Not now. Later."


def test_a_job_that_another_page_deletes_is_gone(page, files, train, manager):
    train.free = True
    start(page, files)
    wait_for_text(page, "job_state", "finished")
    manager.delete(1, confirm=True)
    page.wait_for_selector("#lora_trainer_live", state="hidden")


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


def test_continuing_takes_what_the_form_says_also_where_that_is_a_default(page, files, train):
    train.free = True
    add(page, files)
    page.evaluate("loraTrainer.form.set('epochs', 7)")
    start(page, [])
    wait_for_text(page, "job_state", "finished")
    page.click("#lora_trainer_job_buttons >> text=Continue from it")
    wait_for_text(page, "origin", "Continues from hat_v1")
    page.evaluate("loraTrainer.form.set('epochs', undefined)")
    estimated(page)
    assert page.input_value("#lora_trainer_field_epochs") == "10"
    page.click("#lora_trainer_start")
    wait_for_text(page, "job_name", "hat_v2")
    wait_for_text(page, "job_state", "finished")
    assert train.configs[1].epochs == 10 and train.configs[1].init_lora.endswith("hat_v1.safetensors")
    page.click("#lora_trainer_job_buttons >> text=Run again with changes")
    page.wait_for_function("() => loraTrainer.form.given.output_name === 'hat_v3'")
    assert page.evaluate("loraTrainer.form.given.init_lora").endswith("hat_v1.safetensors"), "it began with that, too"


def test_optimizer_arguments_are_what_they_look_like(page):
    page.evaluate("""() => {
        const field = loraTrainer.form.control("optimizer_args");
        field.value = "nesterov: false\\nbetas: [0.9, 0.99]\\neps: 1e-8\\nname: plain";
        field.dispatchEvent(new Event("input", {bubbles: true}));
        loraTrainer.form.display();
    }""")
    given = {"nesterov": False, "betas": [0.9, 0.99], "eps": 1e-8, "name": "plain"}
    assert page.evaluate("loraTrainer.form.given.optimizer_args") == given
    assert "betas: [0.9,0.99]" in page.input_value("#lora_trainer_field_optimizer_args")


def test_a_kind_that_is_set_anew_in_the_settings_counts(page):
    page.context.add_init_script("""window.onOptionsAvailable = (action) => {
        opts.lora_trainer_kind = localStorage.getItem("kind of the settings");
        action();
    }""")

    def kind(settings, chosen=None):
        page.evaluate("(kind) => localStorage.setItem('kind of the settings', kind)", settings)
        page.reload()
        page.wait_for_function("() => window.loraTrainer && loraTrainer.begun")
        if chosen:
            page.check(f"input[value={chosen}]")
        return page.evaluate("loraTrainer.form.kind()")

    kind("character", chosen="scene")
    assert kind("character") == "scene", "what was chosen last stays"
    assert kind("style") == "style"


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
