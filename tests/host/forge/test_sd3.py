"""Stable Diffusion 3 as Forge keeps it: its own tensors, its table of positions, its ways with prompts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import from_mapping
from lora_trainer.host.drawing import _guidance, _schedule
from lora_trainer.host.requests import preview_request
from lora_trainer.models.base import Conditioning
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.tokenizer import load_tokenizer
from tests import sd3 as tiny
from tests.host.a1111.fake import Info, module_tree
from tests.host.conftest import OPTIONS, storages
from tests.host.forge.fake import Engine, Patcher
from tests.models.test_flux import lend

LATENTS, SIGMAS = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.6])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny.tiny_sd3(tmp_path_factory.mktemp("sd3"), dual=1, normalized=True)


@pytest.fixture
def engine(files, fake_forge):
    """Makes the fake load the small model, 3.5 medium's kind."""

    @torch.inference_mode()
    def build(*arguments):
        weights = load_file(files["base_model"])
        positions = weights.pop("pos_embed")
        unet = module_tree({f"diffusion_model.{name}": tensor for name, tensor in weights.items()})
        unet.diffusion_model.register_buffer("pos_embed", positions)  # as Forge's module has it
        unet.predictor = SimpleNamespace(prediction_type="const")
        unet.storage_dtype = torch.float32
        vae = module_tree(load_file(files["vae"]))
        clip_g, clip_l, t5 = map(load_file, files["text_encoders"])
        named = {"clip_l": {**clip_l, "text_projection.weight": torch.eye(tiny.CLIP_L)}, "clip_g": clip_g, "t5xxl": t5}
        clip = module_tree({f"{part}.transformer.{name}": tensor for part, one in named.items() for name, tensor in
                            one.items()})  # fmt: skip
        t5_tokenizer = SimpleNamespace(name_or_path=str(Path(files["base_model"]).parent))
        clips = dict.fromkeys(("clip_l", "clip_g"), load_tokenizer()._source)
        tokenizers = SimpleNamespace(**clips, t5xxl=t5_tokenizer)
        objects = SimpleNamespace(
            unet=Patcher(unet), vae=SimpleNamespace(patcher=Patcher(vae), first_stage_model=vae),
            clip=SimpleNamespace(patcher=Patcher(clip), cond_stage_model=clip, tokenizer=tokenizers),
        )  # fmt: skip
        return Engine(
            forge_objects_original=objects, forge_objects_after_applying_lora=objects, sd_checkpoint_info=info,
            current_lora_hash=str([]), is_inpaint=False, is_sd3=True, model_config=SimpleNamespace(),
            use_distilled_cfg_scale=False,
        )  # fmt: skip

    info = Info(Path(files["base_model"]))
    fake_forge.sd_models.checkpoints_list[info.title] = info
    fake_forge._build = build
    fake_forge.shared.opts.data["sd_model_checkpoint"] = info.title
    fake_forge._refresh_model_loading_parameters()
    return fake_forge


@pytest.mark.parametrize("t5", [False, True])
def test_it_is_trained_as_it_lies_and_is_the_files_model(engine, forge, files, t5):
    engine.shared.opts.data["sd3_enable_t5"] = t5
    lender = forge.lender("sd3", OPTIONS)
    assert lender.describe().family == "sd3" and lender.describe().prediction_type == "flow"
    with lend(files).borrow() as one, torch.no_grad():
        told = one.encode_prompts(["a red circle"])
        text = told.extra if t5 else {}
        expected = one.predict(LATENTS, SIGMAS, Conditioning(told.context, told.pooled, text), None)
    with lender.borrow() as model, lender.turn():
        parts = engine.parts()
        before = [(name, tensor.clone()) for part in parts for name, tensor in part.state_dict().items()]
        bound = model.bound()
        theirs = {s for part in parts for s in storages(part.state_dict().values())}
        assert storages(bound.values()) <= theirs and not any(tensor.is_inference() for tensor in bound.values())
        assert "unet.pos_embed" in bound and any(name.startswith("text_encoder_3.") for name in bound) == t5
        ours = model.encode_prompts(["a red circle"])
        torch.testing.assert_close(ours.pooled, told.pooled)
        assert ours.context.shape == told.context.shape
        assert not torch.equal(ours.context, told.context), "Forge reads CLIP's last state"
        assert ("t5" in ours.extra) == t5 and (not t5 or torch.equal(ours.extra["t5"], told.extra["t5"]))
        same = Conditioning(told.context, told.pooled, ours.extra)
        torch.testing.assert_close(model.predict(LATENTS, SIGMAS, same, None), expected, atol=1e-5, rtol=1e-5)
        assert not model.encode_prompts([""]).extra["says"].any() and ours.extra["says"].all()

        adapters = AdapterSet.build(model.lora_targets(), from_mapping({"base_model": "x", "train_data_dir": "x"}))
        with adapters:
            model.predict(LATENTS, SIGMAS, ours, None).square().sum().backward()
        ups = [adapter.lora_up.grad for _, adapter in adapters.items()]
        assert all(torch.isfinite(up).all() for up in ups) and sum(bool(up.any()) for up in ups) > 10
    after = [(name, tensor) for part in engine.parts() for name, tensor in part.state_dict().items()]
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(before, after))


def test_clip_skip_and_t5_are_as_the_settings_were_when_it_began(engine, forge, files):
    data, keys = engine.shared.opts.data, set()
    with lend(files).borrow() as one, torch.no_grad():
        told = one.encode_prompts(["a red circle"])
    for skip in (1, 2):
        data |= {"CLIP_stop_at_last_layers": skip, "sd3_enable_t5": False}
        lender = forge.lender("sd3", OPTIONS)
        with lender.borrow() as model:
            data |= {"CLIP_stop_at_last_layers": 3 - skip, "sd3_enable_t5": True}
            engine.unload()
            with lender.turn(), torch.no_grad():
                encoded = model.encode_prompts(["a red circle"])
                assert not any(name.startswith("text_encoder_3.") for name in model.bound())
                assert "t5" not in encoded.extra
                # The file's are the last but one, which Forge counts as the second.
                assert torch.equal(encoded.context, told.context) == (skip == 2)
                keys.add(model.text_key)
    assert len(keys) == 2


def test_its_pictures_are_guided_by_a_second_prediction_and_end_at_no_noise_once(engine):
    assert _guidance(engine._build(), None) == {"cfg_scale": 4.5} and _guidance(engine._build(), 3) == {"cfg_scale": 3}
    assert _schedule(engine._build()) == "Simple"


def test_its_pictures_have_sides_that_it_draws(engine, forge):
    config = from_mapping({"base_model": "x", "train_data_dir": "x", "resolution": "1000,520"})
    info = forge.lender("sd3", OPTIONS).describe()
    sides = [(one.width, one.height) for one in (preview_request(prompt, config, info, 1) for prompt in
             ("red", "red --w 72 --h 600"))]  # fmt: skip
    assert sides == [(992, 512), (64, 592)]


def test_a_file_that_is_not_loaded_is_described(engine, forge, files, tmp_path):
    other = tiny.tiny_sd3(tmp_path / "other", whole=True)
    info = Info(Path(other["base_model"]).rename(tmp_path / "other.safetensors"))
    engine.sd_models.checkpoints_list[info.title] = info
    described = forge.lender(info.title, OPTIONS).describe()
    assert described.family == "sd3" and described == FileLender(info.filename).describe()
