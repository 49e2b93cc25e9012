"""Forge's own traps: inference tensors, caches by file name, renamed files, number formats."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.webui.server import forge_only

pytestmark = forge_only

OVERWRITES = 20
SMALL = {"steps": 1, "cfg_scale": 1, "width": 64, "height": 64}
PUBLISH = """
from pathlib import Path
from lora_trainer.host.base import Card
from lora_trainer.host.select import current_host
current_host().publish(Path({path!r}), {name!r}, Card(), overwrite=True)
result = True
"""
KINDS = """
import gc
from lora_trainer.models.families.unet.model import DiffusionModel
models = [o for o in gc.get_objects() if type(o) is DiffusionModel and not o.unet.conv_in.weight.is_meta]
bound = [p for p in models[0].bound().values() if not p.is_meta]
result = {"bound": len(bound), "inference": sum(p.is_inference() for p in bound),
          "host's": sum(t.is_inference() for _, t in tensors())}
"""


def test_aliases_are_no_inference_tensors(webui, settings):
    job = webui.submit(**settings | {"max_train_steps": 60}, output_name="aliases")
    webui.until(job, lambda job: job["step"] >= 1 or job["status"] == "failed")
    found = webui.probe(KINDS)
    webui.command(job, "stop")
    assert webui.wait(job)["status"] == "stopped"
    print(f"\n{found}")
    assert found["inference"] == 0 and found["bound"] > 400 and found["host's"] > 400


def versions(trained: Path, folder: Path) -> list[Path]:
    """LoRAs for the same layers, of falling rank: files of different lengths."""
    trained_tensors = load_file(trained)
    names = sorted({key.partition(".")[0] for key in trained_tensors if "attn1_to_q.lora_up" in key})
    paths = []
    for index in range(OVERWRITES):
        generator, rank = torch.Generator().manual_seed(index), 8 - index % 7
        tensors = {}
        for name in names:
            up, down = (trained_tensors[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
            tensors[f"{name}.lora_up.weight"] = torch.randn(up.shape[0], rank, generator=generator) * 0.3
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, down.shape[1], generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
        paths.append(folder / f"version-{index}.safetensors")
        save_file(tensors, paths[-1], {"ss_base_model_version": "sd_v1"})
    return paths


def test_an_overwritten_lora_shows_its_newest_weights_every_time(webui, settings, tmp_path):
    """Against the same file under a name of its own, which nothing can have cached."""
    job = webui.submit(**settings, output_name="trained")
    assert webui.wait(job)["status"] == "finished"
    seen = set()
    for index, path in enumerate(versions(webui.lora(job), tmp_path)):
        # Somebody draws with the old weights while they are replaced.
        drawing = threading.Thread(target=webui.generate, args=("a circle <lora:again:1>",), kwargs=SMALL)
        if index:
            drawing.start()
        webui.probe(PUBLISH.format(path=str(path), name="again"))
        if index:
            drawing.join(300)
        webui.probe(PUBLISH.format(path=str(path), name=f"once-{index}"))
        picture = webui.generate("a circle <lora:again:1>", **SMALL)
        assert np.array_equal(picture, webui.generate(f"a circle <lora:once-{index}:1>", **SMALL)), f"version {index}"
        seen.add(picture.tobytes())
    assert len(seen) == OVERWRITES
    assert webui.process.poll() is None


def test_damaged_files_keep_their_names(webui, settings, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x40\0\0\0\0\0\0\0{damaged")
    for setting in ("init_lora", "vae", "base_model"):
        try:
            done = webui.wait(webui.submit(**settings | {setting: str(damaged)}, output_name=f"with-{setting}"))
            assert done["status"] == "failed" and done["error"]["remedy"], done
        except RuntimeError as refused:
            assert "40" in str(refused) or "422" in str(refused)
    assert damaged.exists() and not list(tmp_path.glob("*.corrupted")) and not list(webui.data.rglob("*.corrupted"))


def test_weights_in_low_bits_are_refused_with_the_option_to_change(webui, settings):
    picture = webui.generate("a circle", **SMALL)
    for choice in ("bnb-nf4", "float8-e4m3fn"):
        webui.post("/sdapi/v1/options", {"forge_unet_storage_dtype": choice})
        try:
            with pytest.raises(RuntimeError, match="Diffusion in Low Bits"):
                webui.submit(**settings, output_name=choice)
        finally:
            webui.post("/sdapi/v1/options", {"forge_unet_storage_dtype": "Automatic"})
    assert np.array_equal(webui.generate("a circle", **SMALL), picture)


LOW_BITS = """
from modules_forge import main_entry
shared.opts.data["forge_unet_storage_dtype"] = {choice!r}
main_entry.refresh_model_loading_parameters()
result = None
"""


@pytest.mark.parametrize("way", ["chosen again", "switched back"])
def test_a_run_that_waits_for_another_format_goes_on_without_a_picture(webui, settings, way):
    job = webui.submit(**settings | {"max_train_steps": 400}, output_name=f"waits, {way}")
    try:
        webui.until(job, lambda job: job["step"] >= 2)
        webui.probe(LOW_BITS.format(choice="float8-e4m3fn"))
        webui.generate("a circle", **SMALL)
        waiting = webui.until(job, lambda job: job["status"] == "waiting")
        assert "Diffusion in Low Bits" in waiting["phase"] and waiting["switches_back"]
        if way == "chosen again":
            webui.probe(LOW_BITS.format(choice="Automatic"))
        else:
            webui.post(f"/lora-trainer/v1/jobs/{job}/switch-back")
        going = webui.until(job, lambda one: one["status"] == "running" and one["step"] > waiting["step"])
        assert not going["switches_back"]
        assert webui.get("/sdapi/v1/options")["forge_unet_storage_dtype"] == "Automatic"
    finally:
        webui.probe(LOW_BITS.format(choice="Automatic"))
        webui.command(job, "stop")
        webui.wait(job)
