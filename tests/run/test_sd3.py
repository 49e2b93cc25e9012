"""A LoRA of Stable Diffusion 3 from files on disk: trained, saved as A1111 and Forge both read it, read anywhere."""

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
from lora_trainer.errors import UserError
from lora_trainer.loras.convert import convert
from lora_trainer.loras.layers import open_layers
from lora_trainer.loras.resize import resize
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import family_of_lora, get_family
from tests import sd3 as tiny
from tests.tiny import random_tensors

RANK = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By ``python -m lora_trainer train``."""
    folder = tmp_path_factory.mktemp("sd3")
    pictures = folder / "pictures"
    pictures.mkdir()
    for index in range(2):
        Image.fromarray(np.full((64, 64, 3), (220, 30 + 60 * index, 20), np.uint8)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text("a red circle")
    settings = {
        **tiny.tiny_sd3(folder / "base", whole=True), "train_data_dir": str(pictures), "tensorboard": False,
        "output_dir": str(folder / "out"), "output_name": "taught", "resolution": "64", "bucket_step": 16,
        "min_bucket_resolution": 64, "learning_rate": 5e-3, "lora_rank": RANK, "alpha": 2, "max_train_steps": 3,
        "save_precision": "fp32", "gradient_checkpointing": True, "caption_dropout": 0.5, "export_diffusers": True,
        "preview_prompts": ["a red circle --s 2"], "preview_steps": 3,
    }  # fmt: skip
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(folder / "train.yaml")]) == 0
    return settings, folder / "out"


def test_the_file_is_one_that_a1111_and_forge_both_read(trained):
    _, out = trained
    lora = out / "taught.safetensors"
    described = describe(lora)
    assert described.modules == {"unet": 17} and described.base_version == "3-medium" and not described.problems
    assert family_of_lora(read_lora(lora).metadata) == "sd3"
    tensors = load_file(str(lora))
    # A1111 splits every name at its last two dots into three parts, and gives the file up where one has fewer.
    names = {tuple(name.rsplit(".", 2)[1:]) for name in tensors}
    assert names == {("lora_down", "weight"), ("lora_up", "weight")} and all(name.count(".") == 2 for name in tensors)
    stems = {name.partition(".")[0] for name in tensors}
    for side, layers in (("x_block", ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2", "adaLN_modulation_1")),
                         ("context_block", ("attn_qkv", "adaLN_modulation_1"))):  # fmt: skip
        assert stems >= {f"lora_unet_joint_blocks_1_{side}_{layer}" for layer in layers}
    assert "lora_unet_joint_blocks_1_context_block_attn_proj" not in stems
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_up" in name)
    assert Image.open(next(out.rglob("*.png"))).size == (64, 64)


def changed(settings, path, rank=RANK) -> torch.Tensor:
    """What the model predicts with this LoRA, of which every layer must find its place."""
    with FileLender(settings["base_model"]).borrow() as model, torch.no_grad():
        conditioning = model.encode_prompts(["a red circle"])
        latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5))
        if path is None:
            return model.predict(latents, torch.tensor([0.5]), conditioning, None)
        config = from_mapping({"base_model": "x", "train_data_dir": "x", "lora_rank": rank})
        adapters = AdapterSet.build(model.lora_targets(), config, model.device)
        assert init_from(adapters, read_lora(path)) == []
        with adapters:
            adapters.eval()
            return model.predict(latents, torch.tensor([0.5]), conditioning, None)


def test_every_layout_is_the_same_change(trained, tmp_path):
    """Of a file in kohya's layout, with alpha, whose layers all change something."""
    settings, out = trained
    shapes = {}
    for name, tensor in load_file(str(out / "taught.safetensors")).items():
        shapes[name] = tuple(tensor.shape)
    tensors = random_tensors(shapes, 3, torch.float32)
    kohya = {**tensors, **{f"{name.partition('.')[0]}.alpha": torch.tensor(2.0) for name in tensors}}
    metadata = {"ss_base_model_version": "3-medium"}
    save_file(kohya, str(tmp_path / "kohya.safetensors"), metadata=metadata)
    base = settings["base_model"]
    for layout in ("diffusers", "kohya"):
        path = tmp_path / f"{layout}-converted.safetensors"
        convert(tmp_path / "kohya.safetensors", path, layout, base=base)
    resize(tmp_path / "kohya.safetensors", tmp_path / "resized.safetensors", rank=RANK, base=base)
    converted = load_file(str(tmp_path / "kohya-converted.safetensors"))
    assert not any(name.endswith("alpha") for name in {*converted, *load_file(str(tmp_path / "resized.safetensors"))})
    theirs = load_file(str(tmp_path / "diffusers-converted.safetensors"))
    swapped = "transformer.transformer_blocks.1.norm1_context.linear.lora_B.weight"
    up = kohya["lora_unet_joint_blocks_1_context_block_adaLN_modulation_1.lora_up.weight"] * 2 / RANK
    torch.testing.assert_close(theirs[swapped], torch.cat(up.chunk(2)[::-1]))
    one_trainer = {"lora_" + name.replace(".lora_A.weight", "").replace(".lora_B.weight", "").replace(".", "_")
                   + (".lora_down.weight" if "lora_A" in name else ".lora_up.weight"): tensor
                   for name, tensor in theirs.items()}  # fmt: skip
    save_file(one_trainer, str(tmp_path / "onetrainer.safetensors"), metadata=metadata)
    expected = changed(settings, tmp_path / "kohya.safetensors")
    assert (expected - changed(settings, None)).abs().max() > 1e-3
    for name in ("diffusers-converted", "kohya-converted", "resized", "onetrainer"):
        torch.testing.assert_close(changed(settings, tmp_path / f"{name}.safetensors"), expected, atol=2e-5, rtol=1e-4)


def without_base(path, version, width, rows):
    """A LoRA in diffusers' layout, found in the usual model of its variant. rows: outputs by the layer's name."""
    tensors = {}
    for name, outside in rows.items():
        tensors[f"transformer.transformer_blocks.{name}.lora_A.weight"] = torch.randn(1, width)
        tensors[f"transformer.transformer_blocks.{name}.lora_B.weight"] = torch.randn(outside, 1)
    save_file(tensors, str(path), metadata={"ss_base_model_version": version})
    found = open_layers(path)
    ups = {name: tensor for name, tensor in tensors.items() if "lora_B" in name}
    return found, {name.split("blocks.")[1].removesuffix(".lora_B.weight"): up for name, up in ups.items()}


@pytest.mark.parametrize("version", ["sd3", "3-5-large"])
def test_without_the_base_a_lora_of_3_5_large_is_read_as_one(tmp_path, version):
    rows = {"23.norm1_context.linear": 6 * 2432, "37.norm1_context.linear": 2 * 2432}
    found, ups = without_base(tmp_path / "large.safetensors", version, 2432, rows)
    read = [found.matched[f"lora_unet_joint_blocks_{block}_context_block_adaLN_modulation_1"] for block in (23, 37)]
    assert not found.unmatched and torch.equal(read[0].tensors["lora_up.weight"], ups["23.norm1_context.linear"])
    swapped = torch.cat(ups["37.norm1_context.linear"].chunk(2)[::-1])
    assert torch.equal(read[1].tensors["lora_up.weight"], swapped)


@pytest.mark.parametrize("version", ["sd3", "3-5-medium"])
def test_without_the_base_a_lora_of_3_5_medium_keeps_the_second_attention(tmp_path, version):
    found, _ = without_base(tmp_path / "medium.safetensors", version, 1536, {"3.attn2.to_q": 1536, "3.attn.to_q": 1536})
    assert not found.unmatched and set(found.matched) == {
        f"lora_unet_joint_blocks_3_x_block_{attention}_qkv" for attention in ("attn", "attn2")
    }


def test_a_layer_of_another_variant_is_not_swapped(tmp_path):
    with pytest.raises(UserError, match="has 14592 outputs instead of 3072"):
        without_base(tmp_path / "large.safetensors", "3-medium", 2432, {"23.norm1_context.linear": 6 * 2432})


def test_the_family_says_its_numbers(trained):
    family = get_family("sd3")
    schedule = family.schedule(family.usual.transformer)
    assert schedule.sampling == "logit_normal" and schedule.guidance is None and schedule.cfg > 1
    assert np.isclose(np.exp(schedule.mu), 3.0)
    config = from_mapping({"base_model": "x", "train_data_dir": "x"})
    work = list(family.parts(family.usual, (1024, 1024), config))
    assert len(work) == 25
    trial = family.trial(family.architecture(
        {f"model.diffusion_model.{name}": shape for name, shape in tiny.transformer_shapes().items()},
        dtypes={}, source="x", hints=None,
    ), (64, 64), torch.device("cpu"), torch.float32)  # fmt: skip
    trial.forward(trial.input).sum().backward()
    assert trial.input.grad.isfinite().all()
