"""Stable Diffusion 3 medium, and in Forge 3.5 medium, FLUX.1 dev and Chroma, in a real WebUI: small transformers of
random weights, with the VAE in its full size."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import chroma, flux, sd3
from tests.tiny import clip_shapes, random_tensors
from tests.webui.server import FORGE, OVER, Server

FAMILIES = ["sd3", "sd35", "flux", "chroma"] if FORGE else ["sd3"]
# Forge's automatic schedule divides 0 by 0 at the last step of a flow model.
PICTURE = {"steps": 3, "width": 64, "height": 64, **({"scheduler": "Simple"} if FORGE else {})}
TAKEN = "import sys; n = sys.modules['networks']; result = [len(one.modules) for one in n.loaded_networks]"
CLIP_L_LAYERS = 3  # its last but one is read
T5_WORDS = 32128
T5 = {"num_layers": 2, "d_model": flux.TEXT, "d_ff": 64, "num_heads": 4, "vocab_size": T5_WORDS}
FLUX = {
    "hidden_size": flux.WIDTH, "num_heads": flux.HEADS, "mlp_ratio": flux.HIDDEN / flux.WIDTH, "axes_dim": [4, 6, 6],
    "depth": 2, "depth_single_blocks": 2, "context_in_dim": flux.TEXT,
    "vec_in_dim": sd3.CLIP_L,
}  # fmt: skip
T5_WIDTH = {"context_embedder.weight": (sd3.WIDTH, 4096)}
TRANSFORMERS = {
    "sd3": sd3.transformer_shapes() | T5_WIDTH,
    # 3.5 medium is known by its table of positions, and has a second attention in its first 13 blocks.
    "sd35": sd3.transformer_shapes(dual=2, normalized=True) | T5_WIDTH | {"pos_embed": (1, 384 * 384, sd3.WIDTH)},
    "flux": flux.transformer_shapes() | {"vector_in.in_layer.weight": (flux.WIDTH, sd3.CLIP_L)},
    "chroma": chroma.transformer_shapes(),
}
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
from transformers import CLIPTextConfig, T5TokenizerFast

read_clip, read_any = CLIPTextConfig.from_pretrained, loader.read_arbitrary_config
detect = detection.detect_unet_config

def small_clip(folder):
    config = read_clip(folder)
    config.update(clip_g if os.path.basename(folder) == "text_encoder_2" else clip_l)
    return config

def small_t5(folder):
    return dict(read_any(folder), **({t5} if os.path.basename(folder).startswith("text_encoder") else {{}}))

def t5_tokenizer(folder):  # without sentencepiece, of which newer ones do not go with Forge's protobuf
    return T5TokenizerFast(tokenizer_file=os.path.join(folder, "tokenizer.json"), name_or_path=folder)

def small_flux(*given):
    found = detect(*given)
    return dict(found, **{flux}) if found and found.get("image_model") == "flux" else found

detection.detect_unet_config = small_flux
loader.GuessChroma.unet_extra_config = {maker}
CLIPTextConfig.from_pretrained, loader.read_arbitrary_config = small_clip, small_t5
T5TokenizerFast.from_pretrained = t5_tokenizer
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
    """Of an all-in-one file, by the prefix of the part. T5 is not in what A1111 reads as it comes."""
    t5 = {**flux.t5_shapes(inner=flux.TEXT), "shared.weight": (T5_WORDS, flux.TEXT)}
    clip_l = clip_shapes("", sd3.CLIP_L, CLIP_L_LAYERS)
    parts = {
        "sd3": TRANSFORMERS[family],
        "vae": flux.flux_vae_shapes(128),
        **({"t5xxl": t5} if FORGE else {}),
        **({"clip_l": clip_l} if family != "chroma" else {}),
        **({"clip_g": sd3.clip_g_shapes()} if family.startswith("sd3") else {}),
    }
    prefixes = sd3.PREFIXES if family.startswith("sd3") else sd3.PREFIXES | {"vae": "vae."}
    return {prefixes[part]: one for part, one in parts.items()}


def checkpoint(family: str) -> dict[str, torch.Tensor]:
    return {
        prefix + name: tensor
        for prefix, one in shapes(family).items()
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


def taken(webui: Server, name: str) -> tuple[int, int]:
    """Layers of the LoRA that the last picture was drawn with, and those that the WebUI left out."""
    if not FORGE:
        (layers,) = webui.probe(TAKEN)
        return layers, 0
    said = re.findall(rf"{name}\.safetensors for KModel-UNet with (\d+) keys .*skipped (\d+) keys", webui.tail())
    return tuple(map(int, said[-1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_is_trained_on_what_is_loaded_and_the_webui_reads_it(webui, settings, family):
    (title,) = (one for one in webui.checkpoints() if one.startswith(f"{family}-"))
    webui.select(title)
    plain, before = webui.generate("a circle", **PICTURE), webui.sha()
    assert plain.std() > 0, "NaN is drawn as black"
    settings |= {
        "train_text_encoder": False, "resolution": "64", "max_train_steps": 150,
        "preview_prompts": ["zwx, a red ellipse --w 64 --h 64 --s 2"], "preview_steps": 150,
    }  # fmt: skip
    job = webui.submit(**settings, base_model=title, output_name=family)
    found = webui.until(job, lambda job: job["step"] >= 2 or job["status"] in OVER)
    assert found["status"] == "running", found
    assert webui.probe(POINTERS) == {"bound": len(TRANSFORMERS[family]), "copied": []}
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain), "drawn with the weights as they were lent"
    assert webui.job(job)["status"] == "running"
    done = webui.wait(job)
    assert done["status"] == "finished" and done["verified"] and done["thumbnail"], done
    previews = [np.asarray(Image.open(one)) for one in sorted(webui.lora(job).parent.rglob("*.png"))]
    assert previews and all(one.std() > 0 for one in previews)
    assert webui.sha() == before
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain)
    with_lora = webui.generate(f"a circle <lora:{family}:1>", **PICTURE)
    assert with_lora.std() > 0 and not np.array_equal(with_lora, plain)
    layers = sum(".lora_up." in key for key in load_file(webui.lora(job)))
    assert layers and taken(webui, family) == (layers, 0)
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain), "taken out again"
    assert webui.sha() == before
