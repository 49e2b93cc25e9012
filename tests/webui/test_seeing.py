"""A run with held-out pictures in a real WebUI: its curves, the grid by the host's sampler, the report and the tools.

LORA_TRAINER_SHOTS names a folder for screenshots of all of them, in both themes and in Chinese.
"""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from lora_trainer.demo import shapes
from tests.webui.person import shot
from tests.webui.server import FORGE
from tests.webui.test_tab import open_tab, page, until  # noqa: F401 - fixtures
from tests.webui.test_walk import drawing_shapes

GRID = "#lora_trainer_tab_runs .lora_trainer_grid_table"
RUN = {
    "output_name": "star_seen", "resolution": "64" if FORGE else "128", "min_bucket_resolution": 64, "batch_size": 2,
    "lora_rank": 8, "learning_rate": 1e-3, "max_train_steps": 12 if FORGE else 48, "save_steps": 4 if FORGE else 16,
    "validation_share": 0.2, "validation_steps": 4, "early_stopping": "advise", "keep_checkpoints": 0,
    "preview_steps": 4 if FORGE else 16, "preview_prompts": ["a red star on a grey background --s 6"],
    "tensorboard": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    with drawing_shapes(tmp_path_factory.mktemp("webui")) as server:
        yield server


@pytest.fixture(scope="module")
def address(webui):
    return webui.url("/")


@pytest.fixture(scope="module")
def finished(webui, tmp_path_factory):
    stars = tmp_path_factory.mktemp("stars")
    shapes.write_dataset(stars, count=12)
    job = webui.wait(webui.submit(train_data_dir=str(stars), **RUN), timeout=1800)
    assert job["status"] == "finished", job
    return job


def in_both_themes(page, webui, name, arrange):  # noqa: F811
    """The page anew in each theme; ``arrange`` brings to view what is looked at."""
    for theme in ("light", "dark"):
        page.goto(f"{webui.url('/')}?__theme={theme}", wait_until="domcontentloaded")
        open_tab(page)
        arrange()
        shot(page, f"{name}-{theme}", full_page=True)


def opened(page, job):  # noqa: F811
    page.click("#lora_trainer_tabs > .tab-nav button >> nth=2")
    page.evaluate("(id) => loraTrainer.runs.open(id)", job["id"])
    page.wait_for_selector("#lora_trainer_tab_runs .lora_trainer_plot")


def compared(page, job):  # noqa: F811
    opened(page, job)
    page.locator("#lora_trainer_tab_runs").get_by_role("button", name="Compare checkpoints").click()
    drawn_grid(page)


def drawn_grid(page):  # noqa: F811
    loaded = "(all) => all.length > 0 && all.every((one) => one.complete && one.naturalWidth)"
    until(page, f"({loaded})([...document.querySelectorAll('{GRID} img')])", 1800)


def test_curves_grid_and_report(page, webui, finished):  # noqa: F811
    points = webui.get(f"/lora-trainer/v1/jobs/{finished['id']}/metrics")["points"]
    assert {"validation", "drift"} <= set().union(*points)
    open_tab(page)
    opened(page, finished)
    assert finished["advice"] in page.inner_text("#lora_trainer_tab_runs .lora_trainer_inside")
    page.locator("#lora_trainer_tab_runs").get_by_role("button", name="Draw a grid").first.click()
    place = f"/lora-trainer/v1/jobs/{finished['id']}/compare"
    until(page, f"fetch('{place}').then((one) => one.json()).then((one) => one.status === 'finished')", 1800)
    drawn_grid(page)
    shown = page.locator(f"{GRID} thead th").all_inner_texts()
    assert shown[:2] == ["", "base model"] and f"step {RUN['max_train_steps']}" in shown
    in_both_themes(page, webui, "grid", lambda: compared(page, finished))
    page.locator(f"{GRID} tbody tr").nth(1).locator("button").first.click()  # the first row is the prompt
    first = RUN["save_steps"]
    page.wait_for_selector(f"{GRID} [aria-pressed=true][title*='step {first} at weight 0.5']")
    lora = next(webui.data.glob("models/Lora/**/star_seen.safetensors"))
    with safe_open(lora, "pt") as file:
        assert file.metadata()["ss_steps"] == str(first)
    card = json.loads(lora.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["preferred weight"] == 0.5
    page.goto(webui.url(f"/lora-trainer/v1/jobs/{finished['id']}/report"))
    text = page.inner_text("body")
    assert "star_seen" in text and str(webui.data) not in page.content()
    shot(page, "report", full_page=True)


def test_a_smaller_lora_by_the_tools(page, webui, finished):  # noqa: F811
    def tools():
        page.click("#lora_trainer_tabs > .tab-nav button >> nth=3")
        form = page.locator("form[data-tool=strength]")
        form.get_by_label("LoRA").select_option("star_seen.safetensors")
        form.get_by_label("Base model").select_option(index=1)  # no usual SD 1.5: its blocks are found in the file
        form.get_by_text("Measure").click()
        page.wait_for_selector("table.lora_trainer_strengths")

    in_both_themes(page, webui, "tools", tools)
    page.locator("details:has(form[data-tool=resize]) > summary").click()
    form = page.locator("form[data-tool=resize]")
    form.get_by_label("LoRA", exact=True).select_option("star_seen.safetensors")
    form.get_by_label("Base model").select_option(index=1)
    form.get_by_label("Name of the new LoRA").fill("star_small")
    form.get_by_label("Rank", exact=True).fill("2")
    form.get_by_text("Resize it").click()
    until(page, "loraTrainer.get('tools_status').innerText.includes('star_small')")
    prompt = "a red star on a grey background"
    pictures = [webui.generate(f"{prompt} <lora:{name}:1>").tobytes() for name in ("star_seen", "star_small")]
    assert len({*pictures, webui.generate(prompt).tobytes()}) == 3


def test_in_chinese(page, webui, finished):  # noqa: F811
    page.goto("about:blank")  # what gradio is still fetching would break off
    webui.post("/sdapi/v1/options", {"localization": "zh_CN"})
    webui.reload_ui()
    in_both_themes(page, webui, "runs-zh", lambda: opened(page, finished))
    assert "预览" in page.inner_text("#lora_trainer_tab_runs")
    page.goto(webui.url(f"/lora-trainer/v1/jobs/{finished['id']}/report?language=zh_CN"))
    assert "star_seen" in page.inner_text("body")
    shot(page, "report-zh", full_page=True)
