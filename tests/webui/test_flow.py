"""Stable Diffusion 3 medium, and in Forge Chroma, in a real WebUI: small transformers of random weights, with the VAE
in its full size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import chroma, flux, sd3
from tests.tiny import clip_shapes, random_tensors
from tests.webui.server import FORGE, Server

FAMILIES = ["sd3", "chroma"] if FORGE else ["sd3"]
PICTURE = {"steps": 3, "width": 64, "height": 64}
TAKEN = "import sys; n = sys.modules['networks']; result = [len(one.modules) for one in n.loaded_networks]"
CLIP_L_LAYERS = 3  # its last but one is read
T5_WORDS = 32128
T5 = {"num_layers": 2, "d_model": flux.TEXT, "d_ff": 64, "num_heads": 4, "vocab_size": T5_WORDS}
FLUX = {
    "hidden_size": flux.WIDTH, "num_heads": flux.HEADS, "mlp_ratio": flux.HIDDEN / flux.WIDTH, "axes_dim": [4, 6, 6],
    "depth": 2, "depth_single_blocks": 2, "context_in_dim": flux.TEXT,
}  # fmt: skip
MAKER = {"guidance_out_dim": flux.WIDTH, "guidance_hidden_dim": chroma.MAKER, "guidance_n_layers": chroma.MAKER_LAYERS}

# The hosts take sizes for granted: of the text encoders, and Forge of FLUX.1's kin. A1111 fetches vocabularies.
SIZES = """
def sizes(width, layers):
    return dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=1, num_hidden_layers=layers)

clip_l, clip_g = sizes({clip_l}, {clip_l_layers}), sizes({clip_g}, {clip_g_layers})
"""
IN_A1111 = """
from types import SimpleNamespace
from tokenizers import Tokenizer, models, processors
from transformers import CLIPTokenizer, T5TokenizerFast
from modules.models.sd3 import other_impls, sd3_cond

sd3_cond.CLIPL_CONFIG.update(clip_l)
sd3_cond.CLIPG_CONFIG.update(clip_g)
clip = CLIPTokenizer.from_pretrained({vocabulary!r})
pieces = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)], unk_id=2))
pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
t5 = T5TokenizerFast(tokenizer_object=pieces)
for module in (other_impls, sd3_cond):
    module.CLIPTokenizer = SimpleNamespace(from_pretrained=lambda name: clip)
    module.T5TokenizerFast = SimpleNamespace(from_pretrained=lambda name: t5)
"""
IN_FORGE = """
import os
import backend.loader as loader
import huggingface_guess.detection as detection
from transformers import CLIPTextConfig

read_clip, read_any = CLIPTextConfig.from_pretrained, loader.read_arbitrary_config
detect = detection.detect_unet_config

def small_clip(folder):
    config = read_clip(folder)
    config.update(clip_g if os.path.basename(folder) == "text_encoder_2" else clip_l)
    return config

def small_t5(folder):
    return dict(read_any(folder), **({t5} if os.path.basename(folder).startswith("text_encoder") else {{}}))

def small_flux(*given):
    found = detect(*given)
    return dict(found, **{flux}) if found and found.get("image_model") == "flux" else found

detection.detect_unet_config = small_flux
loader.GuessChroma.unet_extra_config = {maker}
CLIPTextConfig.from_pretrained, loader.read_arbitrary_config = small_clip, small_t5
"""
POINTERS = """
import gc
from lora_trainer.models.families.flow.model import FlowModel
host = {t.untyped_storage().data_ptr() for _, t in tensors()}
models = [one for one in gc.get_objects() if isinstance(one, FlowModel)]
(model,) = [one for one in models if not next(one.unet.parameters()).is_meta]
copied = [n for n, p in model.bound().items() if not p.is_meta and p.untyped_storage().data_ptr() not in host]
result = {"bound": len(model.bound()), "copied": copied}
"""


def shapes(family: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Of the parts of an all-in-one file. SD 3 has T5 in Forge alone; neither WebUI reads it as it comes."""
    vae, t5 = flux.flux_vae_shapes(128), {**flux.t5_shapes(inner=flux.TEXT), "shared.weight": (T5_WORDS, flux.TEXT)}
    if family == "chroma":
        return {"sd3": chroma.transformer_shapes(), "vae": vae, "t5xxl": t5}
    return {
        "sd3": {**sd3.transformer_shapes(), "context_embedder.weight": (sd3.WIDTH, 4096)},
        "vae": vae,
        "clip_l": clip_shapes("", sd3.CLIP_L, CLIP_L_LAYERS),
        "clip_g": sd3.clip_g_shapes(),
        **({"t5xxl": t5} if FORGE else {}),
    }


def checkpoint(family: str) -> dict[str, torch.Tensor]:
    return {
        sd3.PREFIXES[part] + name: tensor
        for part, one in shapes(family).items()
        for name, tensor in random_tensors(one, 0, torch.float16).items()
    }


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    (folder / "models").mkdir()
    for family in FAMILIES:
        save_file(checkpoint(family), str(folder / "models" / f"{family}-small.safetensors"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LORA_TRAINER_WEBUI_MODELS", str(folder / "models"))
        server = Server(folder / "webui")
        server.prepare()
    script = server.data / "extensions" / "small-models" / "scripts" / "small_models.py"
    script.parent.mkdir(parents=True)
    script.write_text((SIZES + (IN_FORGE if FORGE else IN_A1111)).format(
        clip_l=sd3.CLIP_L, clip_l_layers=CLIP_L_LAYERS, clip_g=sd3.CLIP_G, clip_g_layers=sd3.CLIP_G_LAYERS, t5=T5,
        flux=FLUX, maker=MAKER, vocabulary=str(server.webui / "models" / "clip-tiny"),
    ), encoding="utf-8")  # fmt: skip
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_is_trained_on_what_is_loaded_and_the_webui_reads_it(webui, settings, family):
    (title,) = (one for one in webui.checkpoints() if one.startswith(family))
    webui.select(title)
    plain, before = webui.generate("a circle", **PICTURE), webui.sha()
    settings |= {
        "train_text_encoder": False, "resolution": "64", "learning_rate": 1e-2, "max_train_steps": 8,
        "preview_prompts": ["zwx, a red ellipse --w 64 --h 64 --s 2"], "preview_steps": 4,
    }  # fmt: skip
    job = webui.submit(**settings, base_model=title, output_name=family)
    assert webui.until(job, lambda job: job["step"] >= 2)["status"] == "running"
    found = webui.probe(POINTERS)
    assert found == {"bound": len(shapes(family)["sd3"]), "copied": []}
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain), "drawn with the weights as they were lent"
    done = webui.wait(job)
    assert done["status"] == "finished" and done["verified"] and done["thumbnail"], done
    assert webui.sha() == before
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain)
    with_lora = webui.generate(f"a circle <lora:{family}:1>", **PICTURE)
    assert not np.array_equal(with_lora, plain)
    layers = sum(".lora_up." in key for key in load_file(webui.lora(job)))
    assert layers and (FORGE or webui.probe(TAKEN) == [layers]), "verified says so in Forge"
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain), "taken out again"
    assert webui.sha() == before
