"""A LoRA of FLUX.1 from files on disk: trained by the command line, saved, read again, resumed, drawn with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_trainer.adapters.describe import describe
from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.cli.main import main
from lora_trainer.config import from_mapping
from lora_trainer.host.standalone import _merged
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import family_of_lora
from lora_trainer.run import file_lender, train
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.state import named_state
from tests import flux as tiny

STEPS = 6


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    pictures = folder / "pictures"
    pictures.mkdir()
    for index in range(3):
        pixels = np.full((64, 64 + 32 * (index == 2), 3), (220, 30 + 60 * index, 20), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text("a red circle")
    return {
        **tiny.tiny_flux(folder / "base"),
        "train_data_dir": str(pictures),
        "output_dir": str(folder / "out"),
        "output_name": "taught",
        "resolution": "64",
        "bucket_step": 16,
        "min_bucket_resolution": 64,
        "learning_rate": 5e-3,
        "lora_rank": 4,
        "max_train_steps": STEPS,
        "save_steps": 3,
        "save_precision": "fp32",
        "tensorboard": False,
        "preview_prompts": ["a red circle --s 2"],
        "preview_steps": STEPS,
    }


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """By ``python -m lora_trainer train``."""
    path = tmp_path_factory.mktemp("yaml") / "train.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(path)]) == 0
    return from_mapping(settings)


def test_the_command_line_writes_a_lora_in_kohyas_layout(trained):
    lora = next(path for path in _out(trained).glob("taught.safetensors"))
    described = describe(lora)
    assert described.modules == {"unet": 26} and described.base_version == "flux1" and not described.problems
    assert family_of_lora(read_lora(lora).metadata) == "flux"
    tensors = load_file(str(lora))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    width, hidden = tiny.WIDTH, tiny.HIDDEN
    assert shapes["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] == (3 * width, 4)
    assert shapes["lora_unet_single_blocks_1_linear1.lora_up.weight"] == (3 * width + hidden, 4)
    assert shapes["lora_unet_single_blocks_1_modulation_lin.lora_down.weight"] == (4, width)
    assert tensors["lora_unet_double_blocks_1_txt_mlp_2.alpha"] == 4
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_up" in name and "txt_mlp" not in name)
    previews = list(_out(trained).rglob("*.png"))
    assert previews and Image.open(previews[0]).size == (64, 64)


def test_latents_have_sixteen_channels_and_the_caption_its_pooled_encoding(trained):
    cached = [load_file(str(path)) for path in (_out(trained) / "cache").rglob("*.cache")]
    moments = {tuple(one["moments"].shape) for one in cached if "moments" in one}
    assert moments == {(32, 8, 8), (32, 6, 10)} or moments == {(32, 8, 8), (32, 8, 12)}
    texts = {name: tuple(one[name].shape) for one in cached if "context" in one for name in one}
    assert texts == {"context": (1, 256, tiny.TEXT), "pooled": (1, tiny.POOLED)}


def test_the_saved_lora_changes_what_the_model_predicts_and_the_export_is_the_same_change(trained):
    lora, exported = _out(trained) / "taught.safetensors", next(_out(trained).rglob("pytorch_lora_weights.safetensors"))
    base = FileLender(trained.base_model, vae=trained.vae, text_encoders=trained.text_encoders)
    latents, sigmas = torch.randn(1, 16, 4, 4), torch.tensor([0.5])
    predictions = []
    with base.borrow() as model, torch.no_grad():
        conditioning = model.encode_prompts(["a red circle"])
        bare = model.predict(latents, sigmas, conditioning, None)
        for path, rank in ((lora, 4), (exported, 4)):
            config = from_mapping({"base_model": "x", "train_data_dir": "x", "lora_rank": rank})
            adapters = AdapterSet.build(model.lora_targets(), config, model.device)
            assert init_from(adapters, read_lora(path)) == []
            with adapters:
                adapters.eval()
                predictions.append(model.predict(latents, sigmas, conditioning, None))
    assert (predictions[0] - bare).abs().max() > 1e-3
    torch.testing.assert_close(predictions[1], predictions[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["fp32", "fp8", "scaled fp8", "nf4"])
def test_a_grid_draws_with_the_lora_merged_into_the_weights_whatever_their_format(trained, tmp_path, form):
    stored = load_file(trained.base_model)
    if "fp8" in form:
        stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored.items()}
    if form == "scaled fp8":
        stored |= {name.replace("weight", "scale_weight"): torch.tensor([0.5]) for name, tensor in stored.items()
                   if name.endswith("weight") and tensor.dim() == 2}  # fmt: skip
        stored["scaled_fp8"] = torch.zeros(0).to(torch.float8_e4m3fn)
    save_file(stored, str(tmp_path / "base.safetensors"))
    base = FileLender(str(tmp_path / "base.safetensors"), vae=trained.vae, text_encoders=trained.text_encoders,
                      base_precision="nf4" if form == "nf4" else "stored")  # fmt: skip
    latents, sigmas, lora = torch.randn(1, 16, 4, 4), torch.tensor([0.5]), _out(trained) / "taught.safetensors"
    with base.borrow() as model, torch.no_grad():
        conditioning = model.encode_prompts(["a red circle"])
        bare = model.predict(latents, sigmas, conditioning, None)
        config = from_mapping({"base_model": "x", "train_data_dir": "x", "lora_rank": 4})
        adapters = AdapterSet.build(model.lora_targets(), config, model.device)
        init_from(adapters, read_lora(lora))
        with adapters:
            adapters.eval()
            expected = model.predict(latents, sigmas, conditioning, None)
        size = sum(parameter.nbytes for parameter in model.unet.parameters())
        with _merged(model, lora, 1.0):
            merged = model.predict(latents, sigmas, conditioning, None)
            assert sum(parameter.nbytes for parameter in model.unet.parameters()) == size
        assert torch.equal(model.predict(latents, sigmas, conditioning, None), bare), "and it is taken out again"
    change = (expected - bare).abs().max()
    assert change > 1e-3 and (merged - expected).abs().max() < change / 20


def test_it_resumes_and_checkpointing_changes_nothing(trained, tmp_path):
    losses = {}
    for name, more in {"whole": {}, "checkpointed": {"gradient_checkpointing": True}}.items():
        seen: list[float] = []
        config = from_mapping({**_mapping(trained), "output_dir": str(tmp_path / name), **more})
        callbacks = TrainCallbacks()
        callbacks.on_step = lambda report, seen=seen: seen.append(report.loss)
        train(config, file_lender(config), callbacks=callbacks)
        losses[name] = seen
    assert losses["checkpointed"] == pytest.approx(losses["whole"], rel=1e-5) and len(losses["whole"]) == STEPS
    whole = load_file(str(tmp_path / "whole" / "taught.safetensors"))
    assert all(torch.allclose(whole[name], other, atol=1e-5)
               for name, other in load_file(str(_out(trained) / "taught.safetensors")).items())  # fmt: skip


def test_fp8_learns_what_full_precision_learns(settings, tmp_path):
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(settings["base_model"]).items()}
    save_file(stored, str(tmp_path / "fp8.safetensors"))
    save_file({name: tensor.float() for name, tensor in stored.items()}, str(tmp_path / "dense.safetensors"))
    loras = []
    for name in ("fp8", "dense"):
        config = from_mapping({**settings, "base_model": str(tmp_path / f"{name}.safetensors"), "preview_prompts": [],
                               "output_dir": str(tmp_path / name), "max_train_steps": 2})  # fmt: skip
        loras.append(load_file(str(train(config, file_lender(config)).lora)))
    assert all(torch.allclose(loras[0][name], other, atol=1e-6) for name, other in loras[1].items())


def test_on_a_base_in_nf4_it_stops_and_resumes_to_the_same_bits_and_says_so(settings, tmp_path):
    settings = {**settings, "base_precision": "nf4", "preview_prompts": [], "save_steps": None, "max_train_steps": 4}
    ways = {}
    for name, base in (("nf4", "nf4"), ("stored", "stored")):
        config = from_mapping({**settings, "base_precision": base, "output_dir": str(tmp_path / name)})
        ways[name] = train(config, file_lender(config)).lora
    config = from_mapping({**settings, "output_dir": str(tmp_path / "stopped")})
    commands, callbacks = TrainCommands(), TrainCallbacks()
    callbacks.on_step = lambda report: commands.stop_and_save()
    assert train(config, file_lender(config), callbacks=callbacks, commands=commands).status == "stopped"
    keys = [named_state(str(next((tmp_path / name).rglob("*.state")))).run_key for name in ("stopped", "stored")]
    assert keys[0].pop("base_precision") == "nf4" and keys[0].keys() == keys[1].keys(), "older runs go on as well"
    assert not {"prompt_templates", "preserve_words", "preserve_pictures", "min_scale"} & keys[0].keys(), "likewise"
    assert [name for name in keys[0] if keys[0][name] != keys[1][name]] == ["base_model"]
    resumed = train(config, file_lender(config))
    assert resumed.status == "finished"
    whole, again, other = (load_file(str(path)) for path in (ways["nf4"], resumed.lora, ways["stored"]))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert any(not torch.equal(whole[name], other[name]) for name in whole)
    assert describe(ways["nf4"]).base_precision == "nf4" and describe(ways["stored"]).base_precision is None
    saved = yaml.safe_load((tmp_path / "nf4" / "taught.config.yaml").read_text())
    assert saved["base_precision"] == "nf4"


def _out(config):
    from pathlib import Path

    return Path(config.output_dir)


def _mapping(config):
    from lora_trainer.config import to_mapping

    return {**to_mapping(config), "preview_prompts": [], "save_steps": None}
