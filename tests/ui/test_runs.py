"""The list of runs: found, ordered with what runs now first, compared, deleted by the dozen."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api")
from tests.jobs.fakes import make_pictures, wait_status
from tests.ui.person import text, wait_for_text


def listed(page):
    return page.locator(".lora_trainer_run .lora_trainer_name").all_inner_texts()


def wait_for_list(page, names):
    script = "(names) => [...document.querySelectorAll('.lora_trainer_run .lora_trainer_name')].map((one) => one.innerText).join() === names"  # noqa: E501
    page.wait_for_function(script, arg=",".join(names))


@pytest.fixture
def runs(page, manager):
    """The list with three runs that are over."""
    pictures = str(make_pictures(manager.folders.datasets / "cats"))
    for name, rank in (("beta", 4), ("alpha", 8), ("gamma", 8)):
        job = manager.submit({"train_data_dir": pictures, "output_name": name, "lora_rank": rank}, held=True)
        manager.stop(job.id)
    page.evaluate("loraTrainer.openSubTab('Runs')")
    wait_for_list(page, ["gamma", "alpha", "beta"])
    return page


def test_runs_are_searched_and_ordered_with_what_runs_now_first(runs, manager, train):
    runs.select_option("#lora_trainer_runs_order", "name")
    wait_for_list(runs, ["alpha", "beta", "gamma"])
    runs.fill("#lora_trainer_runs_search", "CATS bet")
    wait_for_list(runs, ["beta"])
    assert text(runs, "runs_count") == "1 of 1"
    runs.fill("#lora_trainer_runs_search", "")
    wait_for_list(runs, ["alpha", "beta", "gamma"])
    runs.click("#lora_trainer_run_2 > button")
    manager.start(3)
    wait_for_list(runs, ["gamma", "alpha", "beta"])
    train.allow(3)
    wait_for_text(runs, "run_3", "step 3 of 20")
    assert runs.locator("#lora_trainer_run_2 .lora_trainer_inside").count() == 1, "what was open stays open"
    manager.stop(3)
    wait_for_list(runs, ["alpha", "beta", "gamma"])


def test_the_settings_in_which_two_runs_differ(runs):
    runs.click("#lora_trainer_run_3 > button")
    others = runs.locator("#lora_trainer_run_3").get_by_label("Lay another run's curve over it")
    others.select_option(label="beta")
    table = runs.locator("#lora_trainer_run_3 table")
    table.wait_for()
    assert [row.split() for row in table.inner_text().splitlines() if row.strip()] == [
        ["Setting", "gamma", "beta"], ["lora_rank", "8", "4"],
    ]  # fmt: skip
    runs.locator("#lora_trainer_run_3").get_by_label("Take beta away").click()
    runs.wait_for_selector("#lora_trainer_run_3 table", state="detached")
    others.select_option(label="alpha")
    runs.locator("#lora_trainer_run_3 >> text=Both runs have the same settings.").wait_for()


def test_many_runs_are_deleted_after_a_question(runs, manager):
    lora = manager.host.root / "Lora" / "alpha.safetensors"
    lora.write_bytes(b"published")
    runs.check("#lora_trainer_run_2 > input")
    runs.check("#lora_trainer_run_1 > input")
    assert "2 selected" in text(runs, "runs_many")
    runs.click("#lora_trainer_runs_many >> text=Delete …")
    wait_for_text(runs, "runs_message", "This deletes 2 runs")
    runs.click("#lora_trainer_runs_message >> text=Keep them")
    assert len(manager.store.ids()) == 3
    runs.click("#lora_trainer_runs_many >> text=Select all")
    runs.uncheck("#lora_trainer_run_3 > input")
    runs.click("#lora_trainer_runs_many >> text=Delete …")
    runs.click("#lora_trainer_runs_message >> text=Delete them")
    wait_for_list(runs, ["gamma"])
    assert manager.store.ids() == [3] and lora.read_bytes() == b"published"
    assert not runs.is_visible("#lora_trainer_runs_many")


def test_a_run_that_is_in_hand_is_not_offered_for_deletion(runs, manager, train):
    manager.start(2)
    train.allow(1)
    wait_status(manager, manager.store.get(2), "running")
    runs.wait_for_selector("#lora_trainer_run_2 > input:disabled")
    runs.check("#lora_trainer_run_3 > input")
    runs.click("#lora_trainer_runs_many >> text=Select all")
    assert "2 selected" in text(runs, "runs_many")
