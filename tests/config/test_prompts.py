"""Preview prompts with kohya's flags: nothing of them reaches the model as words."""

from __future__ import annotations

import pytest

from lora_trainer.config import PreviewPrompt, from_mapping, parse_prompt, with_trigger, without_effect
from lora_trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a red disc, on blue", PreviewPrompt("a red disc, on blue")),
        ("a disc --w 128 --h 192 --n blurry, low quality",
         PreviewPrompt("a disc", "blurry, low quality", width=128, height=192)),
        ("a disc --n ugly --d 7 --s 12 --l 4.5", PreviewPrompt("a disc", "ugly", steps=12, seed=7, cfg=4.5)),
        ("a disc --ss euler_a --g 3.5 --cn x.png", PreviewPrompt("a disc", ignored=("ss", "g", "cn"))),
        ("a --w=128 --d -1", PreviewPrompt("a", width=128, ignored=("d -1",))),
        ("a,--cfg 3 --seed 5 --steps 9", PreviewPrompt("a,", steps=9, seed=5, cfg=3)),
        ("a --n2 blurry --ctrl_img /x.png --network_multiplier 0.5",
         PreviewPrompt("a", ignored=("n2", "ctrl_img", "network_multiplier"))),
        ("girl (--very-happy) <lora:a --x:1> <lora:b --w:1>,--w 64",
         PreviewPrompt("girl (--very-happy) <lora:a --x:1> <lora:b --w:1>,", width=64)),
        ("a disc.--w 64", PreviewPrompt("a disc.", width=64)),
        ("a well-known disc -- in the rain", PreviewPrompt("a well-known disc -- in the rain")),
        ("a disc --W 64 --H 64", PreviewPrompt("a disc", width=64, height=64)),
        ("--n ugly", PreviewPrompt("", "ugly")),
        ("", PreviewPrompt("")),
    ],
)  # fmt: skip
def test_flags_of_a_prompt(line, expected):
    assert parse_prompt(line) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [("a --w wide", "--w wide is no number"), ("a --w 9", "from 64"), ("a --foo 1", "--foo"),
     ("a --foo_2=1", "--foo_2"), ("a --no-such x", "--no-such"), ("a --s", "--s")],
)
def test_a_wrong_flag_is_an_error_of_the_prompts(line, message):
    with pytest.raises(ConfigError, match=message) as caught:
        from_mapping({"preview_prompts": [line]})
    assert caught.value.problems[0].field == "preview_prompts"


def test_flags_without_a_meaning_here_are_said():
    (said,) = without_effect(from_mapping({"preview_prompts": ["a --ss euler", "b --ss euler"]}))
    assert said == "preview_prompts: --ss has no effect (the sampler is always the same)."


def test_the_trigger_word_in_prompts():
    assert with_trigger("[trigger] and [Name], red", "zwx") == "zwx and zwx, red"
    assert with_trigger("[trigger], red", "") == "[trigger], red"
