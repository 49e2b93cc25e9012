"""The Dataset sub-tab in a browser, against the real routes: keys, filters, many at once, checks, conflicts."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
from PIL import Image

pytest.importorskip("playwright.sync_api")

from lora_trainer.errors import UserError
from tests.jobs.fakes import wait_for

PICTURES = 60


def make(folder, count):
    folder.mkdir(parents=True)
    for index in range(count):
        Image.effect_noise((72, 64), 20 + index).convert("RGB").save(folder / f"{index:04d}.png")
        (folder / f"{index:04d}.txt").write_text(f"**zwx**, *soft light*, number {index}\n", encoding="utf-8")
    return folder


@pytest.fixture
def folder(manager):
    return make(manager.folders.datasets / "mine", PICTURES)


@pytest.fixture
def open_page(browser, site):
    errors, pages = [], []

    def open_one(name="mine", width=1400, prepare=None):
        page = browser.new_page(viewport={"width": width, "height": 1000})
        pages.append(page)
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        if prepare:
            prepare(page)
        page.goto(site)
        page.wait_for_function("() => window.loraTrainer && loraTrainer.begun")
        page.evaluate(f"loraTrainer.editor.open('{name}')")
        page.wait_for_selector("#lora_trainer_editor_grid li")
        return page

    yield open_one
    for page in pages:
        page.close()
    assert not errors


@pytest.fixture
def page(open_page, folder):
    return open_page()


def text(page, name):
    return page.inner_text(f"#lora_trainer_editor_{name}")


def until(page, name, part):
    page.wait_for_function("([id, part]) => document.getElementById(id).innerText.includes(part)",
                           arg=[f"lora_trainer_editor_{name}", part])  # fmt: skip


def caption(folder, index):
    return (folder / f"{index:04d}.txt").read_text(encoding="utf-8").strip()


def test_the_keyboard_alone(page, folder):
    for index in range(10):
        page.keyboard.press("Enter")
        page.keyboard.type(f", word {index}")
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowRight")
        until(page, "place_of", f"{index + 2} of {PICTURES}")
    until(page, "counts", "10 not saved")
    assert page.text_content("#lora_trainer_unsaved") == "10 changes are not saved."
    page.keyboard.press("Control+z")
    until(page, "counts", "9 not saved")
    page.keyboard.press("Control+Shift+z")
    until(page, "counts", "10 not saved")
    page.keyboard.press("Enter")
    page.keyboard.type(", never kept")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+s")
    until(page, "counts", "all saved")
    assert [caption(folder, index) for index in range(11)] == [
        *(f"**zwx**, *soft light*, number {index}, word {index}" for index in range(10)),
        "**zwx**, *soft light*, number 10",
    ]


def test_keys_faster_than_the_server(page, folder):
    page.keyboard.press("Enter")
    page.keyboard.type(", quick")
    for key in ("Enter", "Control+s"):
        page.keyboard.press(key)
    until(page, "message", "1 file saved")
    assert caption(folder, 0).endswith(", quick")
    page.keyboard.press("Enter")
    page.keyboard.type(", undone")
    for key in ("Enter", "Control+z", "Control+s"):
        page.keyboard.press(key)
    until(page, "message", "Undone")
    until(page, "counts", "all saved")
    page.keyboard.press("Control+y")
    page.keyboard.press("Control+s")
    until(page, "message", "1 file saved")
    assert caption(folder, 0).endswith(", quick, undone")
    page.keyboard.press("Control+z")
    until(page, "counts", "1 not saved")
    assert page.input_value("#lora_trainer_editor_caption").endswith(", quick")


def test_walking_over_the_edge_of_a_page(page):
    page.evaluate("loraTrainer.editor.gallery.hold(47)")
    page.keyboard.press("ArrowRight")
    until(page, "file", "0048.png")
    assert text(page, "range") == f"49–{PICTURES} of {PICTURES}"
    page.keyboard.press("ArrowLeft")
    until(page, "file", "0047.png")


def test_many_at_once_and_back(page, folder):
    page.fill("#lora_trainer_editor_text", "number 1")
    until(page, "range", "of 11")
    page.click("#lora_trainer_editor_opens_many")
    page.select_option("#lora_trainer_editor_action", "replace")
    page.fill("#lora_trainer_editor_old", "soft light")
    page.fill("#lora_trainer_editor_value", "hard light")
    page.click("text=Change them")
    until(page, "message", "11 captions changed")
    page.click("#lora_trainer_editor_message >> text=Undo")
    until(page, "counts", "all saved")
    page.click("#lora_trainer_editor_redo")
    until(page, "counts", "11 not saved")
    page.click("#lora_trainer_editor_save")
    until(page, "counts", "all saved")
    assert caption(folder, 1) == "**zwx**, *hard light*, number 1" and "soft" in caption(folder, 2)


def test_tags_filter_and_marks_have_their_colors(page):
    page.click("#lora_trainer_editor_opens_tags")
    page.click("#lora_trainer_editor_tags .lora_trainer_chip >> text=number 7")
    until(page, "range", "1–1 of 1")
    assert page.inner_text("#lora_trainer_editor_items .lora_trainer_core") == "zwx"
    assert page.inner_text("#lora_trainer_editor_items .lora_trainer_mood") == "soft light"
    page.click("#lora_trainer_editor_items >> text=number 7")
    page.click("#lora_trainer_editor_item_tools >> text=Core")
    page.wait_for_function("() => loraTrainer.get('editor_caption').value.endsWith('**number 7**')")
    page.click("#lora_trainer_editor_chips button")
    until(page, "range", f"of {PICTURES}")


def test_planted_faults_are_found_and_put_right(page, folder):
    shutil.copy(folder / "0003.png", folder / "0099.png")
    page.evaluate("loraTrainer.editor.state = null; loraTrainer.editor.open('mine')")
    until(page, "counts", f"{PICTURES + 1} pictures")
    page.click("#lora_trainer_editor_opens_check")
    page.click("text=Check now")
    until(page, "findings", "0099.png")
    page.select_option("#lora_trainer_editor_kind", "duplicate")
    page.wait_for_function("() => loraTrainer.editor.gallery.total <= 2")
    page.click("text=Fix all that is safe")
    until(page, "counts", "1 excluded")
    assert (folder / "0099.png").exists(), "no file is touched"


def test_a_crop_is_dragged_and_the_file_stays(page, folder):
    before = (folder / "0000.png").read_bytes()
    page.wait_for_function("() => loraTrainer.get('editor_canvas').width !== 512")
    page.click("#lora_trainer_editor_crop")
    page.locator("#lora_trainer_editor_canvas").scroll_into_view_if_needed()
    box = page.locator("#lora_trainer_editor_canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.25)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.5)
    page.mouse.up()
    page.wait_for_function("() => loraTrainer.editor.row.crop")
    assert page.evaluate("loraTrainer.editor.row.crop") == pytest.approx([0.25, 0.25, 0.75, 0.5], abs=0.01)
    assert (folder / "0000.png").read_bytes() == before


def test_a_crop_is_made_with_keys_alone(page, folder):
    page.wait_for_function("() => loraTrainer.get('editor_canvas').width !== 512")
    page.focus("#lora_trainer_editor_crop")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "lora_trainer_editor_canvas"
    for key in ("ArrowLeft", "ArrowLeft", "ArrowDown", "Shift+Control+ArrowLeft", "Shift+ArrowUp"):
        page.keyboard.press(key)
    until(page, "message", "From left 8 % to 83 %, from top 11 % to 90 %")
    assert page.evaluate("loraTrainer.editor.row.crop") is None, "nothing is done yet"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "lora_trainer_editor_crop"
    page.keyboard.press("Enter")
    for _ in range(30):
        page.keyboard.press("Control+ArrowUp")
        page.keyboard.press("Shift+Control+ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_function("() => loraTrainer.editor.row.crop")
    assert page.evaluate("loraTrainer.editor.row.crop") == pytest.approx([0.1, 0, 1, 0.8])
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_function("() => loraTrainer.editor.row.crop[1] > 0")
    assert page.evaluate("loraTrainer.editor.row.crop") == pytest.approx([0.1, 0.01, 1, 0.81]), "it goes on from there"


@pytest.mark.parametrize("choice", ["mine", "theirs"])
def test_what_somebody_else_wrote_is_not_lost_unasked(page, folder, choice):
    page.keyboard.press("Enter")
    page.keyboard.type(", mine")
    page.keyboard.press("Enter")
    until(page, "counts", "1 not saved")
    (folder / "0000.txt").write_text("theirs, and longer\n", encoding="utf-8")
    page.click("#lora_trainer_editor_save")
    until(page, "conflicts", "theirs, and longer")
    assert caption(folder, 0) == "theirs, and longer"
    page.click("text=Keep mine, all" if choice == "mine" else "text=Take theirs, all")
    until(page, "counts", "all saved")
    assert caption(folder, 0) == ("**zwx**, *soft light*, number 0, mine" if choice == "mine" else "theirs, and longer")


def test_a_captioner_that_is_not_here_says_what_to_do(page):
    page.click("#lora_trainer_editor_opens_caption")
    until(page, "captioner_problem", "blip")
    assert page.is_disabled("#lora_trainer_editor_caption_go")


def test_of_two_thousand_pictures_a_page_is_asked_for(open_page, manager):
    folder = manager.folders.datasets / "many"
    make(folder, 1)
    for index in range(1, 2000):
        (folder / f"{index:04d}.png").hardlink_to(folder / "0000.png")
        (folder / f"{index:04d}.txt").write_text(f"**zwx**, number {index % 50}", encoding="utf-8")
    page = open_page("many")
    answers = []
    page.on("response", lambda answer: answers.append(answer) if "/pictures?" in answer.url else None)
    for action in ("load(480)", "load(960)", "want('tags', 'number 7')"):
        answers.clear()
        page.evaluate(f"loraTrainer.editor.gallery.{action}")
        sizes = [len(answer.body()) for answer in answers]
        assert len(sizes) == 1 and sizes[0] < 100_000, (action, sizes)
        assert page.locator("#lora_trainer_editor_grid li").count() <= 48
    assert page.evaluate("loraTrainer.editor.gallery.total") == 40


def test_a_phone(open_page, folder):
    page = open_page(width=390)
    time.sleep(0.3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_server_that_was_started_anew_opens_the_folder_again(page, folder, manager):
    page.keyboard.press("Enter")
    page.keyboard.type(", kept")
    page.keyboard.press("Enter")
    until(page, "counts", "1 not saved")
    page.keyboard.press("ArrowRight")
    until(page, "place_of", "2 of")
    page.keyboard.press("Enter")
    page.keyboard.type(", being typed")
    # Where the page looks at the server by itself in between, what it says is soon followed by what is saved.
    page.evaluate("""() => {
        const {say} = loraTrainer.editor;
        window.said = [];
        loraTrainer.editor.say = (text, ...nodes) => {
            said.push(text);
            say(text, ...nodes);
        };
    }""")
    manager.sessions._open.clear()
    page.keyboard.press("Control+s")
    page.wait_for_function("() => said.some((text) => text.includes('1 change that was not saved is gone'))")
    assert page.input_value("#lora_trainer_editor_caption").endswith("number 1, being typed")
    page.keyboard.press("Control+s")
    page.wait_for_function("() => said.some((text) => text.includes('1 file saved'))")
    assert caption(folder, 1).endswith(", being typed") and not caption(folder, 0).endswith(", kept")


def test_a_picture_taken_in_hand_while_the_page_is_fetched_again_stays(page):
    waiting = []
    page.route("**/pictures?offset=*", lambda route: waiting.append(route))
    page.evaluate("void loraTrainer.editor.gallery.reload()")
    wait_for(lambda: page.wait_for_timeout(10) or waiting, "the page of pictures")
    page.keyboard.press("ArrowRight")
    until(page, "place_of", "2 of")
    page.keyboard.press("Enter")
    page.keyboard.type(", being typed")
    with page.expect_response("**/pictures?offset=*"):
        waiting.pop().continue_()
    page.wait_for_timeout(100)
    assert "2 of" in text(page, "place_of")
    assert page.input_value("#lora_trainer_editor_caption").endswith("number 1, being typed")


def test_a_task_is_followed_again_when_the_server_was_away(page, monkeypatch):
    goes_on = threading.Event()

    def slow(*args, progress, **more):
        progress(1, 10)
        goes_on.wait(30)
        raise UserError("That is how it ended.")

    monkeypatch.setattr("lora_trainer.dataset.checks.check_folder", slow)
    page.click("#lora_trainer_editor_opens_check")
    page.click("text=Check now")
    until(page, "task_count", "1 / 10")
    page.context.set_offline(True)
    until(page, "problem", "does not answer")
    goes_on.set()
    page.context.set_offline(False)
    until(page, "problem", "That is how it ended.")


def test_what_is_being_typed_counts_before_the_folder_is_left(page):
    page.keyboard.press("Enter")
    page.keyboard.type(", on its way")
    page.click("button:has-text('Other pictures')")
    until(page, "message", "1 change is not saved")
    assert page.is_visible("#lora_trainer_editor")


SHOWN = """() => Array.from(document.querySelectorAll("#lora_trainer_editor_grid img"))
    .filter((image) => image.offsetParent && image.style.visibility === "visible").length"""


def test_thumbnails_are_asked_for_again_after_an_error(open_page, folder):
    page = open_page(prepare=lambda page: page.route("**/thumbnails", lambda route: route.abort(), times=1))
    page.wait_for_function(f"() => ({SHOWN})() > 0", timeout=15_000)


def test_thumbnails_come_although_the_next_page_does_not(page):
    page.wait_for_function(f"() => ({SHOWN})() > 0")
    page.evaluate("loraTrainer.get('editor_grid').scrollTop = 0")
    page.route("**/pictures?offset=*", lambda route: route.abort())
    page.evaluate("loraTrainer.editor.act(() => loraTrainer.editor.gallery.load(48))")
    until(page, "problem", "does not answer")
    page.evaluate("loraTrainer.get('editor_grid').scrollTop = 1e6")
    last = "loraTrainer.get('editor_grid').lastChild.querySelector('img')"
    page.wait_for_function(f"() => {last}.style.visibility === 'visible'")


def test_a_shorter_page_takes_no_tile_away(page):
    moved = page.evaluate("""async () => {
        const {gallery} = loraTrainer.editor, grid = loraTrainer.get("editor_grid");
        let moved = 0;
        const watch = new MutationObserver((found) => (moved += found.length));
        watch.observe(grid, {childList: true});
        for (const offset of [48, 0]) await gallery.load(offset);
        await gallery.load(48);
        watch.takeRecords().forEach(() => moved++);
        return moved;
    }""")
    assert moved == 0
    assert page.locator("#lora_trainer_editor_grid li:visible").count() == PICTURES - 48
