"""Captions without what is learned."""

from __future__ import annotations

import pytest

from lora_trainer.dataset.captions import parse
from lora_trainer.dataset.unnamed import MOST, WORDS, unnamed, unnamed_captions


@pytest.mark.parametrize(
    ("caption", "trigger", "without", "exchanged"),
    [
        ("a big orange **star** on a pink background", "", "a big orange on a pink background",
         "a big orange dog on a pink background"),
        ("**zwx**, red hair, *calm*", "zwx", "red hair, calm", "dog, red hair, calm"),
        ("a photo of zwx on the beach", "zwx", "a photo of on the beach", "a photo of dog on the beach"),
        ("zwx dog, a park", "zwx", "dog, a park", "cat dog, a park"),
        ("red hair, a hat", "zwx", "red hair, a hat", "red hair, a hat"),
        ("**one** and **two** (things)", "", "and (things)", "dog and dog (things)"),
        ("**all of it**", "", "", "dog"),
        ("zwx", "zwx", "", "dog"),
        ("a red car", "", "", ""),
        ("", "zwx", "", ""),
    ],
)  # fmt: skip
def test_core_and_trigger_word_are_left_out_or_exchanged(caption, trigger, without, exchanged):
    assert unnamed(parse(caption), trigger) == without
    word = "cat" if exchanged.startswith("cat") else "dog"
    assert unnamed(parse(caption), trigger, word) == exchanged


def test_the_pool_is_limited_and_a_function_of_the_seed():
    captions = [parse(f"a **star** number {number}") for number in range(500)]
    found = unnamed_captions(captions, "", 1)
    assert found[0] == "" and MOST - 5 < len(found) == len(set(found)) <= MOST + 1
    assert (
        not any("star" in text for text in found) and sum(any(w in text.split() for w in WORDS) for text in found) > 40
    )
    assert unnamed_captions(captions, "", 1) == found != unnamed_captions(captions, "", 2)
    assert unnamed_captions([parse("a red car")], "", 1) == [""]
