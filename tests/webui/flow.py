"""A real WebUI with small flow models: transformers of random weights, and the VAE in its full size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests import chroma, flux, sd3
from tests.tiny import Shapes, clip_shapes, random_tensors
from tests.webui.server import FORGE, Server

# Forge's automatic schedule divides 0 by 0 at the last step of a flow model.
PICTURE = {"steps": 3, "width": 64, "height": 64, **({"scheduler": "Simple"} if FORGE else {})}
TAKEN = "import sys; n = sys.modules['networks']; result = [len(one.modules) for one in n.loaded_networks]"
CLIP_L = 768 if FORGE else sd3.CLIP_L  # by which Forge knows its file
CLIP_L_LAYERS = 3  # its last but one is read
T5_WORDS = 32128
T5 = {"num_layers": 2, "d_model": flux.TEXT, "d_ff": 64, "num_heads": 4, "vocab_size": T5_WORDS}
FLUX = {
    "hidden_size": flux.WIDTH, "num_heads": flux.HEADS, "mlp_ratio": flux.HIDDEN / flux.WIDTH, "axes_dim": [4, 6, 6],
    "depth": 2, "depth_single_blocks": 2, "context_in_dim": flux.TEXT,
    "vec_in_dim": CLIP_L,
}  # fmt: skip
SD3_WIDTHS = {
    "context_embedder.weight": (sd3.WIDTH, 4096), "y_embedder.mlp.0.weight": (sd3.WIDTH, CLIP_L + sd3.CLIP_G),
}  # fmt: skip
FLUX_WIDTHS = {"vector_in.in_layer.weight": (flux.WIDTH, CLIP_L)}
TRANSFORMERS = {
    "sd3": sd3.transformer_shapes() | SD3_WIDTHS,
    # 3.5 medium is known by its table of positions, and has a second attention in its first 13 blocks.
    "sd35": sd3.transformer_shapes(dual=2, normalized=True) | SD3_WIDTHS | {"pos_embed": (1, 384 * 384, sd3.WIDTH)},
    "flux": flux.transformer_shapes() | FLUX_WIDTHS,
    "schnell": flux.transformer_shapes(guidance=False) | FLUX_WIDTHS,
    "chroma": chroma.transformer_shapes(),
}
MAKER = {"guidance_out_dim": flux.WIDTH, "guidance_hidden_dim": chroma.MAKER, "guidance_n_layers": chroma.MAKER_LAYERS}

# The hosts take sizes for granted: of the text encoders, and Forge of FLUX.1's kin. A1111 fetches vocabularies.
SIZES = """
def sizes(width, layers):
    heads = max(1, width // 64)
    return dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, num_hidden_layers=layers)

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


def shapes(family: str) -> dict[str, Shapes]:
    """Of the parts of a model, by their names in ``sd3.PREFIXES``. T5 is not in what A1111 reads as it comes."""
    t5 = {**flux.t5_shapes(inner=flux.TEXT), "shared.weight": (T5_WORDS, flux.TEXT)}
    return {
        "sd3": TRANSFORMERS[family],
        "vae": flux.flux_vae_shapes(128),
        **({"t5xxl": t5} if FORGE else {}),
        **({"clip_l": clip_shapes("", CLIP_L, CLIP_L_LAYERS)} if family != "chroma" else {}),
        **({"clip_g": sd3.clip_g_shapes()} if family.startswith("sd3") else {}),
    }


def weights(family: str, *, dtype: torch.dtype = torch.float16) -> dict[str, dict[str, torch.Tensor]]:
    """By part. dtype: of the transformer."""
    return {
        part: random_tensors(one, 0, dtype if part == "sd3" else torch.float16) for part, one in shapes(family).items()
    }


def whole(family: str, parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As one file has them."""
    prefixes = sd3.PREFIXES if family.startswith("sd3") else sd3.PREFIXES | {"vae": "vae."}
    return {prefixes[part] + name: tensor for part, one in parts.items() for name, tensor in one.items()}


@contextmanager
def flow_webui(folder: Path, models: Path, *flags: str) -> Iterator[Server]:
    """models: folder of the checkpoints."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LORA_TRAINER_WEBUI_MODELS", str(models))
        server = Server(folder, *flags)
        server.prepare()
    script = server.data / "extensions" / "small-models" / "scripts" / "small_models.py"
    script.parent.mkdir(parents=True)
    script.write_text((SIZES + (IN_FORGE if FORGE else IN_A1111)).format(
        clip_l=CLIP_L, clip_l_layers=CLIP_L_LAYERS, clip_g=sd3.CLIP_G, clip_g_layers=sd3.CLIP_G_LAYERS, t5=T5,
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
