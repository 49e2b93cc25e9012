from __future__ import annotations

import gzip

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.errors import UserError
from lora_trainer.models import tokenizer as tokenizer_module
from lora_trainer.models.prompts import CHUNK, Chunk, chunks_of, parse_weights, token_ids, token_weights, weigh
from lora_trainer.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_ids_are_clips(tokenizer):
    assert (tokenizer.bos, tokenizer.eos, tokenizer.comma) == (49406, 49407, 267)
    assert tokenizer.ids("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert tokenizer.ids("A Photo  of\na CAT") == [320, 1125, 539, 320, 2368]
    assert tokenizer.ids("") == []
    assert len(tokenizer.ids("a dog " * 200)) == 400  # never cut


def test_the_vocabulary_is_built_from_open_clips_file(monkeypatch, tokenizer):
    tokenizer_module._installed_tokenizer.cache_clear()
    monkeypatch.setattr(tokenizer_module, "_cached_folder", lambda: None)
    rebuilt = load_tokenizer()
    text = "Ein Bär, 東京 naïve 🐻 it's 2024!?"
    assert rebuilt.ids(text) == tokenizer.ids(text)
    tokenizer_module._installed_tokenizer.cache_clear()


def test_a_given_folder_comes_first(monkeypatch, tmp_path, tokenizer):
    tokenizer_module._unpack(tokenizer_module._open_clip_vocabulary(), tmp_path)
    monkeypatch.setattr(tokenizer_module, "_installed_tokenizer", lambda: pytest.fail("looked elsewhere"))
    assert load_tokenizer([tmp_path / "missing", tmp_path]).ids("a cat") == tokenizer.ids("a cat")


def test_without_a_vocabulary_it_says_what_to_install(monkeypatch):
    tokenizer_module._installed_tokenizer.cache_clear()
    monkeypatch.setattr(tokenizer_module, "_cached_folder", lambda: None)
    monkeypatch.setattr(tokenizer_module, "_open_clip_vocabulary", lambda: None)
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        load_tokenizer()


def test_a_damaged_tokenizer_folder_is_named(tmp_path):
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_tokenizer([tmp_path]).ids("a cat")
    assert str(tmp_path) in str(caught.value)


def test_a_short_caption_is_one_padded_chunk(tokenizer):
    chunks = chunks_of("a cat", tokenizer, 225)
    ids = token_ids(chunks, tokenizer, pad=0)
    assert ids.shape == (1, 77)
    assert ids[0, :5].tolist() == [49406, 320, 2368, 49407, 0]
    assert token_ids(chunks, tokenizer, pad=49407)[0, 4:].unique().tolist() == [49407]
    assert chunks_of("", tokenizer, 225) == [Chunk()]


def test_a_long_caption_breaks_at_a_comma_near_the_end_of_the_chunk(tokenizer):
    before, after = "cat " * 60, "dog " * 30
    first, second = chunks_of(f"{before}, {after}", tokenizer, 225)
    assert len(first.tokens) == 61 and first.tokens[-1] == tokenizer.comma
    assert len(second.tokens) == 30 and len(set(second.tokens)) == 1
    first, second = chunks_of(f"{'cat ' * 40}, {'dog ' * 50}", tokenizer, 225)  # the comma is too far away
    assert (len(first.tokens), len(second.tokens)) == (75, 16)
    first, second = chunks_of("cat " * 75 + ",", tokenizer, 225)
    assert (len(first.tokens), second.tokens) == (75, (tokenizer.comma,))


@given(
    words=st.lists(st.sampled_from(["cat", "dog", ",", "a red hat"]), max_size=250),
    limit=st.sampled_from([75, 150, 225]),
)
def test_chunks_keep_every_token_in_order_up_to_the_limit(tokenizer, words, limit):
    caption = " ".join(words)
    chunks = chunks_of(caption, tokenizer, limit)
    tokens = [token for chunk in chunks for token in chunk.tokens]
    assert 1 <= len(chunks) <= limit // CHUNK
    assert all(len(chunk.tokens) <= CHUNK and len(chunk.weights) == len(chunk.tokens) for chunk in chunks)
    everything = tokenizer.ids(caption)
    assert tokens == everything[: len(tokens)]
    if len(everything) <= CHUNK:
        assert tokens == everything


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(one)(two)", [("onetwo", 1.1)]),
        ("[less] (red hat:1.2)", [("less", 1 / 1.1), (" ", 1.0), ("red hat", 1.2)]),
        ("a (((house:1.3)) hill", [("a ", 1.0), ("house", 1.3 * 1.1 * 1.1), (" hill", 1.1)]),
        ("smile :) (x: 0.5 )", [("smile :) ", 1.0), ("x", 0.5)]),
        ("", [("", 1.0)]),
    ],
)
def test_emphasis(prompt, expected):
    ours = parse_weights(prompt)
    assert [text for text, _ in ours] == [text for text, _ in expected]
    assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in expected])


@given(st.text(alphabet="ab()[]\\:1.2 ,", max_size=60))
def test_emphasis_reads_anything(prompt):
    assert all(isinstance(text, str) and weight > 0 for text, weight in parse_weights(prompt))


def test_weights_reach_their_tokens_and_keep_the_mean(tokenizer):
    chunks = chunks_of("a (red hat:1.5) cat", tokenizer, 75, weighted=True)
    weights = token_weights(chunks)
    assert weights.shape == (1, 77)
    assert weights[0, :7].tolist() == [1.0, 1.0, 1.5, 1.5, 1.0, 1.0, 1.0]
    hidden = torch.rand(1, 77, 8) + 1
    weighted = weigh(hidden, weights)
    torch.testing.assert_close(weighted.mean(), hidden.mean())
    ratio = weighted / hidden
    torch.testing.assert_close(ratio[0, 2] / ratio[0, 1], torch.full((8,), 1.5))
    assert weigh(hidden, torch.ones(1, 77)) is hidden
