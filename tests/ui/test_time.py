"""Minutes on the page: a range, what it rests on, and what would shorten it."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
from tests.ui.person import add, estimated, text


@pytest.fixture
def told(page, files):
    """The page as it shows an answer of the server with these figures."""
    add(page, files)
    figures = {}

    def answer(route):
        facts = route.fetch().json()
        route.fulfill(json={**facts, **figures})

    page.route("**/estimate", answer)

    def show(**more):
        figures.update(more)
        estimated(page)
        return text(page, "fact_time")

    return show


def test_a_range_says_what_it_rests_on(told, page):
    measured = {"basis": 3, "basis_name": "hat_v0", "parts": {"training": 2.0, "previews": 0.5}}
    assert told(minutes=2.5, minutes_low=1.9, minutes_high=3.2, **measured) == "1–4 min, as hat_v0 took"
    assert (
        page.get_attribute("#lora_trainer_fact_time", "title") == "training: about 2 min\npreviews: less than a minute"
    )
    assert told(minutes=0.4, minutes_low=0.2, minutes_high=0.8) == "less than a minute, as hat_v0 took"
    assert told(minutes=1.0, minutes_low=0.7, minutes_high=1.3) == "up to 2 min, as hat_v0 took"
    assert told(minutes=200, minutes_low=150, minutes_high=250) == "2.5–4.2 h, as hat_v0 took"
    assert told(minutes=2.5, minutes_low=1.2, minutes_high=5, basis=None) == "1–5 min (forecast)"
    assert told(minutes=None) == "known after the first steps"


def test_what_would_shorten_a_run_on_a_processor(told, page):
    told(minutes=50, minutes_low=30, minutes_high=90, basis=None, parts={}, shorter=[])
    assert page.is_hidden("#lora_trainer_shorter")
    told(shorter=[{"name": "resolution", "value": "256", "minutes": 12}, {"name": "epochs", "value": 6, "minutes": 25}])
    assert text(page, "shorter") == (
        "A processor is slow with pictures of this size. It would be shorter with Resolution 256 (about 12 min) or"
        " Epochs 6 (about 25 min), or on a graphics card."
    )
