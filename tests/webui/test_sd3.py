"""Stable Diffusion 3 medium in a real A1111: a small transformer of random weights, with the VAE in its full size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import sd3
from tests.flux import flux_vae_shapes
from tests.tiny import clip_shapes, random_tensors
from tests.webui.server import OVER, Server, a1111_only

pytestmark = a1111_only

PICTURE = {"steps": 3, "width": 64, "height": 64}
TAKEN = "import sys; n = sys.modules['networks']; result = [len(one.modules) for one in n.loaded_networks]"
CLIP_L_LAYERS = 3  # its last but one is read

# A1111 takes the sizes of the text encoders for granted, and fetches their vocabularies.
SMALL = """
from types import SimpleNamespace
from tokenizers import Tokenizer, models, processors
from transformers import CLIPTokenizer, T5TokenizerFast
from modules.models.sd3 import other_impls, sd3_cond

def sizes(width, layers):
    return dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=1, num_hidden_layers=layers)

sd3_cond.CLIPL_CONFIG.update(sizes({clip_l}, {clip_l_layers}))
sd3_cond.CLIPG_CONFIG.update(sizes({clip_g}, {clip_g_layers}))
clip = CLIPTokenizer.from_pretrained({vocabulary!r})
pieces = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)], unk_id=2))
pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
t5 = T5TokenizerFast(tokenizer_object=pieces)
for module in (other_impls, sd3_cond):
    module.CLIPTokenizer = SimpleNamespace(from_pretrained=lambda name: clip)
    module.T5TokenizerFast = SimpleNamespace(from_pretrained=lambda name: t5)
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
TRANSFORMER = {**sd3.transformer_shapes(), "context_embedder.weight": (sd3.WIDTH, 4096)}


def checkpoint() -> dict[str, torch.Tensor]:
    """An all-in-one file without T5, which A1111 does not read as it comes."""
    shapes = {
        "sd3": TRANSFORMER, "vae": flux_vae_shapes(128), "clip_l": clip_shapes("", sd3.CLIP_L, CLIP_L_LAYERS),
        "clip_g": sd3.clip_g_shapes(),
    }  # fmt: skip
    return {
        sd3.PREFIXES[part] + name: tensor
        for part, one in shapes.items()
        for name, tensor in random_tensors(one, 0, torch.float16).items()
    }


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    (folder / "models").mkdir()
    save_file(checkpoint(), str(folder / "models" / "sd3-small.safetensors"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LORA_TRAINER_WEBUI_MODELS", str(folder / "models"))
        server = Server(folder / "webui")
        server.prepare()
    script = server.data / "extensions" / "small-models" / "scripts" / "small_models.py"
    script.parent.mkdir(parents=True)
    script.write_text(SMALL.format(
        clip_l=sd3.CLIP_L, clip_l_layers=CLIP_L_LAYERS, clip_g=sd3.CLIP_G, clip_g_layers=sd3.CLIP_G_LAYERS,
        vocabulary=str(server.webui / "models" / "clip-tiny"),
    ), encoding="utf-8")  # fmt: skip
    try:
        server.start()
        yield server
    finally:
        server.kill()


def test_a_lora_is_trained_on_what_is_loaded_and_the_webui_reads_it(webui, settings):
    plain, before = webui.generate("a circle", **PICTURE), webui.sha()
    settings |= {
        "train_text_encoder": False, "resolution": "64", "learning_rate": 1e-2, "max_train_steps": 8,
        "preview_prompts": ["zwx, a red ellipse --w 64 --h 64 --s 2"], "preview_steps": 4,
    }  # fmt: skip
    job = webui.submit(**settings, output_name="sd3")
    assert webui.until(job, lambda job: job["step"] >= 2 or job["status"] in OVER)["status"] == "running"
    found = webui.probe(POINTERS)
    assert found == {"bound": len(TRANSFORMER), "copied": []}
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain), "drawn with the weights as they were lent"
    done = webui.wait(job)
    assert done["status"] == "finished" and done["verified"] and done["thumbnail"], done
    assert webui.sha() == before
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain)
    with_lora = webui.generate("a circle <lora:sd3:1>", **PICTURE)
    assert not np.array_equal(with_lora, plain)
    layers = sum(".lora_up." in key for key in load_file(webui.lora(job)))
    assert layers and webui.probe(TAKEN) == [layers]
    assert np.array_equal(webui.generate("a circle", **PICTURE), plain), "taken out again"
    assert webui.sha() == before
