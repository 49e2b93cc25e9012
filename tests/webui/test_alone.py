"""``python -m lora_trainer ui`` in the WebUI's environment, without the WebUI: the same tab, from pictures to LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.ui.browser import chromium
from tests.webui.server import ROOT, START_SECONDS, free_port
from tests.webui.test_tab import TRAINED, add, until


@pytest.fixture
def alone(tmp_path):
    """(address, folder) of the page."""
    webui, models = Path(os.environ["LORA_TRAINER_WEBUI"]), Path(os.environ["LORA_TRAINER_WEBUI_MODELS"])
    port = free_port()
    command = [os.environ["LORA_TRAINER_WEBUI_PYTHON"], "-m", "lora_trainer", "ui", "--models", str(models)]
    command += ["--data", str(tmp_path / "data"), "--device", "cpu", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False"}
    with open(tmp_path / "log", "wb") as log:
        # In the folder that yaml files beside checkpoints name text encoders relative to.
        process = subprocess.Popen(command, cwd=webui, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(address):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text("utf-8")
            time.sleep(0.25)
        yield address, tmp_path / "data"
    finally:
        process.kill()
        process.wait(30)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}lora-trainer/v1/checkpoints", timeout=60) as answer:
            return bool(json.load(answer))
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def test_from_pictures_to_a_lora_without_a_webui(alone, pictures):
    address, folder = alone
    errors = []
    with chromium() as browser:
        chinese = browser.new_page(locale="zh-CN")
        chinese.goto(address, wait_until="domcontentloaded")
        chinese.wait_for_selector("text=开始训练")
        assert chinese.inner_text("#lora_trainer_tabs button >> nth=1") == "数据集"
        chinese.close()
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address, wait_until="domcontentloaded")
        page.wait_for_function("() => window.loraTrainer && loraTrainer.begun")
        page.wait_for_selector("#lora_trainer_field_base_model option:nth-child(2)", state="attached")
        title = page.get_attribute("#lora_trainer_field_base_model option:nth-child(2)", "value")
        page.evaluate("(title) => loraTrainer.form.set('base_model', title)", title)  # nothing is loaded here
        add(page, pictures)
        page.check("input[value=object]")
        page.fill("#lora_trainer_field_output_name", "ellipse")
        page.evaluate(f"() => {{ const {TRAINED}; for (const [name, value] of Object.entries(SETTINGS)) "
                      "loraTrainer.form.set(name, value); return loraTrainer.estimate.now(); }")  # fmt: skip
        page.click("#lora_trainer_start")
        until(page, "loraTrainer.live.job && loraTrainer.live.job.step > 1")
        page.reload()
        until(page, "window.loraTrainer && loraTrainer.begun && loraTrainer.live.points.length > 1")
        until(page, "loraTrainer.live.job.status === 'finished'")
        page.wait_for_selector("#lora_trainer_previews img")
        until(page, "document.querySelector('#lora_trainer_job_message').innerText.includes('folder of LoRAs')")
        # There is no prompt to try it in.
        assert not page.query_selector("#lora_trainer_job_buttons >> text=Try it")
        if picture := os.environ.get("LORA_TRAINER_PICTURE"):
            page.screenshot(path=picture, full_page=True)
    assert not errors
    assert {path.name for path in (folder / "loras").iterdir()} == {
        "ellipse.safetensors", "ellipse.json", "ellipse.preview.png"
    }  # fmt: skip
