"""Flow models in the number formats that Forge keeps them in: a run with every disturbance there, down to the bits.

On a CPU Forge computes in fp32 whatever the format is.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import gguf
from tests.webui.flow import PICTURE, POINTERS, TRANSFORMERS, flow_webui, taken, weights, whole
from tests.webui.server import OVER, forge_only
from tests.webui.test_borrowing import options, same  # noqa: F401 - a fixture
from tests.webui.test_runs import by_command_line, difference

pytestmark = forge_only

FAMILIES = ("sd35", "flux", "chroma")
# As Forge's page does: its API leaves out what else an option stands for.
CHOOSE = """
from modules_forge import main_entry
shared.opts.data.update({options})
main_entry.refresh_model_loading_parameters()
result = None
"""
STORAGE = """
unet = shared.sd_model.forge_objects_original.unet.model
kinds = {str(getattr(p, "gguf_cls", None) or p.dtype) for n, p in unet.diffusion_model.named_parameters()
         if "blocks" in n and n.endswith("weight") and len(p.shape) == 2}
result = [str(unet.storage_dtype), sorted(kinds)]
"""
LOW_BITS = {"fp8": "float8-e4m3fn", "e5m2": "float8-e5m2", "scaled": "float8-e4m3fn (fp16 LoRA)"}
T5_STORAGE = """
t5 = shared.sd_model.forge_objects_original.clip.cond_stage_model.t5xxl
weight = t5.transformer.encoder.block[0].layer[1].DenseReluDense.wo.weight
result = str(getattr(weight, "gguf_cls", None) or weight.dtype)
"""
T5_KEPT = {"fp8": "torch.float8_e4m3fn", "scaled": "torch.float16", "gguf": "<class 'gguf.quants.Q8_0'>"}
KEPT = {
    "bf16": ["torch.bfloat16", ["torch.bfloat16"]],
    "fp8": ["torch.float8_e4m3fn", ["torch.float8_e4m3fn"]],
    "scaled": ["torch.float8_e4m3fn", ["torch.float8_e4m3fn"]],
    "e5m2": ["torch.float8_e5m2", ["torch.float8_e5m2"]],
    "q8_0": ["gguf", ["<class 'gguf.quants.Q8_0'>"]],
}
FORMS = [(family, form) for family in FAMILIES for form in ("bf16", "fp8", "q8_0")]
FORMS += [("flux", "e5m2"), ("flux", "scaled")]
STEPS = 60
T5_TOKENIZER = "backend/huggingface/black-forest-labs/FLUX.1-dev/tokenizer_2/tokenizer.json"


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    """Each model in bf16 with all its parts, and its transformer in Q8_0 with the other parts beside it."""
    folder = tmp_path_factory.mktemp("formats")
    models, added = folder / "models", folder / "added"
    models.mkdir()
    added.mkdir()
    for family in FAMILIES:
        parts = weights(family, dtype=torch.bfloat16)
        save_file(whole(family, parts), str(models / f"{family}-bf16.safetensors"))
        transformer = parts.pop("sd3")
        stored = {name: gguf.stored_as_published(name, tensor) for name, tensor in transformer.items()}
        gguf.write(models / f"{family}-q8_0.gguf", stored)
        if family == "flux":
            save_file(whole(family, parts | {"sd3": scaled(transformer)}), str(models / "flux-scaled.safetensors"))
            gguf.write(models / f"{family}-mixed.gguf", gguf.stored_in_all_formats(transformer))
        if family == "sd35":  # Forge knows CLIP G's file by its real width, and takes all from a model's without one
            parts = {"all": whole(family, parts)}
        for part, tensors in parts.items():
            save_file(tensors, str(added / f"{family}-{part}.safetensors"))
    write_t5s(added, weights("flux")["t5xxl"])
    shutil.copyfile(Path(os.environ["LORA_TRAINER_WEBUI"], T5_TOKENIZER), models / "tokenizer.json")
    with flow_webui(folder / "webui", models, "--unet-in-bf16") as server:
        server.added = added
        yield server


def scaled(transformer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ComfyUI's scaled fp8: a number for each matrix."""
    stored = dict(transformer)
    for name in [name for name, weight in transformer.items() if weight.dim() == 2]:
        scale = transformer[name].float().abs().max() / 448
        stored[name] = (transformer[name].float() / scale).to(torch.float8_e4m3fn)
        stored[name.replace("weight", "scale_weight")] = scale.reshape(1)
    return stored


def write_t5s(folder: Path, t5: dict[str, torch.Tensor]) -> None:
    """In fp8, scaled fp8 and GGUF, under the names that published ones have, and for each the fp16 weights that are
    meant."""
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in t5.items()}
    save_file(eight, str(folder / "t5-fp8.safetensors"))
    save_file({name: tensor.half() for name, tensor in eight.items()}, str(folder / "t5-fp8-dense.safetensors"))
    # Scales are powers of two, by which nothing is rounded. Most tensors are fp32, for which Forge keeps all in fp16.
    some = {name for name, tensor in t5.items() if tensor.dim() == 2 and "block" in name and "bias" not in name}
    fewer = {name: tensor.to(torch.float8_e4m3fn) if name in some else tensor.float() for name, tensor in t5.items()}
    fewer |= {name.replace("weight", "scale_weight"): torch.tensor([0.5]) for name in some}
    save_file(fewer, str(folder / "t5-scaled.safetensors"))
    dense = {name: fewer[name].half() * (0.5 if name in some else 1) for name in t5}
    save_file(dense, str(folder / "t5-scaled-dense.safetensors"))
    # Forge multiplies in fp16, and takes the words for quantized, whatever they are.
    dense = gguf.write_t5(folder / "t5-gguf.gguf", t5, scales=torch.float16)
    save_file(dense, str(folder / "t5-gguf-dense.safetensors"))


def choose(webui, family: str, form: str, low_bits: str = "Automatic", t5: str = "") -> str:
    """Select the model in a format as a person does, and return its title.

    low_bits: the option of Forge for bf16 and GGUF. t5: what the name of another T5 begins with.
    """
    file = "bf16" if form in ("fp8", "e5m2") else form
    (title,) = (one for one in webui.checkpoints() if one.startswith(f"{family}-{file}"))
    beside = sorted(map(str, webui.added.glob(f"{family}-*"))) if file in ("q8_0", "mixed") else []
    beside += map(str, webui.added.glob(f"{t5}.*")) if t5 else []
    low_bits = LOW_BITS.get(form, low_bits)
    webui.probe(CHOOSE.format(
        options={"sd_model_checkpoint": title, "forge_additional_modules": beside, "forge_unet_storage_dtype": low_bits}
    ))  # fmt: skip
    return title


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_a_run_that_is_stopped_and_goes_on_ends_as_one_alone(webui, settings, family, form):
    title = choose(webui, family, form)
    plain, before = webui.generate("a circle", **PICTURE), webui.sha()
    assert plain.std() > 0, "NaN is drawn as black"
    assert webui.probe(STORAGE) == KEPT[form]
    settings |= {"train_text_encoder": False, "max_train_steps": STEPS, "base_model": title}
    twin = webui.submit(**settings, output_name=f"{family}-{form}-alone")
    assert webui.wait(twin)["status"] == "finished"

    job = webui.submit(**settings, output_name=f"{family}-{form}")
    found = webui.until(job, lambda job: job["step"] >= 2 or job["status"] in OVER)
    assert found["status"] == "running", found
    assert webui.probe(POINTERS) == {"bound": len(TRANSFORMERS[family]), "copied": []}
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain), "drawn with the weights as they were lent"
    webui.command(job, "stop-and-save")
    stopped = webui.wait(job)
    assert stopped["status"] == "stopped" and 2 <= stopped["step"] < STEPS, stopped
    assert webui.sha() == before
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain)
    webui.command(job, "resume")
    done = webui.wait(job)
    assert done["status"] == "finished" and done["verified"] and done["attempt"] == 2, done
    points = webui.get(f"/lora-trainer/v1/jobs/{job}/metrics")["points"]
    assert [point["step"] for point in points] == list(range(1, STEPS + 1))
    assert same(webui.lora(twin), webui.lora(job))

    assert webui.sha() == before
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain)
    with_lora = webui.generate(f"a circle <lora:{family}-{form}:1>", **PICTURE)
    assert with_lora.std() > 0 and not np.array_equal(with_lora, plain)
    layers = sum(".lora_up." in key for key in load_file(webui.lora(job)))
    assert layers and taken(webui, f"{family}-{form}") == (layers, 0)
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain), "taken out again"
    assert webui.sha() == before


@pytest.mark.parametrize("form", list(T5_KEPT))
def test_a_t5_in_fewer_bits_reads_as_the_weights_that_are_meant(webui, settings, form):
    settings |= {"train_text_encoder": False}
    loras = []
    for t5 in (f"t5-{form}-dense", f"t5-{form}"):
        title = choose(webui, "flux", "bf16", t5=t5)
        plain, before = webui.generate("a circle", **PICTURE), webui.sha()
        job = webui.submit(**settings, base_model=title, output_name=t5)
        done = webui.wait(job)
        assert done["status"] == "finished" and done["verified"], done
        loras.append(webui.lora(job))
        assert webui.sha() == before
        assert np.array_equal(webui.generate("a circle", **PICTURE), plain)
    assert webui.probe(T5_STORAGE) == T5_KEPT[form]
    assert same(*loras)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_line_makes_the_same_lora(webui, settings, options, tmp_path, family):  # noqa: F811
    title = choose(webui, family, "bf16")
    base = webui.data / "models" / "Stable-diffusion" / title.partition(" [")[0]
    if family == "sd35":  # Forge reads it otherwise as it comes
        options(CLIP_stop_at_last_layers=2)
        base = tmp_path / "without-t5.safetensors"
        parts = weights(family, dtype=torch.bfloat16)
        save_file(whole(family, {part: one for part, one in parts.items() if part != "t5xxl"}), str(base))
    settings |= {"train_text_encoder": False, "learning_rate": 1e-4, "base_model": title}
    job = webui.submit(**settings, output_name=f"{family}-inside")
    assert webui.wait(job)["status"] == "finished"
    for python in (webui.python, sys.executable):
        apart = difference(webui.lora(job), by_command_line(webui, python, settings, base, tmp_path / "out"))
        print(f"\n{title} against the command line with {python}: {apart:.2e}")
        assert apart <= (0 if python == webui.python else 1e-5)


def test_of_formats_of_gguf_that_forge_cannot_write_previews_are_drawn_nevertheless(webui, settings):
    title = choose(webui, "flux", "mixed")
    plain, before = webui.generate("a circle", **PICTURE), webui.sha()
    storage, kinds = webui.probe(STORAGE)
    assert (storage, plain.std() > 0) == ("gguf", True)
    assert [kind.partition("quants.")[2].rstrip("'>") for kind in kinds] == sorted(gguf.KINDS)
    settings |= {"train_text_encoder": False, "max_train_steps": STEPS, "base_model": title}
    twin = webui.submit(**settings, output_name="mixed-alone")
    assert webui.wait(twin)["status"] == "finished"
    seen = {"preview_prompts": ["zwx, a red ellipse --w 64 --h 64 --s 2"], "preview_steps": STEPS // 2}
    job = webui.submit(**settings | seen, output_name="mixed")
    found = webui.until(job, lambda job: job["step"] >= 2 or job["status"] in OVER)
    assert found["status"] == "running", found
    assert webui.probe(POINTERS) == {"bound": len(TRANSFORMERS["flux"]), "copied": []}
    with pytest.raises(RuntimeError, match="Low bit LoRA"):
        webui.generate("a circle <lora:mixed-alone:1>", **PICTURE)
    done = webui.wait(job)
    assert done["status"] == "finished" and done["thumbnail"], done
    (warning,) = done["warnings"]
    assert "Automatic (fp16 LoRA)" in warning["message"]
    assert same(webui.lora(twin), webui.lora(job))
    assert webui.sha() == before
    choose(webui, "flux", "mixed", low_bits="Automatic (fp16 LoRA)")
    with_lora = webui.generate("a circle <lora:mixed:1>", **PICTURE)
    assert with_lora.std() > 0 and not np.array_equal(with_lora, plain)
    again = webui.submit(**settings, output_name="mixed-online")
    done = webui.wait(again)
    assert done["status"] == "finished" and done["verified"] and not done["warnings"], done
    assert same(webui.lora(twin), webui.lora(again))
    assert np.array_equal(webui.generate("a circle <lora:mixed:1>", **PICTURE), with_lora)
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain)
    assert webui.sha() == before


def test_nf4_is_refused_with_the_option_to_change(webui, settings):
    title = choose(webui, "flux", "bf16", low_bits="bnb-nf4")
    with pytest.raises(RuntimeError, match=r"nf4.*Diffusion in Low Bits"):
        webui.submit(**settings, base_model=title, output_name="nf4")
    choose(webui, "flux", "bf16")
