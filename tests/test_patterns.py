"""No expression that a person types keeps the program busy for longer than it may."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress

import pytest

from lora_trainer.adapters.selection import select_targets
from lora_trainer.config import from_mapping
from lora_trainer.dataset.edits import Edit
from lora_trainer.dataset.listing import list_folder
from lora_trainer.errors import UserError
from lora_trainer.patterns import SECONDS, Pattern
from tests.adapters.layers import unet_targets

EIGHT = "(.*), (.*), (.*), (.*), (.*), (.*), (.*), (.*) photo"
SLOW, LONG = "(a|aa)+[!?]", "a" * 80
TAGS = ", ".join(f"tag number {index}" for index in range(50))


@pytest.mark.parametrize("text", [TAGS, f"{TAGS} photo x", f"a photo, {TAGS}", ", " * 300 + "photo"])
@pytest.mark.parametrize("pattern", [EIGHT, f"{EIGHT}$", "(?:a|a)*b|" + EIGHT, ".*.*.*.*.*.*.*.*,photo"])
def test_an_edit_ends_whatever_its_pattern_is(pattern, text):
    change = Edit("regex", pattern=pattern, value="x").function()
    begun = time.monotonic()
    with suppress(UserError):
        for _ in range(30):  # captions: the time is that of all of them
            change(text)
    assert time.monotonic() - begun < SECONDS + 3


def test_a_search_without_an_end_is_said_to_be_one():
    change = Edit("regex", pattern=SLOW, value="x").function()
    with pytest.raises(UserError, match="searches for too long") as caught:
        change(LONG)
    assert caught.value.field == "pattern"


def test_other_threads_go_on_meanwhile():
    def search():
        with pytest.raises(UserError):
            Pattern(SLOW).search(LONG)

    searching = threading.Thread(target=search)
    searching.start()
    turns = 0
    while searching.is_alive():
        time.sleep(0.01)
        turns += 1
    assert turns > 20


def test_layers_are_chosen_within_the_time():
    config = from_mapping({"target_modules": ["/(.*)*(.*)*(.*)*(.*)*(.*)*x$/"]})
    begun = time.monotonic()
    with pytest.raises(UserError):
        select_targets(unet_targets(), config.target_modules)
    assert time.monotonic() - begun < SECONDS + 3


@pytest.mark.parametrize(
    ("pattern", "value", "text"),
    [
        (r"(\w+), (\w+)", r"\2, \1", "red, blue"),
        (r"(?P<first>\w+) disc", r"\g<first> ring", "red disc"),
        (r"\bdisc\b", "", "a disc, discs"),
        (r"[^,]+$", "end", "a, b, c"),
        (r"圆|盘", "disc", "圆 盘"),
        (r"(?i)RED", "blue", "Red red"),
        (r"a(?!b)", "x", "ab ac"),
    ],
)
def test_expressions_mean_what_they_mean_to_python(pattern, value, text):
    assert Pattern(pattern).sub(value, text) == re.sub(pattern, value, text)


@pytest.mark.parametrize("pattern", ["(", "[a", "*"])
def test_what_is_no_expression_is_refused(pattern):
    with pytest.raises(UserError, match="no regular expression"):
        Pattern(pattern)


def test_a_whole_disk_is_no_folder_of_pictures(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="whole disk"):
        list_folder("/")
    monkeypatch.setattr("lora_trainer.dataset.listing._MAX_ENTRIES", 3)
    for name in "abcd":
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="more than 3 files"):
        list_folder(tmp_path)
