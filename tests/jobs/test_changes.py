"""LoRAs that learn a change, in the queue: named, forecast, trained, published with a card that says so."""

from __future__ import annotations

import pytest
from PIL import Image

from lora_trainer.comparison.plan import Wish, make_plan
from lora_trainer.dataset import images
from lora_trainer.errors import ConfigError, UserError
from lora_trainer.jobs.estimating import estimate_job
from tests.jobs.fakes import wait_for

WORDS = {"task": "words", "original_prompt": "a circle", "target_prompt": "a square"}


@pytest.fixture
def pair(tmp_path):
    folder = tmp_path / "pair"
    folder.mkdir()
    for name in ("a", "a_after"):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    return {"task": "pair", "train_data_dir": str(folder), "max_train_steps": 50}


def test_words_need_no_pictures_and_come_with_their_card(manager, host, train):
    train.free = True
    job = manager.submit({**WORDS, "learning_rate": 5e-4})
    wait_for(lambda: manager.store.get(job.id).status == "finished", "the end")
    assert job.name == "a_circle_to_a_square" and train.configs[0].task == "words"
    ((name, card),) = host.published
    assert (name, card.preferred_weight, card.activation_text) == (job.name, 1.0, "")
    assert "with words: 'a circle' → 'a square'." in card.notes


def test_what_they_take_is_forecast(idle, host, pair):
    facts = estimate_job({**WORDS, "batch_size": 2, "resolution": 256}, host, idle.store)
    assert (facts["task"], facts["pictures"], facts["steps"], facts["resolution"]) == ("words", 0, 300, "256")
    facts = estimate_job(pair, host, idle.store)
    assert (facts["task"], facts["pictures"], facts["steps"]) == ("pair", 2, 50)
    facts = estimate_job({**pair, "pair_method": "copier", "copy_steps": 70}, host, idle.store)
    assert facts["steps"] == 120


def test_estimates_decode_the_pictures_of_a_pair_once(idle, host, pair, monkeypatch):
    looked, look_at = [], images.measure
    monkeypatch.setattr(images, "measure", lambda path: looked.append(path.name) or look_at(path))
    for steps in (50, 60, 70):
        assert estimate_job({**pair, "max_train_steps": steps}, host, idle.store)["steps"] == steps
    assert sorted(looked) == ["a.png", "a_after.png"]


def test_what_says_no_change_is_refused_before_it_is_queued(idle, host, pair):
    for settings, field in (
        ({"task": "words"}, "original_prompt"),
        ({**pair, "pair_suffix": "_b"}, "train_data_dir"),
        ({**pair, "train_data_dir": ""}, "train_data_dir"),
    ):
        with pytest.raises((UserError, ConfigError)) as caught:
            estimate_job(settings, host, idle.store)
        problems = getattr(caught.value, "problems", None) or [caught.value]
        assert [problem.field for problem in problems] == [field]


def test_a_grid_goes_both_ways_and_shows_what_is_changed(host, tmp_path):
    from lora_trainer.config import from_mapping

    info = host.lender("", None).describe()
    config = from_mapping({**WORDS, "output_name": "it"})
    plan = make_plan(config, {3: tmp_path / "it.safetensors"}, info, Wish())
    assert plan.weights == (-1.0, -0.5, 0.5, 1.0) and plan.prompts == ("a circle",)
    config = from_mapping({**WORDS, "output_name": "it", "prompt_templates": ["{} by day", "{} at night"]})
    assert make_plan(config, {3: tmp_path / "it.safetensors"}, info, Wish()).prompts == ("a circle by day",)
