"""Language models trained in a real WebUI: its image model is bit for bit what it was, however the training ends."""

from __future__ import annotations

import numpy as np
import pytest

from tests.language_models import write_rows
from tests.webui.server import ROOT, Server
from tests.webui.test_borrowing import PLANT, PULL_OUT, facts, same

# By the WebUI's own transformers, which must be able to read it.
MAKE = """
import runpy
from pathlib import Path
runpy.run_path({file!r})["tiny_language_model"](Path({folder!r}))
"""


@pytest.fixture
def text(webui: Server, tmp_path_factory) -> dict:
    """Settings of a training on a tiny LLaMA in the WebUI's list."""
    folder = webui.data / "models" / "LLM" / "tiny-llama"
    if not folder.exists():
        webui.probe(MAKE.format(file=str(ROOT / "tests" / "language_models.py"), folder=str(folder)))
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    return {
        "task": "text", "base_model": "tiny-llama", "train_data_dir": str(rows), "lora_rank": 4, "batch_size": 4,
        "max_train_steps": 20, "save_steps": 5, "chat_template": "plain", "save_precision": "fp32", "seed": 7,
        "learning_rate": 1e-3, "tensorboard": False,
    }  # fmt: skip


def test_after_success_failure_and_stop(webui, text):
    picture = webui.generate("a big red circle")
    before = facts(webui)
    finished = webui.wait(webui.submit(**text, output_name="told"))
    assert (finished["status"], finished["family"]) == ("finished", "llama"), finished
    assert finished["lora"] == "output/told/adapter_model.safetensors" and finished["published"] is None
    assert facts(webui) == before

    name = "lora_trainer.models.families.causal_lm.model.LanguageModel"
    webui.probe(PLANT.format(owner=name, name="hidden_states", calls=3, action="fail(RuntimeError('planted'))"))
    try:
        failed = webui.wait(webui.submit(**text, output_name="broken"))
    finally:
        webui.probe(PULL_OUT)
    assert failed["status"] == "failed" and failed["error"]["remedy"]
    assert facts(webui) == before

    stopped = webui.submit(**text | {"max_train_steps": 5000}, output_name="stopped")
    webui.until(stopped, lambda job: job["step"] >= 2)
    assert np.array_equal(webui.generate("a big red circle"), picture), "who waits gets a picture between two steps"
    webui.post(f"/lora-trainer/v1/jobs/{stopped}/stop")
    assert webui.wait(stopped)["status"] == "stopped"
    assert facts(webui) == before
    assert np.array_equal(webui.generate("a big red circle"), picture)


def test_after_the_webui_was_killed(webui, text):
    webui.generate("a big red circle")
    before = webui.sha()
    whole = webui.submit(**text | {"max_train_steps": 400}, output_name="whole")
    webui.wait(whole)
    job = webui.submit(**text | {"max_train_steps": 400}, output_name="cut")
    webui.until(job, lambda job: job["step"] >= 10)
    webui.kill()
    webui.start()
    webui.generate("a big red circle")
    assert webui.sha() == before
    assert webui.job(job)["status"] == "interrupted"
    webui.post(f"/lora-trainer/v1/jobs/{job}/resume")
    assert webui.wait(job)["status"] == "finished"
    assert webui.sha() == before
    assert same(webui.lora(whole), webui.lora(job))
