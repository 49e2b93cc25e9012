"""Chroma as Forge keeps it: T5 alone, its prompts as long as they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import from_mapping
from lora_trainer.host.drawing import _guidance
from tests import chroma as tiny
from tests.host.a1111.fake import Info, module_tree
from tests.host.conftest import OPTIONS, storages
from tests.host.forge.fake import Engine, Patcher
from tests.models.test_flux import lend

LATENTS, SIGMAS = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.6])


def test_it_is_trained_as_it_lies_and_is_the_files_model(fake_forge, forge, tmp_path):
    files = tiny.tiny_chroma(tmp_path / "chroma")
    info = Info(Path(files["base_model"]))

    @torch.inference_mode()
    def build(*arguments):
        weights = load_file(files["base_model"])
        unet = module_tree({f"diffusion_model.{name}": tensor.bfloat16() for name, tensor in weights.items()})
        unet.predictor, unet.storage_dtype = SimpleNamespace(prediction_type="const"), torch.bfloat16
        vae = module_tree(load_file(files["vae"]))
        clip = module_tree({f"t5xxl.transformer.{name}": it for name, it in load_file(*files["text_encoders"]).items()})
        tokenizers = SimpleNamespace(t5xxl=SimpleNamespace(name_or_path=str(tmp_path / "chroma")))
        objects = SimpleNamespace(
            unet=Patcher(unet), vae=SimpleNamespace(patcher=Patcher(vae), first_stage_model=vae),
            clip=SimpleNamespace(patcher=Patcher(clip), cond_stage_model=clip, tokenizer=tokenizers),
        )  # fmt: skip
        return Engine(
            forge_objects_original=objects, forge_objects_after_applying_lora=objects, sd_checkpoint_info=info,
            current_lora_hash=str([]), is_inpaint=False, model_config=SimpleNamespace(), use_distilled_cfg_scale=False,
        )  # fmt: skip

    fake_forge.sd_models.checkpoints_list[info.title] = info
    fake_forge._build = build
    fake_forge.shared.opts.data["sd_model_checkpoint"] = info.title
    fake_forge._refresh_model_loading_parameters()
    lender = forge.lender("chroma", OPTIONS)
    assert lender.describe().family == "chroma" and lender.describe().prediction_type == "flow"
    with lend(files).borrow() as one, torch.no_grad():
        told = one.encode_prompts(["a red circle"])
        expected = one.predict(LATENTS, SIGMAS, told, None)
    with lender.borrow() as model, lender.turn():
        parts = fake_forge.parts()
        before = [(name, tensor.clone()) for part in parts for name, tensor in part.state_dict().items()]
        bound = model.bound().values()
        assert storages(bound) <= {s for part in parts for s in storages(part.parameters())}
        ours = model.encode_prompts(["a red circle"])
        assert ours.context.shape == told.context.shape == (1, 4, told.context.shape[-1])
        assert (model.predict(LATENTS, SIGMAS, ours, None) - expected).norm() < 0.05 * expected.norm()  # in bf16
        adapters = AdapterSet.build(model.lora_targets(), from_mapping({"base_model": "x", "train_data_dir": "x"}))
        with adapters:
            model.predict(LATENTS, SIGMAS, ours, None).square().sum().backward()
        ups = [adapter.lora_up.grad for _, adapter in adapters.items()]
        assert all(torch.isfinite(up).all() for up in ups) and sum(bool(up.any()) for up in ups) > 10
        assert _guidance(fake_forge.model, None) == {"cfg_scale": 4.5}
    after = [(name, tensor) for part in fake_forge.parts() for name, tensor in part.state_dict().items()]
    assert all(name == other and torch.equal(x, y) for (name, x), (other, y) in zip(before, after))
