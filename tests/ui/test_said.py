"""What the server says in English is found again in the localization, by the page and by a report alike."""

from __future__ import annotations

import json
import re

import pytest

from lora_trainer.report.words import Words
from tests.ui.words import ROOT

CHINESE = json.loads((ROOT / "localizations" / "zh_CN.json").read_text(encoding="utf-8"))
NAMES = ("'00 a.png'", "5", "b.txt, c.txt", "UnicodeError", "my_face", "7", "8", "9", "10")



def filled(text, key):
    """The text with a name for each of its places; lines are numbers."""
    lines = re.findall(r"\b[Ll]ine \{(\d)\}", key)
    return re.sub(r"\{(\d)\}", lambda place: "3" if place[1] in lines else NAMES[int(place[1])], text)


EXAMPLES = {filled(text, text): filled(chinese, text) for text, chinese in CHINESE.items()}
COMPOSED = {
    "No caption has the trigger word 'zwx'. Set trigger_word.": "没有一条描述含有触发词 'zwx'。 请设置 trigger_word。",
    "b.png: No pictures are chosen.": "b.png：还没有选择图片。",
    "b.png: a note of a person.": "b.png: a note of a person.",
    "b.png: it is excluded in the editor\nc.png: it is no JSON object":
        "b.png：已在编辑器中排除\nc.png：它不是 JSON 对象",
    "3 captions hold [trigger], and trigger_word is empty: a.png, and 3 more. Set trigger_word.":
        "3 条描述含有 [trigger]，但 trigger_word 为空：a.png, 以及另外 3 个。 请设置 trigger_word。",
    "metadata.csv, line 3: is UTF-16. Save it as UTF-8.": "metadata.csv 第 3 行：是 UTF-16。请保存为 UTF-8。",
    "Line 3: has 3 fields instead of 2; what is too much is ignored.":
        "第 3 行：有 3 个字段，应为 2 个；多余的已忽略。",
    "lr_power: 2.0 has no effect, because only polynomial has a power.":
        "lr_power: 2.0 不起作用：只有 polynomial 有幂次。",
    "The row has 9 tokens, more than max_length (5), and is cut.":
        "此行有 9 个 token，超过 max_length（5）：已截断。",
}


@pytest.mark.parametrize("kind", ["templates", "composed"])
def test_a_report_says_it_in_chinese(kind):
    words = Words("zh_CN")
    wanted = EXAMPLES if kind == "templates" else COMPOSED
    assert {text: words.said(text) for text in wanted} == wanted


def test_the_page_says_the_same_and_is_quick(open_page):
    page = open_page(words=CHINESE)
    wanted = {**EXAMPLES, **COMPOSED}
    said, took = page.evaluate("""(texts) => {
        const begun = performance.now();
        return [texts.map(loraTrainer.said), (performance.now() - begun) / texts.length];
    }""", list(wanted))  # fmt: skip
    assert dict(zip(wanted, said)) == wanted
    print(f"{took:.2f} ms a text")
    assert took < 2  # milliseconds
