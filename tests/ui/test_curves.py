"""The curves of runs: measures, smoothing, scale, several runs, previews on the time line, and the keyboard."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("playwright.sync_api")
from PIL import Image

from lora_trainer.jobs.job import Job
from tests.ui.person import text

INSIDE = ".lora_trainer_inside"


def run_of(manager, name, steps, factor=1.0) -> Job:
    """A finished run with curves, held-out pictures and two previews."""
    known = {"status": "finished", "started": 1.0, "finished": 2.0, "step": steps, "total_steps": steps,
             "result": {"advice": f"It is still learning at step {steps}."}}  # fmt: skip
    job = manager.store.add(name, "", folder=f"7-{name}", **known)
    output = manager.folders.output(job)
    (output / "logs").mkdir(parents=True)
    lines = []
    for step in range(steps + 1):
        if step:
            loss = factor * (0.1 + 1 / step + 0.05 * (step % 2))
            lines.append({"step": step, "epoch": 1, "loss": loss, "lr": 1e-4 / step, "seconds": 0.5, "grad_norm": 2.0})
        if step % (steps // 4) == 0:
            lines.append({"kind": "validation", "step": step, "epoch": 1, "validation": factor * (0.5 + step / steps),
                          "training": 0.4, "drift": 1e-14 + 0.01 * step / steps})  # fmt: skip
    (output / "logs" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (output / f"{name}.config.yaml").write_text(f"output_name: {name}\nlora_rank: 7\n")
    (output / "previews").mkdir()
    for step, color in ((0, "red"), (steps // 2, "blue")):
        path = output / "previews" / f"{name}-step{step:08d}-0.png"
        Image.new("RGB", (64, 64), color).save(path)
        place = path.relative_to(manager.folders.of(job)).as_posix()
        manager.store.add_event(job.id, "preview", "a hat", {"path": place, "step": step})
    return job


@pytest.fixture
def runs(manager):
    return run_of(manager, "hat_v1", 40), run_of(manager, "hat_v2", 100_000, 2.0)


def opened(page, job):
    page.evaluate("(id) => loraTrainer.runs.open(id)", job.id)
    page.wait_for_selector(f"{INSIDE} .lora_trainer_plot")


def paths(page, kind):
    drawn = page.locator(f"{INSIDE} path.lora_trainer_{kind}").all()
    return [path for one in drawn if (path := one.get_attribute("d"))]


def choose(page, measure):
    page.select_option(f"{INSIDE} .lora_trainer_curve_choices select >> nth=0", measure)


def reading(page):
    return page.inner_text(f"{INSIDE} figcaption span + span >> nth=0")


def test_curves(page, manager, runs):
    """One page for all of it: a browser costs more than what is looked at."""
    small, large = runs
    opened(page, small)
    assert "It is still learning at step 40." in page.inner_text(INSIDE)
    frame = page.locator(f"{INSIDE} .lora_trainer_plot_frame")

    # Every measure that was written can be chosen; the keyboard reads the values.
    offered = page.eval_on_selector_all(f"{INSIDE} .lora_trainer_curve_choices select >> nth=0 >> option", "all => all.map((one) => one.value)")  # noqa: E501
    assert offered == ["loss", "validation", "drift", "grad_norm", "lr", "speed"]
    for measure, said in (("lr", "Learning rate 0.000100"), ("speed", "2.00"), ("grad_norm", "2.00"),
                          ("validation", "held out 0.500 · trained 0.400"), ("loss", "each step 1.15")):  # fmt: skip
        choose(page, measure)
        frame.focus()
        frame.press("Home")
        if measure == "loss":
            frame.press("ArrowRight")  # measurements begin at step 0
        assert said in reading(page)
        assert frame.get_attribute("aria-valuetext") == reading(page)
    frame.press("End")
    assert reading(page).startswith("step 40 ") and frame.get_attribute("aria-valuenow") == "40"

    # Smoothing: none draws one line, more draws a smoother one. Both are remembered.
    slider = page.locator(f"{INSIDE} input[type=range] >> nth=0")
    (before,) = paths(page, "mean")
    slider.fill("50")
    assert paths(page, "mean") != [before] and len(paths(page, "raw")) == 1
    slider.fill("0")
    assert not paths(page, "raw") and paths(page, "mean")[0].count("L") == 39
    slider.fill("20")

    # On a logarithmic scale equal factors have equal heights; what is not above zero is left out.
    choose(page, "lr")
    page.check(f"{INSIDE} .lora_trainer_curve_choices input[type=checkbox]")
    heights = [float(place.split()[1]) for place in paths(page, "mean")[0][1:].split("L")]
    assert heights[3] - heights[1] == pytest.approx(heights[1] - heights[0], abs=0.3), "steps 1, 2, 4: halves"
    assert "1e-5" in page.locator(f"{INSIDE} .lora_trainer_tick").all_text_contents()

    # A mark for each preview, at its step; a click shows the picture.
    marks = page.locator(f"{INSIDE} .lora_trainer_mark")
    labels = [mark.get_attribute("aria-label") for mark in marks.all()]
    assert labels == ["Preview before the training", "Preview at step 20"]
    marks.nth(0).click()
    assert page.inner_text(f"{INSIDE} .lora_trainer_panel >> nth=1 >> figcaption span + span") == "before the training"
    page.keyboard.press("Tab")
    assert page.locator(f"{INSIDE} .lora_trainer_mark_picture img >> nth=1").is_visible()

    # Another run of 100,000 steps is laid over: thinned, named, and taken away again.
    page.uncheck(f"{INSIDE} .lora_trainer_curve_choices input[type=checkbox]")
    choose(page, "loss")
    page.select_option(f"{INSIDE} .lora_trainer_curve_choices select >> nth=1", str(large.id))
    page.wait_for_selector(f"{INSIDE} path.lora_trainer_mean.lora_trainer_series1")
    one, other = paths(page, "mean")[:2]
    assert one.count("L") == 39 and other.count("L") == 999
    legend = page.locator(f"{INSIDE} .lora_trainer_legend")
    assert legend.inner_text().split()[0] == "hat_v1" and "hat_v2" in legend.inner_text()
    frame.focus()
    frame.press("End")
    assert "hat_v2 0.2" in reading(page) and "hat_v1 0.1" in reading(page)
    legend.get_by_label("Take hat_v2 away").click()
    page.wait_for_selector(f"{INSIDE} path.lora_trainer_series1", state="detached")
    assert len(paths(page, "mean")) == 1

    # The report opens as a page of its own, with the same curves.
    with page.context.expect_page() as report:
        page.click(f"{INSIDE} button:text-is('Report')")
    report.value.wait_for_selector("svg")
    assert report.value.inner_text("h1") == "hat_v1" and report.value.locator("svg").count() == 5
    report.value.close()

    # The next page begins with what was chosen.
    page.reload()
    page.wait_for_selector("#lora_trainer_field_base_model option:nth-child(1)", state="attached")
    opened(page, small)
    assert page.input_value(f"{INSIDE} input[type=range] >> nth=0") == "20" and text(page, "runs_count")
