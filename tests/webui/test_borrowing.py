"""The model that the real WebUI has loaded: lent without a copy, and given back bit for bit, whatever happens."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.webui.server import FORGE, Server, a1111_only

VAE = "first_stage_model."

FAULTS = {
    "assembling": ("lora_trainer.models.families.unet.model.DiffusionModel", "__init__", 0),
    "injecting": ("lora_trainer.adapters.inject.AdapterSet", "attach", 0),
    "latents": ("lora_trainer.models.families.unet.model.DiffusionModel", "encode_images", 0),
    "captions": ("lora_trainer.models.families.unet.model.DiffusionModel", "encode_prompts", 0),
    "a step's forward": ("lora_trainer.models.families.unet.model.DiffusionModel", "predict", 2),
    "a step's backward": ("torch.Tensor", "backward", 2),
    "the optimizer": ("torch.optim.AdamW", "step", 2),
    "saving": ("lora_trainer.run.saving.LoraSaver", "__call__", 0),
}

# What a user does there instead of an error: nothing is broken, but a stop is said in the middle.
STAGES = {name: FAULTS[name] for name in ("assembling", "latents", "captions", "a step's backward", "saving")}
SLOW = "time.sleep(2) if count[0] == calls + 1 else None"

# Ways in which the WebUI keeps models and LoRAs, by its own settings.
WAYS = {
    "as it comes": {},
    "several checkpoints loaded": {"sd_checkpoints_limit": 2, "sd_checkpoint_cache": 1},
    "LoRAs not merged": {"lora_functional": True},
}

PLANT = """
import importlib, time
from lora_trainer.errors import UserError
def resolve(path):
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
owner, name, calls = resolve({owner!r}), {name!r}, {calls}
def fail(error):
    raise error
original = getattr(owner, name)
shared.planted = (owner, name, original, name in vars(owner))
count = shared.planted_calls = [0]
def failing(*args, **kwargs):
    count[0] += 1
    if count[0] > calls:
        {action}
    return original(*args, **kwargs)
setattr(owner, name, failing)
"""
PULL_OUT = """
owner, name, original, own = shared.planted
setattr(owner, name, original) if own else delattr(owner, name)
"""
POINTERS = """
import gc
from lora_trainer.models.families.unet.model import DiffusionModel
host = {t.untyped_storage().data_ptr() for _, t in tensors() if not t.is_meta}
models = [o for o in gc.get_objects() if type(o) is DiffusionModel and not o.unet.conv_in.weight.is_meta]
bound = {n: p for n, p in models[0].bound().items() if not p.is_meta}
copied = {n: p for n, p in bound.items() if p.untyped_storage().data_ptr() not in host}
def size(tensors):
    return sum(p.numel() * p.element_size() for p in tensors.values())
result = {"models": len(models), "bound": len(bound), "bytes": size(bound), "copied": size(copied)}
"""
# How long somebody waits for the lock while a job trains, 40 times.
LOCK_WAITS = """
import time
from modules.call_queue import queue_lock
result = []
for _ in range(40):
    begin = time.monotonic()
    with queue_lock:
        result.append(time.monotonic() - begin)
    time.sleep(0.03)
"""
RSS = "result = int(open('/proc/self/statm').read().split()[1]) * 4096"
OPTIONS = "result = {k: v for k, v in shared.opts.data.items()}"
HIJACK = """
layer = torch.nn.Linear
modules = [module for part in parts() for module in part.modules()]
result = [str(type(shared.sd_model)), [str(type(m)) for m in modules], str(layer.forward), str(layer.__init__),
          [m.training for m in parts()], sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules),
          [str(m.forward) for m in modules if "forward" in vars(m)],
          sum(p.requires_grad for part in parts() for p in part.parameters())]
"""


def facts(webui: Server) -> tuple:
    return webui.sha(), webui.probe(OPTIONS), webui.probe(HIJACK)


@pytest.fixture
def options(webui):
    """Sets options of the WebUI for one test."""
    before = webui.get("/sdapi/v1/options")
    changed = {}

    def change(**values) -> None:
        unknown = values.keys() - before.keys()
        if unknown:
            pytest.skip(f"this WebUI has no {', '.join(unknown)}")
        changed.update(values)
        if values:
            webui.post("/sdapi/v1/options", values)

    yield change
    if changed:
        webui.post("/sdapi/v1/options", {name: before[name] for name in changed})


def same(one, two) -> bool:
    """Whether two LoRA files hold the same bits."""
    one, two = load_file(one), load_file(two)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("index", [0, 1])
def test_nothing_is_copied_and_it_starts_at_once(webui, settings, index):
    title = webui.checkpoints()[index]
    webui.select(title)
    try:
        webui.generate("a big red circle")  # the WebUI has done everything that it does only once
        webui.wait(webui.submit(**settings, output_name=f"warm-{index}"))
        before = webui.probe(RSS)
        begin = time.monotonic()
        job = webui.submit(**settings | {"max_train_steps": 60}, output_name=f"measured-{index}")
        webui.until(job, lambda job: job["step"] >= 1 or job["status"] == "failed")
        seconds, growth = time.monotonic() - begin, webui.probe(RSS) - before
        webui.until(job, lambda job: job["step"] >= 2)
        found = webui.probe(POINTERS)
        webui.post(f"/lora-trainer/v1/jobs/{job}/stop")
        webui.wait(job)
    finally:
        webui.select(webui.checkpoints()[0])
    print(f"\n{title}: POST to first step {seconds:.2f} s; resident memory {growth / 1e6:+.1f} MB; {found}")
    assert found["models"] == 1 and found["bound"] > 100
    assert found["copied"] == 0
    assert growth < found["bytes"]
    assert seconds < 3, "pictures and captions were encoded before"


def test_who_waits_for_the_lock_waits_for_one_step(webui, settings):
    job = webui.submit(**settings | {"max_train_steps": 400}, output_name="fair")
    webui.until(job, lambda job: job["step"] >= 2)
    waits = webui.probe(LOCK_WAITS)
    points = webui.get(f"/lora-trainer/v1/jobs/{job}/metrics")["points"]
    webui.post(f"/lora-trainer/v1/jobs/{job}/stop")
    webui.wait(job)
    steps = [point["seconds"] for point in points]
    print(f"\nwaited {np.median(waits):.3f} s, at most {max(waits):.3f} s; a step takes {np.median(steps):.3f} s, "
          f"at most {max(steps):.3f} s")  # fmt: skip
    assert len(steps) > 10, "training goes on meanwhile"
    assert max(waits) <= max(steps) + 0.1


def test_weights_options_and_hijacks_are_as_they_were_after_success_and_stop(webui, settings):
    picture = webui.generate("a big red circle")
    before = facts(webui)
    finished = webui.wait(webui.submit(**settings, output_name="finished"))
    assert (finished["status"], finished["verified"]) == ("finished", True), finished
    assert facts(webui) == before
    stopped = webui.submit(**settings | {"max_train_steps": 200}, output_name="stopped")
    webui.until(stopped, lambda job: job["step"] >= 2)
    webui.post(f"/lora-trainer/v1/jobs/{stopped}/stop")
    assert webui.wait(stopped)["status"] == "stopped"
    assert facts(webui) == before
    assert np.array_equal(webui.generate("a big red circle"), picture)


@pytest.mark.parametrize("error", ["RuntimeError('planted')", "torch.cuda.OutOfMemoryError('planted')"],
                         ids=["error", "out of memory"])  # fmt: skip
@pytest.mark.parametrize("stage", FAULTS)
def test_weights_options_and_hijacks_are_as_they_were_after_an_error(webui, settings, stage, error):
    picture = webui.generate("a big red circle")
    before = facts(webui)
    owner, name, calls = FAULTS[stage]
    # Encoded pictures and captions must not come from an earlier test.
    shutil.rmtree(webui.data / "lora_trainer" / "cache", ignore_errors=True)
    webui.probe(PLANT.format(owner=owner, name=name, calls=calls, action=f"fail({error})"))
    try:
        job = webui.wait(webui.submit(**settings, output_name=f"broken-{time.time_ns()}"))
    finally:
        webui.probe(PULL_OUT)
    assert job["status"] == "failed", f"{stage}: {job['status']}"
    assert job["error"]["remedy"]
    assert facts(webui) == before
    assert np.array_equal(webui.generate("a big red circle"), picture)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_options_and_hijacks_are_as_they_were_after_a_stop(webui, settings, stage):
    picture = webui.generate("a big red circle")
    before = facts(webui)
    owner, name, calls = STAGES[stage]
    shutil.rmtree(webui.data / "lora_trainer" / "cache", ignore_errors=True)
    webui.probe(PLANT.format(owner=owner, name=name, calls=calls, action=SLOW))
    try:
        job = webui.submit(**settings, output_name=f"cut-{time.time_ns()}")
        until = time.monotonic() + 60
        while webui.probe("result = shared.planted_calls[0]") <= calls:
            assert time.monotonic() < until
            time.sleep(0.05)
        webui.post(f"/lora-trainer/v1/jobs/{job}/stop")
        done = webui.wait(job)
    finally:
        webui.probe(PULL_OUT)
    assert done["status"] == ("finished" if stage == "saving" else "stopped"), done
    assert facts(webui) == before
    assert np.array_equal(webui.generate("a big red circle"), picture)


def test_loras_that_prompts_merged_do_not_leak_and_stay_merged(webui, settings):
    undisturbed = webui.submit(**settings, output_name="undisturbed")
    webui.wait(undisturbed)
    picture = webui.generate("a circle <lora:undisturbed:1>", cfg_scale=3)
    before = webui.sha()
    job = webui.submit(**settings, output_name="merged")
    assert webui.wait(job)["status"] == "finished"
    assert same(webui.lora(undisturbed), webui.lora(job))
    assert np.array_equal(webui.generate("a circle <lora:undisturbed:1>", cfg_scale=3), picture)
    assert webui.sha() == before


@pytest.mark.parametrize("way", WAYS)
def test_pictures_and_training_do_not_disturb_each_other(webui, settings, options, way):
    """Ten pictures, some with LoRAs, and a switch of checkpoint there and back, while a job trains."""
    options(**WAYS[way])
    settings |= {"max_train_steps": 60 if FORGE else 30}
    first, second = webui.checkpoints()[:2]
    alone = f"alone-{way.split()[0]}"
    undisturbed = webui.submit(**settings, output_name=alone)
    assert webui.wait(undisturbed)["status"] == "finished"
    prompts = ["a red circle", f"a blue ring <lora:{alone}:1>", "a star", f"a ring <lora:{alone}:0.5>", "a green cross"]
    begin = time.monotonic()
    expected = [webui.generate(prompt, seed) for prompt in prompts for seed in (1, 2)]
    usual = (time.monotonic() - begin) / len(expected)
    job = webui.submit(**settings, output_name=f"disturbed-{way.split()[0]}")
    webui.until(job, lambda job: job["step"] >= 1)
    drawn, waits, at = [], [], []
    for index, (prompt, seed) in enumerate((prompt, seed) for prompt in prompts for seed in (1, 2)):
        if index == 5:
            webui.select(second)
            webui.generate("noise")  # Forge loads what is selected for the next picture
            webui.until(job, lambda job: job["status"] == "waiting")
            webui.select(first)
        begin = time.monotonic()
        drawn.append(webui.generate(prompt, seed))
        waits.append(time.monotonic() - begin)
        at.append(webui.job(job)["step"])
    assert webui.job(job)["status"] in ("running", "waiting", "finished")
    print(f"\nsteps at the pictures {at}, seconds per picture {[round(wait, 1) for wait in waits]}, "
          f"without training {usual:.1f}")  # fmt: skip
    assert at[0] < settings["max_train_steps"], "the job was over before the first picture"
    assert webui.wait(job)["status"] == "finished"
    assert [np.array_equal(*pair) for pair in zip(drawn, expected)] == [True] * 10
    assert same(webui.lora(undisturbed), webui.lora(job))


@a1111_only
def test_settings_changed_meanwhile_do_not_change_the_training(webui, settings):
    settings |= {"max_train_steps": 24}
    stored = load_file(webui.data / "models" / "Stable-diffusion" / webui.checkpoints()[0].partition(" [")[0])
    (webui.data / "models" / "VAE").mkdir(exist_ok=True)
    vae = {name.removeprefix(VAE): tensor * 0.9 for name, tensor in stored.items() if name.startswith(VAE)}
    save_file(vae, webui.data / "models" / "VAE" / "dull.safetensors")
    webui.post("/sdapi/v1/refresh-vae")
    undisturbed = webui.submit(**settings, output_name="unchanged")
    webui.wait(undisturbed)
    picture = webui.generate("a red circle")
    changes = {
        "CLIP_stop_at_last_layers": 2, "sd_vae": "dull.safetensors", "token_merging_ratio": 0.5,
        "cross_attention_optimization": "sub-quadratic", "upcast_attn": True, "fp8_storage": "Enable",
    }  # fmt: skip
    shutil.rmtree(webui.data / "lora_trainer" / "cache", ignore_errors=True)
    job = webui.submit(**settings, output_name="changed")
    seen = {}
    for key, value in changes.items():
        if key == "fp8_storage":  # afterwards the WebUI's noise schedule is rounded to fp16
            assert np.array_equal(webui.generate("a red circle"), picture)
        old = webui.get("/sdapi/v1/options")[key]
        webui.post("/sdapi/v1/options", {key: value})
        webui.generate("a red circle")
        step = webui.job(job)["step"]
        seen[key] = webui.until(job, lambda job, step=step: job["step"] > step or job["status"] == "waiting")["status"]
        webui.post("/sdapi/v1/options", {key: old})
    assert webui.wait(job)["status"] == "finished"
    assert seen.pop("fp8_storage") == "waiting" and set(seen.values()) == {"running"}
    assert same(webui.lora(undisturbed), webui.lora(job))
    for title in webui.checkpoints()[1::-1]:  # a model that is loaded anew has the noise schedule of its file
        webui.select(title)
        webui.generate("noise")


def test_another_checkpoint_is_trained_and_the_former_one_comes_back(webui, settings):
    first, second = webui.checkpoints()[:2]
    webui.select(first)
    picture = webui.generate("a red circle")
    before = facts(webui)
    job = webui.submit(**settings, output_name="other", base_model=second)
    webui.until(job, lambda job: job["step"] >= 1)
    assert np.array_equal(webui.generate("a red circle"), picture), "pictures are drawn with what the user selected"
    done = webui.wait(job)
    assert done["status"] == "finished", done
    assert second.startswith(done["base_model"])
    # Drawn first: Forge widens its text encoder's embeddings for the first picture.
    assert np.array_equal(webui.generate("a red circle"), picture)
    after = facts(webui)
    assert after[0] == before[0] and after[2] == before[2]
    changed = {key for key in after[1] if after[1][key] != before[1].get(key)}
    assert not changed - {"sd_checkpoint_hash"}, changed


def test_reload_ui_in_the_middle_of_a_step_changes_nothing(webui, settings):
    settings |= {"max_train_steps": 20}
    undisturbed = webui.submit(**settings, output_name="quiet")
    webui.wait(undisturbed)
    picture, before = webui.generate("a red circle"), facts(webui)
    job = webui.submit(**settings, output_name="reloaded")
    webui.until(job, lambda job: job["step"] >= 2)
    webui.reload_ui()
    done = webui.wait(job)
    assert done["status"] == "finished" and done["attempt"] == 1
    assert same(webui.lora(undisturbed), webui.lora(job))
    assert facts(webui) == before
    assert np.array_equal(webui.generate("a red circle"), picture)
