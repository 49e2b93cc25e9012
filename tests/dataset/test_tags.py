"""What the captions say together, on sets small enough to count by hand."""

from __future__ import annotations

import random
import time

import pytest

from lora_trainer.dataset.captions import parse
from lora_trainer.dataset.tags import (
    CoreGap,
    NearSynonym,
    Suggestion,
    core_gaps,
    near_synonyms,
    suggestions,
    tag_frequency,
    tag_table,
    universal_tags,
)


def captions(*texts: str, folder: str = "") -> dict:
    return {f"{folder}{index}.png": parse(text) for index, text in enumerate(texts)}


def test_frequencies_are_counted_by_folder_and_once_per_picture():
    data = {
        **captions("**cat**, grass, grass", "Cat, *calm*", folder="10_cat/"),
        **captions("dog", folder="more/5_dog/"),
        **captions("sky"),
    }
    assert tag_frequency(data.items(), "data") == {
        "10_cat": {"cat": 2, "calm": 1, "grass": 1},
        "5_dog": {"dog": 1},
        "data": {"sky": 1},
    }


def test_the_table_knows_shares_marks_and_cloud_weights():
    table = {tag.text: tag for tag in tag_table(captions("**cat**, grass", "cat, *grass*", "cat", "cat, (sun:1.2)"))}
    assert (table["cat"].count, table["cat"].share, table["cat"].weight) == (4, 1.0, 1.0)
    assert (table["cat"].core, table["cat"].mood) == (True, False)
    assert (table["grass"].share, table["grass"].weight, table["grass"].mood) == (0.5, 0.5, True)
    assert table["sun"].weight == 0
    assert tag_table({}) == []


def test_a_suggestion_needs_confidence_support_and_lift():
    # umbrella stands with rain in 3 of 4 pictures (0.75) and in 3 of 8 anywhere: lift 2.
    data = captions("rain, umbrella", "rain, umbrella", "umbrella, rain", "rain", "sun", "sun", "sun", "sun")
    assert suggestions(data) == [Suggestion("3.png", "umbrella", "rain", 0.75, 3, 2.0)]
    assert suggestions(captions("rain, umbrella", "rain, umbrella", "rain", "sun", "sun")) == []  # support 2
    everywhere = captions(*["rain, umbrella"] * 3, "rain", *["umbrella"] * 4)  # lift 0.86
    assert suggestions(everywhere) == []


def test_near_synonyms():
    data = captions(
        "long hair, blue eyes, cinematic lighting, 1girl, red hat, male focus, house",
        "long hair, blue eye, cinematc lighting, 2girls, bed hat, female focus, horse",
        "long_hair, long-hair, lights on",
    )
    assert set(near_synonyms(data)) == {
        NearSynonym("long hair", "long_hair", "spacing"),
        NearSynonym("long hair", "long-hair", "spacing"),
        NearSynonym("blue eye", "blue eyes", "plural"),
        NearSynonym("cinematc lighting", "cinematic lighting", "spelling"),
    }


def test_sentences_are_not_compared():
    assert near_synonyms(captions("a big red star on a pink floor", "a big red stars on a pink floor")) == []


def test_core_gaps():
    data = captions(*["**cat**, grass"] * 18, "a cat", "dog")
    assert core_gaps(data) == []  # 19 of 20 mention it, marked or not
    data = captions(*["**cat**, grass"] * 8, "concatenate", "dog")
    assert core_gaps(data) == [CoreGap("cat", pytest.approx(0.8), ("8.png", "9.png"))]
    assert core_gaps(captions("**one subject**", "**another subject**", "**a third**")) == []


def test_universal_tags_are_neither_core_nor_trigger():
    data = captions("sks, **cat**, white wall, a", "SKS, **cat**, White wall, b")
    assert universal_tags(data, "sks") == ["white wall"]
    assert universal_tags(captions("alone")) == []


def test_many_captions_are_quick():
    rng = random.Random(0)
    words = [f"tag {index}" for index in range(1500)]
    data = captions(*(", ".join(["**cat**", *rng.sample(words, 30)]) for _ in range(500)))
    start = time.perf_counter()
    tag_table(data), suggestions(data), near_synonyms(data), core_gaps(data), universal_tags(data)
    assert time.perf_counter() - start < 20  # about 1 s; a slip into comparing all with all takes minutes
