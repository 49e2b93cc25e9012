"""FLUX.1 as Forge keeps it: its own tensors in bf16, fp8 and GGUF, used where they lie and given back as they were."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.host.drawing import _guidance, _schedule
from lora_trainer.models.base import ModelAwayError
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.gguf_blocks import FORMATS, GgufPacking
from lora_trainer.models.tokenizer import load_tokenizer
from lora_trainer.storage import dense_weight, pack
from tests import flux as tiny
from tests.gguf import quantized
from tests.host.a1111.fake import Info, module_tree
from tests.host.conftest import OPTIONS, storages
from tests.host.forge.fake import Engine, Patcher, put

LATENTS, SIGMAS = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.6])


class Q8(SimpleNamespace):
    """Forge's class of a GGUF format; its blocks' scales are of the computation's format once they are baked."""

    @staticmethod
    def dequantize_pytorch(tensor):
        assert tensor.baked and tensor.computation_dtype == torch.float16
        return FORMATS["Q8_0"].decode(tensor.data.view(-1, 34)).view(tensor.shape)


class ParameterGGUF(nn.Parameter):
    """Bytes whose shape is that of the weight."""

    gguf_cls, computation_dtype, real_shape = Q8, torch.float16, torch.Size()

    @property
    def shape(self):
        return self.real_shape


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny.tiny_flux(tmp_path_factory.mktemp("flux"))


def kept(weights, form: str):
    """What Forge makes of the transformer's weights, and the dense ones that are meant."""
    stored, dense = {}, {}
    for name, tensor in weights.items():
        if form == "gguf" and tensor.dim() == 2 and "blocks" in name:
            raw = torch.frombuffer(bytearray(quantized(tensor)), dtype=torch.uint8).view(-1, 34)
            stored[name] = torch.Tensor._make_subclass(ParameterGGUF, raw, False)
            stored[name].real_shape = tuple(map(np.uint64, tensor.shape))  # as Forge's reader gives them
            packed = pack(raw.flatten().clone(), GgufPacking("Q8_0", tuple(tensor.shape)))
            dense[name] = dense_weight(packed, torch.float32)
        else:
            kind = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "gguf": torch.float32}[form]
            stored[name] = tensor.to(kind)
            dense[name] = stored[name].float()
    return stored, dense


def scaled(weights):
    """Matrices as Forge keeps scaled fp8 in a wider format: an eighth of what they mean, and 8 beside them."""
    kept = dict(weights)
    for name, tensor in weights.items():
        if tensor.dim() == 2 and "block" in name and "bias" not in name:
            kept[name] = tensor / 8
            kept[f"{name.removesuffix('weight')}scale_weight"] = torch.tensor([8.0])
    return kept


@pytest.fixture
def load(files, fake_forge, forge):
    """Makes the fake load the small FLUX in a number format; returns its lender and the dense weights."""

    @torch.inference_mode()
    def loaded(form: str, storage):
        stored, dense = kept(load_file(files["base_model"]), form.removesuffix(" scaled"))
        t5_weights = load_file(files["text_encoders"][1])
        if form == "bf16 scaled":
            stored, t5_weights = scaled(stored), scaled(t5_weights)
        plain = {name: tensor.data.clone() if type(tensor) is ParameterGGUF else tensor
                 for name, tensor in stored.items()}  # fmt: skip
        unet = module_tree({f"diffusion_model.{name}": tensor for name, tensor in plain.items()})
        for name, tensor in stored.items():
            if isinstance(tensor, ParameterGGUF):  # which module_tree would wrap
                path, _, last = name.rpartition(".")
                unet.get_submodule(f"diffusion_model.{path}")._parameters[last] = tensor
        unet.predictor = SimpleNamespace(prediction_type="const")
        unet.storage_dtype = storage
        vae = module_tree(load_file(files["vae"]))
        vae.config = SimpleNamespace(scaling_factor=0.3611)
        clip = module_tree(
            {f"clip_l.transformer.{name}": tensor for name, tensor in load_file(files["text_encoders"][0]).items()}
            | {f"t5xxl.transformer.{name}": tensor for name, tensor in t5_weights.items()}
        )
        t5 = SimpleNamespace(name_or_path=files["base_model"].rpartition("/")[0])
        tokenizers = SimpleNamespace(clip_l=load_tokenizer()._source, t5xxl=t5)
        info = Info(Path(files["base_model"]))
        objects = SimpleNamespace(
            unet=Patcher(unet), vae=SimpleNamespace(patcher=Patcher(vae), first_stage_model=vae),
            clip=SimpleNamespace(patcher=Patcher(clip), cond_stage_model=clip, tokenizer=tokenizers),
        )  # fmt: skip
        engine = Engine(
            forge_objects_original=objects, forge_objects_after_applying_lora=objects, sd_checkpoint_info=info,
            current_lora_hash=str([]), is_inpaint=False, is_sdxl=False, model_config=SimpleNamespace(),
        )  # fmt: skip
        fake_forge.sd_models.checkpoints_list[info.title] = info
        fake_forge._build = lambda *arguments: engine
        fake_forge.shared.opts.data["sd_model_checkpoint"] = info.title
        fake_forge._refresh_model_loading_parameters()
        return forge.lender("flux", OPTIONS), dense

    return loaded


@pytest.mark.parametrize(
    ("form", "storage"),
    [("bf16", torch.bfloat16), ("bf16 scaled", torch.bfloat16), ("fp8", torch.float8_e4m3fn), ("gguf", "gguf")],
)
def test_it_is_trained_as_it_lies_and_is_the_files_model(load, fake_forge, files, tmp_path, form, storage):
    lender, dense = load(form, storage)
    assert lender.describe().family == "flux" and lender.describe().prediction_type == "flow"
    save_file(dense, str(tmp_path / "dense.safetensors"))
    file = FileLender(tmp_path / "dense.safetensors", vae=files["vae"], text_encoders=files["text_encoders"])
    with file.borrow() as one:
        conditioning = one.encode_prompts(["a red circle"])
        expected = one.predict(LATENTS, SIGMAS, conditioning, None)
    with lender.borrow() as model, lender.turn():
        before = [(name, tensor.clone()) for part in fake_forge.parts() for name, tensor in part.state_dict().items()]
        bound = list(model.bound().values())
        assert storages(bound) <= {s for part in fake_forge.parts() for s in storages(part.parameters())}, "no copy"
        assert not any(tensor.is_inference() for tensor in bound)
        ours = model.encode_prompts(["a red circle"])
        assert torch.equal(ours.context, conditioning.context) and torch.equal(ours.pooled, conditioning.pooled)
        torch.testing.assert_close(model.predict(LATENTS, SIGMAS, ours, None), expected, atol=1e-5, rtol=1e-5)

        adapters = AdapterSet.build(model.lora_targets(), from_mapping({"base_model": "x", "train_data_dir": "x"}))
        saved: list[torch.Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
        with adapters, hooks:
            model.predict(LATENTS, SIGMAS, ours.map(torch.Tensor.detach), None).square().sum().backward()
        ups = [adapter.lora_up.grad for _, adapter in adapters.items()]
        assert all(torch.isfinite(up).all() for up in ups) and sum(bool(up.any()) for up in ups) > 20
        weights = [weight for name, weight in dense.items() if weight.dim() == 2 and "blocks" in name]
        exact = [tensor for tensor in saved if tensor.dtype == torch.float32]
        assert not any(torch.equal(one, weight) for one in exact for weight in weights), "a copy kept for backward"
    after = [(name, tensor) for part in fake_forge.parts() for name, tensor in part.state_dict().items()]
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for (_, x), (_, y) in zip(before, after))


def test_nf4_is_refused_with_the_family_known(load):
    lender, _ = load("bf16", "nf4")
    with pytest.raises(UserError, match="nf4, which is too coarse"), lender.borrow():
        pass


def test_a_gguf_whose_biases_forge_has_rounded_by_computing_goes_on(load, fake_forge):
    lender, _ = load("gguf", "gguf")
    with lender.borrow():
        with lender.turn():
            pass
        unet = fake_forge.model.forge_objects_original.unet.model
        biases = [(module, module.bias) for module in unet.modules() if getattr(module, "bias", None) is not None]
        assert biases
        for module, bias in biases:  # as Forge's GGUF layers do when they first compute, in fp16 on older cards
            put(module, "bias", torch.nn.Parameter(bias.detach().half(), requires_grad=False))
        with lender.turn():
            pass
        with torch.inference_mode(False), torch.no_grad():
            module, bias = biases[0]
            put(module, "bias", torch.nn.Parameter(bias.detach().half() + 1, requires_grad=False))
        with pytest.raises(ModelAwayError), lender.turn():
            pass


@pytest.mark.parametrize("dev", [True, False])
def test_a_preview_without_the_guidance_input_has_no_guidance_at_all(load, fake_forge, dev):
    load("bf16", torch.bfloat16)
    model = fake_forge._build(None, None)
    model.use_distilled_cfg_scale = dev
    usual = _guidance(model, None)
    assert _schedule(model) == "Simple"
    assert usual["cfg_scale"] == 1.0 and ("distilled_cfg_scale" in usual) == dev
    assert _guidance(model, 2.5)["distilled_cfg_scale" if dev else "cfg_scale"] == 2.5


def test_text_encoders_of_a_file_are_refused_where_the_webui_chooses_them(load, forge, files):
    load("bf16", torch.bfloat16)
    with pytest.raises(UserError) as refused:
        forge.lender("flux", replace(OPTIONS, text_encoders=tuple(files["text_encoders"]))).describe()
    assert refused.value.field == "text_encoders"


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("form", ["a format it writes", "a format it does not write", "fp8", "scaled fp8"])
def test_a_preview_goes_without_merging_where_forge_cannot_merge(
    load, forge, fake_forge, monkeypatch, tmp_path, form, fp16
):
    gguf = form.startswith("a format")
    load("gguf" if gguf else "fp8", "gguf" if gguf else torch.float8_e4m3fn)
    fake_forge.shared.opts.data["forge_unet_storage_dtype"] = "Automatic (fp16 LoRA)" if fp16 else "Automatic"
    if form == "a format it writes":
        monkeypatch.setattr(Q8, "quantize_blocks_pytorch", classmethod(lambda cls, *given: None), raising=False)
    fake_forge._forge_model_reload()
    unet = fake_forge.model.forge_objects_original.unet.model
    if form == "scaled fp8":
        layer = "diffusion_model.double_blocks.0.img_attn.proj.scale_weight"
        put(unet, layer, nn.Parameter(torch.ones(1), requires_grad=False))
    merges = form in ("a format it writes", "fp8")
    loras, online = forge._loras, fake_forge.dynamic_args
    online["online_lora"] = fp16
    with loras.registered("cat", tmp_path / "cat.safetensors"):
        assert online["online_lora"] is (fp16 or not merges)
    assert online["online_lora"] is fp16
    obstacle = loras.obstacle(fake_forge.model)
    assert (obstacle is None) is (fp16 or merges)
    assert obstacle is None or ("Automatic" if gguf else "float8-e4m3fn") + " (fp16 LoRA)" in obstacle
    unet.storage_dtype = torch.bfloat16  # then Forge merges, whatever was chosen
    assert merges or loras.obstacle(fake_forge.model)
    refused = nullcontext() if merges else pytest.raises(UserError, match="fp16 LoRA")
    with refused, loras.registered("cat", tmp_path / "cat.safetensors"):
        pass
    assert online["online_lora"] is fp16
