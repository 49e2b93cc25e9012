"""Whole runs on the real WebUI: the same LoRA as the command line's, previews, other ways to start the WebUI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from lora_trainer.ui.settings import OPTIONS
from tests.webui.server import Server, a1111_only
from tests.webui.test_borrowing import POINTERS, facts, same

ROOT = Path(__file__).parents[2]


NAMES = "import sys; n = sys.modules['networks']; result = [*n.available_networks, *n.networks_in_memory]"


DRAWN = {"preserve": 0.5, "trigger_word": "zwx", "preserve_pictures": 2}
"""The model that is lent also draws pictures of what it knows."""


def difference(one: Path, two: Path) -> float:
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys()
    return max(float((one[key].double() - two[key].double()).abs().max()) for key in one)


def by_command_line(webui: Server, python: str, settings: dict, base: Path, out: Path) -> Path:
    """The LoRA of the same settings without the WebUI, from a file."""
    shutil.rmtree(out, ignore_errors=True)
    given = settings | {"base_model": str(base), "output_dir": str(out), "output_name": "outside"}
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    # The folder that yaml files beside checkpoints name text encoders relative to.
    done = subprocess.run(
        [python, "-m", "lora_trainer", "train", *overrides], cwd=webui.webui, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "outside.safetensors"


@pytest.mark.parametrize("index", [0, 1])
def test_the_command_line_makes_the_same_lora(webui, settings, tmp_path, index):
    title = webui.checkpoints()[index]
    # AdamW's first steps have this size however small a gradient is, so where one is near zero, another environment's
    # rounding turns it round: the files agree in parts of the learning rate, here the default one.
    settings |= {"learning_rate": 1e-4, **({} if index == 0 else DRAWN)}
    job = webui.submit(**settings, output_name=f"inside-{index}", base_model=title)
    assert webui.wait(job)["status"] == "finished"
    base = webui.data / "models" / "Stable-diffusion" / title.partition(" [")[0]
    # Another environment need not know the open_clip architecture that a tiny SDXL's .yaml names.
    for python in (webui.python, sys.executable) if index == 0 else (webui.python,):
        outside = by_command_line(webui, python, settings, base, tmp_path / "out")
        apart = difference(webui.lora(job), outside)
        print(f"\n{title} against the command line with {python}: {apart:.2e}")
        assert apart <= (0 if python == webui.python else 1e-5)


def test_previews_are_the_hosts_and_disturb_nothing(webui, settings):
    plain = webui.submit(**settings, output_name="plain")
    assert webui.wait(plain)["status"] == "finished"
    picture, before = webui.generate("a circle"), facts(webui)
    parameters = (webui.data / "params.txt").read_text("utf-8")
    job = webui.submit(**settings, output_name="seen", preview_prompts=["zwx, a red ellipse"], preview_steps=2)
    done = webui.wait(job)
    assert done["status"] == "finished" and done["thumbnail"], done["warnings"]
    (folder,) = (webui.data / "lora_trainer" / "jobs").glob(f"{job:05d}-*")
    previews = sorted(folder.rglob("previews/*.png"))
    assert len({path.read_bytes() for path in previews}) == len(previews) >= 3, "every one shows newer weights"
    assert same(webui.lora(plain), webui.lora(job))
    assert (webui.data / "params.txt").read_text("utf-8") == parameters
    after = facts(webui)
    assert (after[0], after[2]) == (before[0], before[2])
    assert {key for key in after[1] if after[1][key] != before[1].get(key)} <= {"sd_checkpoint_hash"}
    names = webui.probe(
        "import sys; n = sys.modules['networks']; result = [*n.available_networks, *n.networks_in_memory]"
    )
    assert not [name for name in names if "preview" in name]
    assert np.array_equal(webui.generate("a circle"), picture)


def test_a_lora_published_again_is_used_at_once(webui, settings):
    first = webui.submit(**settings, output_name="again")
    webui.wait(first)
    old = webui.generate("a circle <lora:again:1>")
    plain = webui.generate("a circle")
    second = webui.submit(**settings | {"seed": 8, "learning_rate": 3e-3}, output_name="again", overwrite=True)
    done = webui.wait(second)
    assert done["status"] == "finished" and done["verified"], done["warnings"]
    new = webui.generate("a circle <lora:again:1>")
    assert not np.array_equal(new, old) and not np.array_equal(new, plain)
    assert np.array_equal(webui.generate("a circle"), plain)


def test_a_waiting_job_keeps_the_model_that_was_loaded_when_it_was_sent(webui, settings):
    first, second = webui.checkpoints()[:2]
    webui.select(first)
    job = webui.post("/lora-trainer/v1/jobs", {"settings": settings | {"output_name": "kept"}, "held": True})["id"]
    webui.select(second)
    try:
        webui.command(job, "start")
        done = webui.wait(job)
        assert (done["status"], done["verified"]) == ("finished", True), done["warnings"]
        assert first.startswith(done["base_model"])
        assert webui.get("/sdapi/v1/options")["sd_model_checkpoint"] == second
    finally:
        webui.select(first)


@pytest.mark.parametrize("flag", ["--medvram", pytest.param("--opt-channelslast", marks=a1111_only)])
def test_every_way_of_keeping_the_weights_is_lent_from_without_a_copy(tmp_path, settings, flag):
    with Server(tmp_path / "data", flag) as webui:
        picture, before = webui.generate("a circle"), webui.sha()
        job = webui.submit(**settings | DRAWN | {"max_train_steps": 12}, output_name="lent")
        webui.until(job, lambda job: job["step"] >= 2 or job["status"] == "failed")
        found = webui.probe(POINTERS)
        assert found["bound"] and found["copied"] == 0
        assert np.array_equal(webui.generate("a circle"), picture)
        done = webui.wait(job)
        assert (done["status"], done["verified"]) == ("finished", True)
        assert webui.sha() == before
        assert np.array_equal(webui.generate("a circle"), picture)


@a1111_only
def test_lowvram_and_fp8_are_refused_in_a_sentence(tmp_path, settings):
    refused = pytest.raises(RuntimeError, match=r"--lowvram.*--medvram")
    with Server(tmp_path / "lowvram", "--lowvram") as webui, refused:
        webui.submit(**settings, output_name="lowvram")


@a1111_only
def test_fp8_needs_the_cached_fp16_weights(webui, settings):
    webui.post("/sdapi/v1/options", {"fp8_storage": "Enable"})
    try:
        with pytest.raises(RuntimeError, match="fp8"):
            webui.submit(**settings, output_name="fp8")
        webui.post("/sdapi/v1/options", {"cache_fp16_weight": True})
        before = webui.sha()
        done = webui.wait(webui.submit(**settings, output_name="fp8-cached"))
        assert done["status"] == "finished", done["error"]
        assert webui.sha() == before
    finally:
        # The WebUI draws a little differently afterwards: it has rounded its noise schedule to fp16.
        webui.post("/sdapi/v1/options", {"fp8_storage": "Disable", "cache_fp16_weight": False})


def test_it_works_without_the_page(tmp_path, settings):
    with Server(tmp_path / "api", "--nowebui") as webui:
        # It listens to everybody, so only folders of the trainer's own may be named.
        with pytest.raises(RuntimeError, match="may not be used here"):
            webui.submit(**settings, output_name="refused")
        own = webui.data / "lora_trainer" / "datasets" / "pictures"
        shutil.copytree(settings["train_data_dir"], own)
        settings |= {"train_data_dir": str(own)}
        done = webui.wait(webui.submit(**settings, output_name="api"))
        assert (done["status"], done["verified"]) == ("finished", True)


@pytest.mark.skipif("LORA_TRAINER_WEBUI_BARE_PYTHON" not in os.environ, reason="needs an environment without diffusers")
@pytest.mark.parametrize("broken", [False, True], ids=["no diffusers", "broken diffusers"])
def test_without_working_packages_the_webui_starts_and_the_tab_says_why(tmp_path, monkeypatch, broken):
    monkeypatch.setenv("LORA_TRAINER_WEBUI_PYTHON", os.environ["LORA_TRAINER_WEBUI_BARE_PYTHON"])
    if broken:
        (tmp_path / "diffusers").mkdir()
        (tmp_path / "diffusers" / "__init__.py").write_text("raise AttributeError('torch has no attribute xpu')")
        info = tmp_path / "diffusers-0.30.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.30.0\n")
    with Server(tmp_path / "data", extra_path=tmp_path) as webui:
        webui.generate("a circle")
        page = json.dumps(webui.get("/config"))
        assert "not possible yet" in page and "install.py" in page
        assert ("xpu" in page) is broken


def test_settings_of_ours_are_on_the_settings_page(webui):
    page = json.dumps(webui.get("/config"), ensure_ascii=False)
    assert all(json.dumps(option.label, ensure_ascii=False) in page for option in OPTIONS)
    values = webui.probe("result = {key: value for key, value in shared.opts.data.items() if 'lora_trainer' in key}")
    assert values == {option.key: option.default for option in OPTIONS}


def test_the_model_can_be_held_and_a_switch_can_wait(webui, settings):
    settings |= {"max_train_steps": 10}
    plain = webui.submit(**settings, output_name="not-held")
    webui.wait(plain)
    first, second = webui.checkpoints()[:2]
    webui.select(first)
    webui.post("/sdapi/v1/options", {"lora_trainer_switch_waits": True})
    try:
        job = webui.submit(**settings, output_name="waited-for")
        webui.until(job, lambda job: job["step"] >= 1)
        webui.select(second)
        assert webui.wait(job)["status"] == "finished"
        assert webui.get("/sdapi/v1/options")["sd_model_checkpoint"] == second
        assert same(webui.lora(plain), webui.lora(job))
        webui.select(first)
        webui.post("/sdapi/v1/options", {"lora_trainer_switch_waits": False, "lora_trainer_hold_model": True})
        job = webui.submit(**settings, output_name="held")
        webui.until(job, lambda job: job["step"] >= 1)
        webui.generate("a circle")
        assert webui.job(job)["step"] == 10, "the picture waited for the whole run"
        assert webui.wait(job)["status"] == "finished"
        assert same(webui.lora(plain), webui.lora(job))
        job = webui.submit(**settings, output_name="held-and-paused")
        webui.until(job, lambda job: job["step"] >= 1)
        webui.command(job, "pause")
        webui.generate("a circle")
        assert webui.job(job)["step"] < 10, "a pause gives the model back meanwhile"
        webui.command(job, "resume")
        assert webui.wait(job)["status"] == "finished"
        assert same(webui.lora(plain), webui.lora(job))
    finally:
        webui.post("/sdapi/v1/options", {"lora_trainer_switch_waits": False, "lora_trainer_hold_model": False})
