"""Settings to begin with, adapted to the pictures and the memory."""

from __future__ import annotations

import pytest

from lora_trainer.config.facts import CHANGES
from lora_trainer.errors import UserError
from lora_trainer.planning.presets import PRESETS, preset


def test_presets_are_the_articles_and_adapt(tmp_path):
    assert {kind for kind, one in PRESETS.items() if one.task in ("image", "text")} == {
        "style", "character", "scene", "object", "text",
    }  # fmt: skip
    style, character, scene = preset("style"), preset("character"), preset("scene")
    assert (style["lora_rank"], style["alpha"], style["epochs"], style["batch_size"]) == (8, 16, 10, 4)
    assert (character["lora_rank"], character["alpha"], character["epochs"]) == (12, 24, 12)
    assert (scene["lora_rank"], scene["epochs"], scene["gradient_accumulation_steps"]) == (16, 15, 2)
    few, many = preset("style", 12), preset("style", 200)
    assert few["dropout"] == 0.1 and few["repeats"] == 8 and "dropout" not in many and many["repeats"] == 1
    large = preset("scene", 20, "sdxl")
    assert (large["batch_size"], large["gradient_accumulation_steps"], large["gradient_checkpointing"]) == (1, 8, True)
    roomy, little, tight = (preset("character", 20, "sd1", free << 30) for free in (16, 6, 2))
    assert roomy == preset("character", 20, "sd1")
    assert (little["batch_size"], little["gradient_accumulation_steps"], little["lora_rank"]) == (1, 4, 12)
    assert (tight["batch_size"], tight["lora_rank"], tight["alpha"]) == (1, 6, 12)
    assert preset("character", 20, "sdxl", 40 << 30)["batch_size"] == 4
    assert preset("text", 12, "llama", 2 << 30) == PRESETS["text"].settings, "rows are no pictures"
    with pytest.raises(UserError):
        preset("nothing")


def test_what_learns_a_change_keeps_its_rank_and_knows_no_repeats():
    changes = [kind for kind, one in PRESETS.items() if one.task in CHANGES]
    assert {PRESETS[kind].task for kind in changes} == set(CHANGES)
    for kind in changes:
        tight = preset(kind, 2, "sd1", 2 << 30)
        assert tight.items() >= {**PRESETS[kind].settings, "gradient_checkpointing": True}.items()
        assert not {"repeats", "dropout"} & tight.keys()


def test_one_thing_becomes_another_in_the_layers_of_a_unet_that_read_the_prompt():
    assert preset("turn", family="sdxl")["target_modules"] == ["attn2"]
    assert "target_modules" not in preset("turn", family="flux") and "target_modules" not in preset("turn")


def test_one_thing_is_learned_with_others_of_its_kind_left_as_they_are():
    """Flow models learn from one picture in a step: none of those is given away."""
    kinds = ("character", "object", "style")
    assert [preset(kind, family="sdxl").get("preserve", 0) for kind in kinds] == [0.3, 0.3, 0]
    assert not preset("character", family="flux")["preserve"]


@pytest.mark.parametrize("kind", PRESETS)
def test_every_preset_is_a_configuration(idle, settings, kind):
    assert idle.submit({**settings, **preset(kind, 12, "sd1")}).status == "queued"
