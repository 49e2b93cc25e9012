"""One word for one thing, and sums that add up."""

from __future__ import annotations

import json
import math
import re

import pytest

from lora_trainer.ui import dataset_tab, results_tab, tools_tab, train_tab
from lora_trainer.ui.form import label
from tests.ui.words import ROOT, read_html, words_of_scripts

CHINESE = json.loads((ROOT / "localizations" / "zh_CN.json").read_text(encoding="utf-8"))


def test_no_two_settings_have_one_label():
    fields = [attributes["data-find"].split("\n") for _, attributes in
              read_html(train_tab.create_ui()).elements if "data-find" in attributes]  # fmt: skip
    labels = [caption for _, caption, _ in fields]
    assert len(labels) > 50 and len(labels) == len(set(labels))
    assert label("adapter") == "Network type" and "Kind" not in labels, "what is taught has that word"
    chinese = [CHINESE[caption] for caption in labels]
    assert {one for one in chinese if chinese.count(one) > 1} == set()
    assert CHINESE["Network type"] != CHINESE["Kind"]


def test_words_that_say_another_thing_elsewhere_are_not_used():
    """A training that waits is paused and resumed, as one that runs is; a picture is seen, and excluded."""
    blocks = (one.create_ui() for one in (train_tab, dataset_tab, results_tab, tools_tab))
    said = read_html(*blocks).words | words_of_scripts()
    odd = [text for text in said if re.search(r"(?i)\bvisits?\b|\bjobs?\b|\bhold\b", text)]
    assert not odd and not {"Start", "Hold"} & said
    assert not [text for text in CHINESE if re.search(r"\bjob\b", text)]


@pytest.mark.parametrize(
    ("english", "chinese", "others"),
    [
        (r"(?i)captioner", "描述工具", ("描述模型", "描述器")),
        (r"\bcore\b", "核心", ("**主体**", "标为主体")),
    ],
)
def test_one_thing_has_one_word_in_chinese(english, chinese, others):
    texts = {text: said for text, said in CHINESE.items() if re.search(english, text)}
    assert len(texts) > 4
    assert not [text for text, said in texts.items() if any(other in said for other in others)]
    assert sum(chinese in said for said in texts.values()) >= len(texts) - 2


SUMS = [
    {"epochs": 5, "repeats": 10, "batch_size": 2},
    {"epochs": 3, "repeats": 1, "batch_size": 5},
    {"epochs": 2, "repeats": 4, "batch_size": 2, "gradient_accumulation_steps": 4},
    {"epochs": 2, "repeats": 3, "batch_size": 4, "gradient_accumulation_steps": 3},
    {"epochs": 1, "repeats": 1, "batch_size": 1},
]


@pytest.mark.parametrize("settings", SUMS)
def test_the_sum_on_the_card_adds_up(page, files, settings):
    from tests.ui.person import add, estimated, text

    add(page, files)
    script = "(all) => Object.entries(all).forEach(([name, value]) => loraTrainer.form.set(name, value))"
    page.evaluate(script, settings)
    estimated(page)
    said, steps = text(page, "fact_sum"), int(text(page, "fact_steps"))
    before, _, after = said.partition(" / ")
    if after:
        batch = int(re.match(r"batch (\d+)", after)[1])
        assert math.prod(map(int, re.findall(r"\d+", before))) == steps * batch, said
        assert math.prod(map(int, re.findall(r"\d+", after[after.find("(") :]))) == batch if "(" in after else True
    else:
        per_epoch, epochs = map(int, re.search(r"= (\d+) steps an epoch × (\d+) epoch", said).groups())
        assert per_epoch * epochs == steps, said
    assert re.match(rf"12 pictures × {settings['repeats']} repeats?\b", said), said


def test_the_sum_of_folders_with_repeats_of_their_own(page, manager, files):
    from tests.jobs.fakes import make_pictures
    from tests.ui.person import estimated, text

    make_pictures(manager.folders.datasets / "sets" / "3_cat", 3)
    make_pictures(manager.folders.datasets / "sets" / "5_dog", 2)
    page.evaluate("loraTrainer.pictures.choose('sets')")
    page.evaluate("loraTrainer.form.set('epochs', 4); loraTrainer.form.set('batch_size', 1)")
    estimated(page)
    assert text(page, "fact_sum") == "5 pictures, seen 19 times an epoch = 19 steps an epoch × 4 epochs"
    assert text(page, "fact_steps") == "76"
