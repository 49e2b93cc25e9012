"""Structured captions: the grammar to the letter, nothing a person typed is lost, and what the tokenizer reads."""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_trainer.dataset.captions import (
    Span,
    compose,
    core_items,
    core_texts,
    escape,
    format,
    load_mapping,
    make_item,
    mentions,
    mood_items,
    parse,
    plain_text,
    plain_texts,
    prompt_text,
    train_text,
    translate,
    without_word,
)
from lora_trainer.errors import UserError

FRAGMENTS = [
    "*", "**", "***", "****", "\\", "\\*", "\\,", "\\(", "\\)", "(", ")", "[", "]", "{", "}", "|", "|||",
    ",", "，", "、", "\n", "\r", " ", "\u3000", ":", ":1.2)", ":)", ":(", "^_^", "a", "red star", "1girl", "星空", "。",
    "_", "#", "`", "BREAK", "AND", "<lora:x:0.8>", "[a:b:0.5]", "é", "e\u0301", "😀",
]  # fmt: skip
QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
sources = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)
plain = st.text(st.sampled_from("ab *,\\()[]{}|:，\n星。_"), max_size=8)
pieces = st.lists(st.tuples(plain, st.booleans(), st.booleans()), min_size=1, max_size=4)
composed = st.builds(
    lambda items, cuts: compose(items, sorted(min(cut, len(items)) for cut in cuts)),
    st.lists(pieces.map(lambda parts: make_item(*parts)), max_size=5),
    st.lists(st.integers(0, 5), max_size=2),
)


@settings(QUICK, max_examples=1500)
@given(sources)
def test_reading_what_was_written_gives_the_same_caption(source):
    caption = parse(source)
    assert parse(format(caption)) == caption


@settings(QUICK, max_examples=500)
@given(composed)
def test_writing_what_was_composed_gives_the_same_caption(caption):
    assert parse(format(caption)) == caption


def test_ten_thousand_generated_captions_are_read_back_as_they_are():
    rng = random.Random(5)  # as above without Hypothesis, which takes ten times as long and shrinks what it finds
    for _ in range(10_000):
        caption = parse("".join(rng.choices(FRAGMENTS, k=rng.randrange(20))))
        assert parse(format(caption)) == caption, format(caption)


@settings(QUICK, max_examples=500)
@given(st.text(max_size=40))
def test_any_text_can_be_parsed_and_rendered(source):
    caption = parse(source, wildcards=True)
    assert parse(format(caption)) == caption
    for weighted in (False, True):
        train_text(caption, weighted=weighted, shuffle=True, tag_dropout=0.5, rng=random.Random(0))
    prompt_text(caption)


@settings(QUICK, max_examples=500)
@given(pieces)
def test_an_item_made_of_plain_texts_has_exactly_their_text_and_emphasis(parts):
    item = make_item(*parts)
    expected = "".join(text for text, _, _ in parts)
    for separator in "，、\n":
        expected = expected.replace(separator, ",")
    assert plain_text(item) == " ".join(expected.split())
    assert item.is_core == any(core and text.strip() for text, core, _ in parts)
    assert item.is_mood == any(mood and text.strip() for text, _, mood in parts)


@settings(QUICK, max_examples=500)
@given(sources)
def test_formatting_changes_nothing_but_separators_and_outer_white_space(source):
    def essence(text: str) -> str:
        return "".join(character for character in text if character not in ",，、" and not character.isspace())

    # A backslash that stood alone before a separator is doubled, or it would escape the comma that is written there.
    assert essence(format(parse(source))).replace("\\", "") == essence(source).replace("\\", "")


def spans(source: str) -> list[tuple[str, bool, bool]]:
    (item,) = parse(source).items
    return [(span.text, span.core, span.mood) for span in item.spans]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("plain", [("plain", False, False)]),
        ("**x**", [("x", True, False)]),
        ("*x*", [("x", False, True)]),
        ("***x***", [("x", True, True)]),
        ("a red **star** on navy", [("a red ", False, False), ("star", True, False), (" on navy", False, False)]),
        ("中文**主体**", [("中文", False, False), ("主体", True, False)]),
        ("**a***b*", [("a", True, False), ("b", False, True)]),
        ("**a *b* c**", [("a ", True, False), ("b", True, True), (" c", True, False)]),
        ("2 * 3 *x*", [("2 * 3 ", False, False), ("x", False, True)]),
        (r"\*x\*", [(r"\*x\*", False, False)]),
        ("snake_case #tag `code`", [("snake_case #tag `code`", False, False)]),
        ("a。b", [("a。b", False, False)]),
    ],
)
def test_spans(source, expected):
    assert spans(source) == expected
    assert not [text for text in parse(source).warnings if "Chinese" not in text]


@pytest.mark.parametrize(
    ("source", "warning"),
    [
        ("****x****", "four or more"),
        ("**open", "never closed"),
        ("***x**", "never closed"),
        ("a *b", "never closed"),
        ("** **", "is empty"),
        ("*_*", "no letters"),
        ("a ||| b ||| c ||| d", "twice"),
        ("cat AND dog", "AND"),
        ("a BREAK b", "BREAK"),
        ("<lora:x:0.8> a", "<lora:x:0.8>"),
        ("[a:b:0.5] c", "[a:b:0.5]"),
        ("一只猫", "Chinese"),
    ],
)
def test_warnings(source, warning):
    assert any(warning in text for text in parse(source).warnings)


@pytest.mark.parametrize("source", ["****x****", "**open", "***x**", "a *b", "**a, b**"])
def test_what_is_never_closed_is_text(source):
    assert not any(item.is_core or item.is_mood for item in parse(source).items)
    assert format(parse(source)) == source


def test_separators_and_shields():
    assert plain_texts(parse("a, b，c、d\ne,, ,")) == ["a", "b", "c", "d", "e"]
    assert len(parse("(a, b:1.2), [c, d], {e, f|g}, h (i").items) == 4
    assert len(parse(r"1\,000 lights").items) == 1
    assert plain_texts(parse("cat :(, dog, happy :)")) == ["cat :(", "dog", "happy :)"]


def test_parsing_pathological_text_is_quick():
    brackets = ("(" * 50_000, "[(" * 20_000 + ")]" * 20_000, "[a|" * 20_000)
    for source in (*brackets, "*a" * 20_000, "\\" * 99_999, "|" * 50_000):
        assert parse(format(parse(source))) == parse(source)


# What a person would leave of prompts as they are shared: weights, brackets, networks, escapes, faces, Chinese.
REAL_PROMPTS = [
    (
        "masterpiece, best quality, ((1girl)), (long hair:1.2), [blurry background], blue eyes, <lora:add_detail:0.8>",
        "masterpiece, best quality, 1girl, long hair, blurry background, blue eyes",
    ),
    (
        r"hatsune miku \(vocaloid\), saber \(fate\/stay night\), twintails",
        r"hatsune miku (vocaloid), saber (fate\/stay night), twintails",
    ),
    ("hatsune miku (vocaloid), twintails", "hatsune miku (vocaloid), twintails"),
    ("(photorealistic:1.4), (skin texture, grain:0.9), RAW photo", "photorealistic, skin texture, grain, RAW photo"),
    ("1girl, ^_^, :), >_<, ;), \\(^o^)/, o_o, (o)_(o), +_+", "1girl, ^_^, :), >_<, ;), (^o^)/, o_o, (o)_(o), +_+"),
    ("杰作，最佳画质、**一个女孩**\n长发，(微笑:1.1)", "杰作, 最佳画质, 一个女孩, 长发, 微笑"),
    ("a cat\nsitting on a sofa,\n\nsoft light", "a cat, sitting on a sofa, soft light"),
    ("city at night BREAK neon signs, rain", "city at night, neon signs, rain"),
    ("a photo of a cat AND a photo of a dog", "a photo of a cat AND a photo of a dog"),
    ("{masterpiece}, {{best quality}}, [[lowres]]", "masterpiece, best quality, lowres"),
    ("((((ultra detailed)))), (((best shadow)))", "ultra detailed, best shadow"),
    ("(masterpiece, (best quality:1.2), ultra-detailed:1.1), 8k", "masterpiece, best quality, ultra-detailed, 8k"),
    ("a portrait, f/1.8, 85mm, 16:9, 50% grey, $5 & more", "a portrait, f/1.8, 85mm, 16:9, 50% grey, $5 & more"),
    ("[cat|dog] in a field, [red:blue:0.4] hat", "[cat|dog] in a field, [red:blue:0.4] hat"),
    ("__animal__ in {the forest|the city}", "__animal__ in {the forest|the city}"),
    ("score_9, score_8_up, source_anime, 1boy", "score_9, score_8_up, source_anime, 1boy"),
    ("wearing (a hat", "wearing (a hat"),
    ("ends with a comma, ", "ends with a comma"),
    ("**cyberpunk city**, neon signs, *cinematic lighting*", "cyberpunk city, neon signs, cinematic lighting"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "expected"), REAL_PROMPTS)
def test_real_prompts_survive(source, expected):
    caption = parse(source)
    assert ", ".join(plain_texts(caption)) == expected
    assert format(parse(format(caption))) == format(caption)
    written = format(caption).replace(",", " ").split()
    assert written == source.replace("，", " ").replace("、", " ").replace(",", " ").split()


def test_the_prompt_is_escaped_for_the_webui():
    assert prompt_text(parse(r"**miku \(vocaloid\)**, (hat:1.2), [a:b:0.5], :), ((x)), <lora:n:1>")) == (
        r"miku \(vocaloid\), (hat:1.2), [a:b:0.5], :\), ((x)), <lora:n:1>"
    )
    assert prompt_text(parse("miku (vocaloid), *mood*, a BREAK b")) == r"miku \(vocaloid\), mood, a BREAK b"


def test_weighted_training_text_keeps_weights_and_escapes_what_is_no_weight():
    caption = parse(r"(**red hat**:1.3), miku (vocaloid), ((x)), <lora:n:1>, a\\b")
    assert train_text(caption, weighted=True) == r"(red hat:1.3), miku \(vocaloid\), ((x)), a\\b"
    assert train_text(caption) == r"red hat, miku (vocaloid), x, a\b"


def test_core_and_mood_are_read_off_the_marks():
    caption = parse("a red **star** on navy, *calm*, (**moon**:1.2) over **the *dark* sea**, ***x***")
    assert core_texts(caption) == ("star", "moon", "the dark sea", "x")
    assert [plain_text(item) for item in core_items(caption)] == ["a red star on navy", "moon over the dark sea", "x"]
    assert [plain_text(item) for item in mood_items(caption)] == ["calm", "moon over the dark sea", "x"]


def test_core_items_come_first_even_when_nothing_is_shuffled():
    caption = parse("sky, **cat**, grass, a **red** hat")
    assert train_text(caption) == "cat, a red hat, sky, grass"
    assert train_text(caption, keep_tokens=1) == "sky, cat, a red hat, grass"


def test_kept_items_are_neither_shuffled_nor_dropped():
    caption = parse("sks dog, a, **core**, b, c, d, e")
    seen = set()
    for seed in range(200):
        text = train_text(caption, keep_tokens=1, shuffle=True, tag_dropout=0.5, rng=random.Random(seed))
        assert text.startswith("sks dog, core")
        seen.add(text)
    assert len(seen) > 50
    assert train_text(caption, shuffle=True, tag_dropout=1.0, rng=random.Random(0)) == "core"


def test_the_separator_wins_over_bold_and_keep_tokens():
    caption = parse("a, b ||| **c**, d, e, f ||| g")
    for seed in range(50):
        text = train_text(caption, keep_tokens=4, shuffle=True, tag_dropout=0.3, rng=random.Random(seed))
        assert text.startswith("a, b") and text.endswith("g")
    assert train_text(caption, tag_dropout=1.0, rng=random.Random(0)) == "a, b, g"
    assert train_text(caption) == "a, b, c, d, e, f, g"
    assert train_text(parse("||| a, b"), tag_dropout=1.0, rng=random.Random(0)) == ""
    assert train_text(parse("a, b |||"), tag_dropout=1.0, rng=random.Random(0)) == "a, b"


def test_mood_items_are_dropped_twice_as_often():
    caption = parse("**core**, plain, *mood*")
    rng = random.Random(1)
    texts = [train_text(caption, tag_dropout=0.25, rng=rng).split(", ") for _ in range(4000)]
    assert sum("plain" not in text for text in texts) / 4000 == pytest.approx(0.25, abs=0.03)
    assert sum("mood" not in text for text in texts) / 4000 == pytest.approx(0.5, abs=0.03)
    assert all("core" in text for text in texts)


@pytest.mark.parametrize(
    ("source", "trigger", "expected"),
    [
        ("a cat, grass", "sks", "sks, a cat, grass"),
        ("a SKS cat, grass", "sks", "a SKS cat, grass"),
        ("risks, grass", "sks", "sks, risks, grass"),
        ("sks_v2, grass", "sks", "sks, sks_v2, grass"),
        ("一只小明猫", "小明", "一只小明猫"),
        ("**a**, b", "my (word)", "my (word), a, b"),
        ("", "sks", "sks"),
    ],
)
def test_the_trigger_word_is_put_first_where_it_is_missing(source, trigger, expected):
    assert train_text(parse(source), trigger_word=trigger) == expected
    assert mentions(parse(expected), trigger)


def test_the_trigger_word_is_never_dropped_and_leads_when_shuffled():
    caption = parse("a, b, c, SKS dog")
    for seed in range(20):
        text = train_text(caption, trigger_word="sks", tag_dropout=0.9, shuffle=True, rng=random.Random(seed))
        assert text.startswith("SKS dog")


def test_the_training_text_depends_on_the_generator_alone():
    caption = parse("a, b, c, d, e, f, *g*")
    draw = [train_text(caption, shuffle=True, tag_dropout=0.3, rng=random.Random(7)) for _ in range(2)]
    assert draw[0] == draw[1]
    assert train_text(caption, shuffle=True, tag_dropout=0.3) == "a, b, c, d, e, f, g"


def test_the_training_text_is_nfc():
    assert train_text(parse("cafe\u0301")) == unicodedata.normalize("NFC", "cafe\u0301") == "café"


def test_wildcards_are_drawn_when_enabled_and_text_otherwise():
    source = "a {red|blue, {big|small}} hat"
    assert train_text(parse(source)) == source
    drawn = {train_text(parse(source, wildcards=True), rng=random.Random(seed)) for seed in range(40)}
    assert drawn == {"a red hat", "a blue, big hat", "a blue, small hat"}
    assert train_text(parse(source, wildcards=True)) == "a red hat"


def test_items_can_be_moved_without_pairing_brackets_across_them():
    items = parse("b ), a (").items
    moved = compose(reversed(items))
    assert plain_texts(moved) == ["a (", "b )"]
    assert parse(format(moved)) == moved
    assert escape("a, (b)*") == r"a\, \(b\)\*"
    assert compose([make_item("star", core=True)]).items[0].spans == (Span("star", core=True),)


MAPPING = {"赛博朋克": "cyberpunk", "城市": "city", "夜晚": "night (dark)", "霓虹": "neon, lights", "猫": "cat"}
MAPPING["grey"] = "gray"


def test_translation_keeps_marks_weights_and_words_apart():
    caption = translate(parse("**赛博朋克城市**，夜晚、(霓虹:1.2), *猫耳*, GREY wall, greyhound"), MAPPING)
    assert format(caption) == r"**cyberpunk city**, night \(dark\), (neon\, lights:1.2), *cat 耳*, gray wall, greyhound"
    assert train_text(caption) == "cyberpunk city, night (dark), neon, lights, cat 耳, gray wall, greyhound"
    assert translate(caption, {}) is caption
    assert not any("Chinese" in text for text in translate(parse("猫"), MAPPING).warnings)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.yaml", "赛博朋克: cyberpunk\n年份: 1990\n否: no\n"),
        ("m.csv", "\ufeff赛博朋克,cyberpunk\n年份,1990\n\n否,no\n"),
        ("m.tsv", "赛博朋克\tcyberpunk\n年份\t1990\n否\tno\n"),
    ],
)
def test_mapping_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert load_mapping(path) == {"赛博朋克": "cyberpunk", "年份": "1990", "否": "no"}


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("m.yaml", b"- a\n- b\n", "pairs"),
        ("m.yaml", b"a: [1\n", "not YAML"),
        ("m.yaml", b"a: {b: c}\n", "'a'"),
        ("m.csv", b"a,b\nlonely\n", "line 2"),
        ("m.csv", "赛博,cyber".encode("gbk"), "UTF-8"),
        ("m.txt", b"a: b", "neither"),
        (None, b"", "does not exist"),
    ],
)
def test_bad_mapping_files_are_named(tmp_path, name, data, words):
    path = tmp_path / (name or "missing.yaml")
    if name:
        path.write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        load_mapping(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("zwx, a red hat", "a red hat"),
        ("**ZWX**, a hat, *calm*", "a hat, *calm*"),
        ("a photo of zwx in a zwxy", "a photo of in a zwxy"),
        ("zwx", ""),
        ("ein zwx,一个zwx的人", "ein, 一个的人"),
    ],
)
def test_a_word_is_taken_out_of_a_caption(text, bare):
    assert without_word(text, "zwx") == bare
