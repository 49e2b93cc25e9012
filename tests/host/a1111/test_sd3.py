"""Stable Diffusion 3 medium as A1111 keeps it; 3.5, which it does not load, is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from torch import nn

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.host.a1111.model import HostModel
from lora_trainer.host.a1111.residence import Residence
from lora_trainer.host.drawing import _guidance, _schedule
from lora_trainer.models.base import Conditioning, ModelAwayError
from lora_trainer.models.tokenizer import load_tokenizer
from tests import sd3 as tiny
from tests.host.a1111.fake import Info, module_tree
from tests.host.conftest import OPTIONS, storages
from tests.models.test_flux import lend

LATENTS, SIGMAS = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.6])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny.tiny_sd3(tmp_path_factory.mktemp("sd3"))


class Model(nn.Module):
    """An SD3Inferencer."""

    def __init__(self, files, t5: bool):
        super().__init__()
        weights = load_file(files["base_model"])
        positions = weights.pop("pos_embed")
        self.model = module_tree({f"diffusion_model.{name}": tensor for name, tensor in weights.items()})
        self.model.diffusion_model.register_buffer("pos_embed", positions)  # as A1111's module has it
        self.model.conditioning_key = "crossattn"
        self.first_stage_model = module_tree(load_file(files["vae"]))
        clip_g, clip_l, encoder = map(load_file, files["text_encoders"])
        encoder["encoder.embed_tokens.weight"] = encoder.pop("shared.weight")
        named = {"clip_l": {**clip_l, "text_projection.weight": torch.eye(tiny.CLIP_L)}, "clip_g": clip_g,
                 "t5xxl": encoder}  # fmt: skip
        parts = {f"{part}.transformer.{name}": tensor for part, one in named.items() for name, tensor in one.items()
                 if t5 or part != "t5xxl"}  # fmt: skip
        parts |= {f"{part}.logit_scale": torch.tensor(4.6) for part in ("clip_l", "clip_g")}
        self.text_encoders = module_tree(parts)
        if not t5:
            self.text_encoders.t5xxl = None
        fast = FastTokenizer.from_file(str(Path(files["base_model"]).parent / "tokenizer.json"))
        self.text_encoders.model_lg = SimpleNamespace(tokenizer=load_tokenizer()._source)
        self.text_encoders.model_t5 = SimpleNamespace(tokenizer=SimpleNamespace(backend_tokenizer=fast))
        self.is_sd3, self.lowvram, self.parameterization = True, False, "eps"
        self.alphas_cumprod_original = self.alphas_cumprod = torch.ones(1000)
        self.network_layer_mapping: dict = {}

    @property
    def cond_stage_model(self) -> nn.Module:
        return self.text_encoders


@pytest.fixture
def load(files, webui):
    def loaded(t5: bool = False):
        whole = tiny.tiny_sd3(Path(files["base_model"]).parent / "whole", t5=False, whole=True)
        info = Info(Path(whole["base_model"]))
        webui.sd_models.checkpoints_list[info.title] = info
        model = Model(files, t5)
        webui._build = lambda tensors, info: model
        model.sd_checkpoint_info = info
        webui.shared.opts.data["sd3_enable_t5"] = t5
        webui.select("sd3")
        return model

    return loaded


@pytest.mark.parametrize("t5", [False, True])
def test_it_is_trained_as_it_lies_and_is_the_files_model(load, a1111, files, t5):
    theirs = load(t5)
    lender = a1111.lender("", OPTIONS)
    assert lender.describe().family == "sd3" and lender.describe().prediction_type == "flow"
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    with lend(files).borrow() as one, torch.no_grad():
        told = one.encode_prompts(["a red circle"])
        length = torch.zeros(1, 77, told.extra["t5"].shape[-1])
    with lender.borrow() as model, lender.turn():
        bound = model.bound()
        assert storages(bound.values()) <= storages(theirs.state_dict().values()), "no copy"
        assert "unet.pos_embed" in bound and any(name.startswith("text_encoder_3.") for name in bound) == t5
        ours = model.encode_prompts(["a red circle"])
        assert torch.equal(ours.context, told.context) and torch.equal(ours.pooled, told.pooled)
        assert ours.extra["t5"].shape == length.shape if t5 else not ours.extra
        assert model.encode_prompts([""]).context.any()
        predicted = model.predict(LATENTS, SIGMAS, ours, None)
        adapters = AdapterSet.build(model.lora_targets(), from_mapping({"base_model": "x", "train_data_dir": "x"}))
        with adapters:
            model.predict(LATENTS, SIGMAS, ours, None).square().sum().backward()
        assert sum(bool(adapter.lora_up.grad.any()) for _, adapter in adapters.items()) > 10
    with lend(files).borrow() as one, torch.no_grad():
        same = Conditioning(told.context, told.pooled, {"t5": ours.extra.get("t5", length)})
        torch.testing.assert_close(predicted.detach(), one.predict(LATENTS, SIGMAS, same, None), atol=1e-5, rtol=1e-5)
    after = theirs.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert _guidance(theirs, None) == {"cfg_scale": 4.5} and _schedule(theirs) == "Automatic"


def test_a_t5_is_read_where_the_setting_was_on_when_it_began(load, a1111, webui):
    theirs, data = load(t5=True), webui.shared.opts.data
    data["sd3_enable_t5"] = False
    with a1111.lender("", OPTIONS).borrow() as model:
        assert not any(name.startswith("text_encoder_3.") for name in model.bound()), "A1111 has zeros for it"
    data["sd3_enable_t5"] = True
    lender = a1111.lender("", OPTIONS)
    with lender.borrow() as model:
        data["sd3_enable_t5"] = False
        with lender.turn(), torch.no_grad():
            assert "t5" in model.encode_prompts(["a red circle"]).extra
        encoder, theirs.text_encoders.t5xxl = theirs.text_encoders.t5xxl, None  # it was loaded again
        with pytest.raises(ModelAwayError, match="without T5") as away, lender.turn():
            pass
        assert away.value.returns and "Enable T5" in away.value.reason
        theirs.text_encoders.t5xxl = encoder
        with lender.turn():
            model.release("text_encoders")
        theirs.text_encoders.t5xxl = None
        with lender.turn():
            assert model.predict  # encoded texts need no encoder
        theirs.text_encoders.t5xxl = encoder


@pytest.mark.parametrize(("sizes", "loads"), [({}, True), ({"normalized": True}, False)])
def test_only_medium_is_described_from_a_file(webui, a1111, tmp_path, sizes, loads):
    settings = tiny.tiny_sd3(tmp_path / "files", whole=True, **sizes)
    info = Info(Path(settings["base_model"]))
    webui.sd_models.checkpoints_list[info.title] = info
    lender = a1111.lender(info.title, OPTIONS)
    if loads:
        assert lender.describe().family == "sd3"  # its text encoders come from A1111
        return
    with pytest.raises(UserError, match=r"is Stable Diffusion 3\.5 large, which this WebUI does not load") as refused:
        lender.describe()
    assert "3 medium" in refused.value.remedy


def test_a_file_that_a1111_does_not_know_is_refused(webui, a1111, files):
    info = Info(Path(files["base_model"]))  # whose tensors have no prefix
    webui.sd_models.checkpoints_list[info.title] = info
    with pytest.raises(UserError, match=r"no tensor is named model\.diffusion_model\.x_embedder"):
        a1111.lender(info.title, replace(OPTIONS, vae=files["vae"])).describe()


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_vae_must_come_from_somewhere(load, webui, a1111, files, tmp_path, is_loaded):
    theirs = load()
    whole = load_file(theirs.sd_checkpoint_info.filename)
    path = tmp_path / "bare.safetensors"
    save_file({name: it for name, it in whole.items() if not name.startswith("first_stage_model.")}, str(path))
    info = Info(path)
    webui.sd_models.checkpoints_list[info.title] = info
    if is_loaded:  # with a VAE of random numbers
        webui.select("bare")
        theirs.sd_checkpoint_info = info
    with pytest.raises(UserError, match="has no VAE, and this WebUI adds none") as refused:
        a1111.lender(info.title, OPTIONS).describe()
    assert refused.value.field == "vae"
    assert a1111.lender(info.title, replace(OPTIONS, vae=files["vae"])).describe().family == "sd3"
    webui.sd_vae.loaded_vae_file = files["vae"]
    assert a1111.lender(info.title, OPTIONS).describe().family == "sd3"


@torch.no_grad()
def test_with_medvram_encoders_that_lie_apart_are_brought_together(load, webui):
    theirs, here = load(t5=True), torch.device("meta")
    theirs.lowvram, text = True, theirs.text_encoders
    text.to = lambda device: nn.Module.to_empty(text, device=device)
    residence = Residence(webui, HostModel(theirs, True), here, lambda part, is_here: None)
    encoder = nn.Identity()
    vae = SimpleNamespace(encoder=SimpleNamespace(conv_in=nn.Identity()), post_quant_conv=nn.Identity())
    residence.attach(SimpleNamespace(unet=nn.Identity(), vae=vae, text_encoders=[encoder]))
    for one in (text.clip_l, text.clip_g, text.t5xxl):  # the WebUI moves them one by one
        text.to(torch.device("cpu"))
        one.to(here)
        encoder(torch.zeros(1))
        assert {weight.device for weight in text.parameters()} == {here}
        assert webui.lowvram.module_in_gpu is text
        webui.lowvram.module_in_gpu = None
    text.to(torch.device("cpu"))
