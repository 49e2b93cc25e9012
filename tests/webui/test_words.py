"""In a real WebUI with a localisation: the page's words are translated, a person's are not."""

from __future__ import annotations

import json

import pytest

from tests.webui.server import ROOT, Server
from tests.webui.test_tab import add, address, open_tab, page  # noqa: F401

CHINESE = json.loads((ROOT / "localizations" / "zh_CN.json").read_text(encoding="utf-8"))
TEXTS = """(selector) => Array.from(document.querySelectorAll(selector)).flatMap((place) => {
    const walk = document.createTreeWalker(place, NodeFilter.SHOW_TEXT), found = [];
    while (walk.nextNode()) if (walk.currentNode.data.trim()) found.push(walk.currentNode.data.trim());
    return found;
})"""


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    """Its localisation is read once, as it starts."""
    data = tmp_path_factory.mktemp("webui")
    options = {"live_previews_enable": False, "localization": "zh_CN"}
    (data / "config.json").write_text(json.dumps(options), encoding="utf-8")
    with Server(data) as server:
        yield server


def test_a_persons_words_are_translated_by_nobody(page, pictures, tmp_path):  # noqa: F811
    folder = tmp_path / "words"
    folder.mkdir()
    source = next(path for path in sorted(pictures.iterdir()) if path.suffix == ".png")
    for word in ("Character", "Stop", "Pictures"):
        (folder / f"{word}.png").write_bytes(source.read_bytes() + word.encode())
        (folder / f"{word}.txt").write_text(word, encoding="utf-8")
    open_tab(page)
    assert page.evaluate("localization['Start training']") == CHINESE["Start training"]
    add(page, folder)
    page.wait_for_timeout(500)  # the host looks at the page once more
    assert page.inner_text("#lora_trainer_start") == CHINESE["Start training"]
    page.evaluate("() => loraTrainer.editor.open(loraTrainer.pictures.chosen)")
    page.wait_for_selector("#lora_trainer_editor_grid li")
    page.wait_for_timeout(500)
    assert page.evaluate(TEXTS, "#lora_trainer_editor_grid .lora_trainer_tile_caption") == ["Character", "Pictures",
                                                                                           "Stop"]  # fmt: skip
    page.evaluate("""() => {
        document.querySelector(".lora_trainer_page").append(loraTrainer.el("b", {id: "probe"}, "Character"));
        loraTrainer.setText(loraTrainer.get("job_name"), "Character");
    }""")
    page.wait_for_timeout(500)
    assert page.evaluate(TEXTS, "#lora_trainer_probe") == ["Character"]
    assert page.evaluate(TEXTS, "#lora_trainer_job_name") == ["Character"]
