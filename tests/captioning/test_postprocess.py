"""From what a captioner says to a caption: each step of the order, the presets, the template."""

from __future__ import annotations

import pytest

from lora_trainer.captioning.base import Description, Tag
from lora_trainer.captioning.postprocess import ARTICLE_TEMPLATE, KAOMOJI, CaptionOptions, describe_parts, make_caption
from lora_trainer.captioning.presets import PRESETS
from lora_trainer.dataset.captions import escape, parse, plain_texts
from lora_trainer.errors import UserError


def tags(text: str, sentence: str = "", category: str = "general") -> Description:
    return Description(sentence, tuple(Tag(tag.strip(), 0.9, category) for tag in text.split("|") if tag.strip()))


def parts(description: Description, **options) -> list[str]:
    return describe_parts(description, CaptionOptions(**options))


@pytest.mark.parametrize(
    ("said", "options", "expected"),
    [
        ("long_hair| o_o |^_^|red__hat", {}, ["long hair", "o_o", "^_^", "red  hat"]),
        ("cat|Cat|dog", {}, ["cat", "dog"]),
        ("hat|red hat|dress|sundress", {}, ["red hat", "dress", "sundress"]),
        ("cat_ears|animal_ears", {}, ["cat ears"]),
        ("solo|looking_at_viewer|blue_sky", {"blacklist": ("solo", "looking*")}, ["blue sky"]),
        ("1girl|grey_hat", {"replacements": {"1girl": "a girl", "grey hat": ""}}, ["a girl"]),
        ("kitty|cat", {"replacements": {"kitty": "cat"}}, ["cat"]),
        ("a, b", {}, ["a b"]),
    ],
)
def test_each_step(said, options, expected):
    assert parts(tags(said), **options) == expected


def test_ratings_never_get_through_and_faces_keep_their_underscores():
    assert parts(tags("explicit", category="rating")) == []
    assert parts(tags("|".join(face for face in KAOMOJI if "|" not in face)))
    assert "|_|" in KAOMOJI and describe_parts(Description(tags=(Tag("|_|"),)), CaptionOptions()) == ["|_|"]


@pytest.mark.parametrize(
    ("kind", "said", "expected"),
    [
        ("style", "1girl|watercolor_(medium)|sketch|red hat|oil painting|anime coloring", ["1girl", "red hat"]),
        ("character", "1girl|long_hair|blue eyes|ponytail|red jacket|running", ["1girl", "red jacket", "running"]),
        ("scene", "scenery|bench|night|building|rain|from above", ["night", "rain", "from above", "bench"]),
        ("object", "product shot|table|soft light", ["table", "soft light"]),
        ("", "1girl|long_hair|sketch", ["1girl", "long hair", "sketch"]),
    ],
)
def test_presets_leave_out_what_is_to_be_learned(kind, said, expected):
    assert parts(tags(said), kind=kind) == expected
    everything = parts(tags(said), kind=kind, keep_all=True)
    assert len(everything) >= len(expected) and len(everything) == len(parts(tags(said)))


@pytest.mark.parametrize(
    ("kind", "said", "expected"),
    [
        ("style", "a watercolor painting of a cat on a roof", "a cat on a roof"),
        ("style", "there is a drawing of two dogs in anime style", "two dogs"),
        ("style", "a woman holding a painting", "a woman holding a painting"),
        ("character", "a woman with long black hair and blue eyes wearing a hat", "a woman wearing a hat"),
        ("character", "a girl with a red hat", "a girl with a red hat"),
        ("", "there is a araffe cat cat sitting on on a bench.", "a cat sitting on a bench"),
    ],
)
def test_sentences_are_tidied_and_cut(kind, said, expected):
    assert parts(Description(said), kind=kind) == [expected]


def test_a_tag_that_the_sentence_says_is_not_said_again():
    assert parts(tags("cat|red hat|roof", "a cat on a roof")) == ["a cat on a roof", "red hat"]


@pytest.mark.parametrize(
    ("said", "options", "expected"),
    [
        (Description("a cat"), {"template": ARTICLE_TEMPLATE}, "**a cat**, high quality, detailed"),
        (tags("cat|dog"), {"template": ARTICLE_TEMPLATE}, "**cat**, **dog**, high quality, detailed"),
        (tags("cat|dog"), {"template": "*{caption}*, x", "trigger_word": "sks"}, "sks, *cat*, *dog*, x"),
        (Description("a cat"), {"template": "photo of sks, {caption}", "trigger_word": "SKS"}, "photo of sks, a cat"),
        (tags("sks|cat"), {"trigger_word": "sks"}, "sks, cat"),
        (tags("a|b|c|d"), {"max_parts": 2, "trigger_word": "t"}, "t, a, b"),
        (Description(), {"trigger_word": "sks"}, "sks"),
        (Description(), {}, ""),
        (tags("miku_(vocaloid)|*star*|a|||b"), {}, r"miku \(vocaloid\), \*star\*, a, b"),
    ],
)
def test_the_caption_that_is_written(said, options, expected):
    caption = make_caption(said, CaptionOptions(**options), escape)
    assert caption == expected
    assert not parse(caption).warnings


def test_what_a_captioner_says_is_text_and_no_syntax():
    said = tags(r"(((a)))|[b]|{c}|**d**|e\f|g:1.2|>_<|:(")
    caption = make_caption(said, CaptionOptions(), escape)
    assert plain_texts(parse(caption)) == ["(((a)))", "[b]", "{c}", "**d**", r"e\f", "g:1.2", ">_<", ":("]


def test_bad_options_are_refused():
    with pytest.raises(UserError, match=r"no \{caption\}"):
        CaptionOptions(template="high quality").check()
    with pytest.raises(UserError, match="no kind 'portrait'"):
        CaptionOptions(kind="portrait").check()
    with pytest.raises(UserError):
        CaptionOptions(max_parts=0).check()
    for kind in PRESETS:
        CaptionOptions(kind=kind).check()
