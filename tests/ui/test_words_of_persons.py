"""With a localisation the page's words are translated, and what a person wrote is not."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("playwright.sync_api")
from PIL import Image

from lora_trainer.report.words import Words
from tests.ui.person import add, start, text, wait_for_text
from tests.ui.words import ROOT

CHINESE = json.loads((ROOT / "localizations" / "zh_CN.json").read_text(encoding="utf-8"))
# Words of the page, of the host's own localisations, and of every object of JavaScript.
WORDS = ["Character", "Stop", "Pictures", "Save now", "core", "finished", "Seed", "constructor", "toString"]
HOSTS = {"Seed": "种子", "Generate": "生成", "00.png": "零", "Sampling method": "采样方法"}


@pytest.fixture
def page(open_page):
    return open_page(words={**CHINESE, **HOSTS})


@pytest.fixture
def files(tmp_path):
    """Pictures whose names and captions are words of the page."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for index, word in enumerate(WORDS):
        Image.new("RGB", (96, 64), (index * 20, 90, 30)).save(folder / f"{word}.png")
        (folder / f"{word}.txt").write_text(f"{word}" if index % 2 else f"**{word}**, Stop, *Seed*", encoding="utf-8")
    Image.new("RGB", (96, 64), (250, 90, 30)).save(folder / "00.png")
    (folder / "00.txt").write_text("Stop", encoding="utf-8")
    return sorted(folder.iterdir())


def texts(page, selector):
    """Every text node under these elements, trimmed."""
    return page.evaluate("""(selector) => Array.from(document.querySelectorAll(selector)).flatMap((place) => {
        const walk = document.createTreeWalker(place, NodeFilter.SHOW_TEXT), found = [];
        while (walk.nextNode()) if (walk.currentNode.data.trim()) found.push(walk.currentNode.data.trim());
        return found;
    })""", selector)  # fmt: skip


def settle(page):
    page.wait_for_timeout(200)  # the host looks at the page once more


def test_the_words_of_the_page_are_translated(page, files):
    add(page, files)
    settle(page)
    assert text(page, "start") == CHINESE["Start training"]
    assert "Drop pictures here" not in page.inner_text("#lora_trainer_drop")
    left = set(texts(page, ".lora_trainer_page")) & {key for key, chinese in CHINESE.items() if key != chinese}
    written = {*WORDS, *(f"{word}.png" for word in WORDS)}
    # What is a name in both languages, or a value of a setting.
    assert {word for word in left - written if " " in word} == set()
    assert page.get_attribute("#lora_trainer_field_trigger_word", "placeholder") in CHINESE.values()


@pytest.mark.parametrize("name", ["Character", "Stop", "constructor"])
def test_the_name_of_a_job_stays(page, files, train, manager, name):
    start(page, files, name)
    train.allow(5)
    wait_for_text(page, "job_facts", "5")
    settle(page)
    assert texts(page, "#lora_trainer_job_name") == [name]
    assert page.title().endswith(name) or name in page.title()
    page.fill("#lora_trainer_field_output_name", f"{name} 2")
    page.evaluate("() => loraTrainer.estimate.start()")
    page.wait_for_selector("#lora_trainer_queue_list li")
    manager.store.update(2, name=name)
    page.evaluate("() => { loraTrainer.get('queue_list').dataset.key = ''; return loraTrainer.live.look(); }")
    page.evaluate("loraTrainer.openSubTab('Runs')")
    page.wait_for_selector("#lora_trainer_run_1")
    settle(page)
    assert texts(page, "#lora_trainer_run_1 .lora_trainer_name") == [name]
    train.allow(20)
    wait_for_text(page, "job_name", name)
    page.click("#lora_trainer_run_1 > button")
    page.wait_for_selector(".lora_trainer_inside")
    settle(page)
    assert page.input_value(".lora_trainer_inside input[type=text]") == name
    others = texts(page, ".lora_trainer_inside select option")
    assert CHINESE["compare with …"] in others


def test_a_name_in_a_sentence_of_the_server_stays(page):
    said = page.evaluate("(text) => loraTrainer.said(text)", "There is a LoRA named Character already.")
    assert said == CHINESE["There is a LoRA named {0} already."].replace("{0}", "Character")
    for word in WORDS:
        said = page.evaluate("(text) => loraTrainer.said(text)", f"There is a LoRA named {word} already.")
        assert word in said and isinstance(said, str)
    reason = "it is excluded in the editor"
    said = page.evaluate("(text) => loraTrainer.said(text)", f"'CON' cannot be a name: {reason}.")
    assert CHINESE[reason] in said and "CON" in said


def test_several_sentences_of_the_server_are_each_translated(page):
    verdict = "The loss of held-out data has risen since step 50, from 0.028 to 0.0595. Step 150 is recommended."
    said = page.evaluate("(text) => loraTrainer.said(text)", verdict)
    assert said == Words("zh_CN").said(verdict) and not re.search("[A-Za-z]{2}", said.replace("0.028", ""))
    assert "0.028 " in said and "0.0595" in said and "150" in said
    for plain in ("A name. And Another one.", "v1.5. Step by step", "..."):
        assert page.evaluate("(text) => loraTrainer.said(text)", plain) == plain


def test_captions_tags_and_file_names_stay(page, files):
    add(page, files)
    page.evaluate("() => loraTrainer.editor.open(loraTrainer.pictures.chosen)")
    page.wait_for_selector("#lora_trainer_editor_grid li")
    for word in ["00", *WORDS]:
        page.evaluate("(file) => loraTrainer.editor.gallery.show(file)", f"{word}.png")
        page.wait_for_function("(file) => loraTrainer.editor.row.file === file", arg=f"{word}.png")
        settle(page)
        caption = page.input_value("#lora_trainer_editor_caption")
        assert texts(page, "#lora_trainer_editor_file") == [f"{word}.png"]
        shown = texts(page, "#lora_trainer_editor_items")
        assert shown == [part.strip("* ") for part in caption.split(",")]
    captions = texts(page, "#lora_trainer_editor_grid .lora_trainer_tile_caption")
    assert "Stop" in captions and not set(captions) & set(CHINESE.values())
    page.click("[data-panel=tags]")
    page.wait_for_selector("#lora_trainer_editor_tags table", state="attached")
    settle(page)
    cells = texts(page, "#lora_trainer_editor_tags td:first-child")
    assert {"Stop", "Seed", "Character", "core", "constructor"} <= set(cells)
    page.evaluate("() => loraTrainer.editor.gallery.want('tags', 'Stop')")
    page.wait_for_selector("#lora_trainer_editor_chips button")
    settle(page)
    assert page.inner_text("#lora_trainer_editor_chips button") == "Stop ×"
    titles = page.evaluate("""() => Array.from(document.querySelectorAll("#lora_trainer_editor_grid button"),
                                               (one) => one.getAttribute("aria-label"))""")  # fmt: skip
    assert all(title.split(": ")[1] in title for title in titles) and any(": Stop" in title for title in titles)


def test_prompts_and_names_on_hover_stay(page, files, train):
    train.checkpoints = (5,)
    start(page, files)
    train.allow(20)
    page.wait_for_selector("#lora_trainer_previews img")
    page.evaluate("""() => loraTrainer.live.previews.add([{kind: "preview", job_id: 1, text: "Stop",
                                                           data: {step: 5, path: "output/previews/5.png"}}])""")
    settle(page)
    assert page.locator("#lora_trainer_previews img[title=Stop]").count() == 1
    assert page.locator("#lora_trainer_thumbnails img[title=Stop]").count() == 2
