"""Files of other tools against the formulas of their own programs, written down here independently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.adapters.describe import describe
from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.adapters.merge import merge
from lora_trainer.errors import UserError
from lora_trainer.models.checkpoint import FileLender
from tests import tiny
from tests.adapters.layers import settings, unet_targets

TARGETS = unet_targets()
LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
SHAPES = {LINEAR: (8, 8), CONV: (8, 8, 3, 3)}


def target(name):
    return next(one for one in TARGETS if one.diffusers_name == name)


def rows_made_as_long_as(weight: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """PEFT's and LyCORIS' DoRA: each output's row gets the length that is stored for it."""
    flat = weight.reshape(len(weight), -1)
    lengths = np.sqrt((flat**2).sum(axis=1, keepdims=True))
    return (flat / lengths * magnitudes.reshape(-1, 1)).reshape(weight.shape)


def factors(name, seed=0, rank=4):
    rng = np.random.default_rng(seed)
    shape = SHAPES[name]
    down = rng.normal(size=(rank, *shape[1:])).astype("float32") * 0.3
    up = rng.normal(size=(shape[0], rank, *[1] * (len(shape) - 2))).astype("float32") * 0.3
    magnitudes = rng.uniform(0.5, 2.0, size=shape[0]).astype("float32")
    delta = (up.reshape(shape[0], rank) @ down.reshape(rank, -1)).reshape(shape)
    return down, up, magnitudes, delta


def as_file(layout, name, down, up, magnitudes):
    """The tensors of one layer as a program writes them; its alpha/rank is 1 (PEFT) or 1/2."""
    conv = down.ndim == 4
    if layout == "peft":
        vector = magnitudes.reshape(1, -1, 1, 1) if conv else magnitudes
        return {
            f"{name}.lora_A.weight": down,
            f"{name}.lora_B.weight": up,
            f"{name}.lora_magnitude_vector": vector,
        }, 1.0
    if layout == "peft in memory":
        return {f"base_model.model.{name}.lora_A.default.weight": down,
                f"base_model.model.{name}.lora_B.default.weight": up,
                f"base_model.model.{name}.lora_magnitude_vector.default.weight": magnitudes}, 1.0  # fmt: skip
    kohya = target(name).kohya_name
    scale = magnitudes.reshape(-1, *[1] * (down.ndim - 1))
    return {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, f"{kohya}.dora_scale": scale,
            f"{kohya}.alpha": np.float32(len(down) / 2)}, 0.5  # fmt: skip


def saved(path, tensors):
    save_file({name: torch.as_tensor(value).contiguous() for name, value in tensors.items()}, path)
    return read_lora(path)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", ["peft", "peft in memory", "lycoris"])
def test_dora_per_output_is_what_its_program_makes_of_it(tmp_path, layout, name):
    down, up, magnitudes, delta = factors(name)
    tensors, scale = as_file(layout, name, down, up, magnitudes)
    lora = saved(tmp_path / "a.safetensors", tensors)
    weight = target(name).module.weight.detach()
    expected = rows_made_as_long_as(weight.numpy() + scale * delta, magnitudes)
    matched, unmatched = lora.match(TARGETS)
    assert not unmatched and not lora.unsupported
    changed = weight + matched[target(name).kohya_name].change(weight)
    np.testing.assert_allclose(changed.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert "dora" in describe(tmp_path / "a.safetensors").kinds
    for values in ({}, {"dora": True}):  # an 8 × 8 layer holds any change with rank 8
        adapters = AdapterSet.build(TARGETS, settings(lora_rank=8, conv_rank=8, **values))
        init_from(adapters, lora)
        adapter = next(adapter for one, adapter in adapters.items() if one.diffusers_name == name)
        np.testing.assert_allclose(adapter.merged_weight().detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_peft_itself_agrees(tmp_path):
    """PEFT's own layer, as it is installed, and its own file."""
    peft = pytest.importorskip("peft")
    base = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], use_dora=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)
    (weights,) = read_lora(tmp_path).modules.values()
    before = model.base_model.model[0].base_layer.weight.detach().clone()
    merged = model.merge_and_unload()[0].weight.detach()
    torch.testing.assert_close(before + weights.change(before), merged, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_gets_what_the_formula_says(tmp_path):
    base = tiny.tiny_sd1(tmp_path / "base.safetensors", depths=(1, 0, 0, 0))
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    weight = load_file(base)[key]
    rng = np.random.default_rng(3)
    down, up = (rng.normal(size=size).astype("float32") * 0.1 for size in ((2, weight.shape[1]), (weight.shape[0], 2)))
    magnitudes = rng.uniform(0.5, 2.0, size=weight.shape[0]).astype("float32")
    stem = LINEAR
    saved(tmp_path / "l.safetensors", {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up,
                                       f"{stem}.lora_magnitude_vector": magnitudes})  # fmt: skip
    with FileLender(base).borrow() as model:
        merge(base, tmp_path / "l.safetensors", 0.7, tmp_path / "out.safetensors", targets=model.lora_targets())
    expected = rows_made_as_long_as(weight.numpy() + up @ down, magnitudes)
    expected = weight.numpy() + 0.7 * (expected - weight.numpy())
    np.testing.assert_allclose(load_file(tmp_path / "out.safetensors")[key].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "unet.{original}", "diffusion_model.{original}", "model.diffusion_model.{original}", "{original}",
        "unet.{path}", "{path}", "base_model.model.{path}", "lora_unet_{original_}", "lora_unet_{path_}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_layers_are_found_under_every_name_that_tools_give_them(tmp_path, name, family):
    make = {"sd1": tiny.tiny_sd1, "sdxl": tiny.tiny_sdxl}[family]
    depths = {"sd1": (1, 0, 0, 0), "sdxl": (0, 1, 0)}[family]
    base = make(tmp_path / "base.safetensors", depths=depths)
    with FileLender(base).borrow() as model:
        targets = model.lora_targets()
        one = next(t for t in targets if t.diffusers_name.endswith("attn1.to_q"))
        path, original = (
            one.diffusers_name.removeprefix("unet."),
            one.checkpoint_name.removeprefix("model.diffusion_model."),
        )
        stem = name.format(
            path=path, original=original, path_=path.replace(".", "_"), original_=original.replace(".", "_")
        )
        lora = saved(tmp_path / "l.safetensors", {f"{stem}.lora_A.weight": np.ones((2, 8), "float32"),
                                                  f"{stem}.lora_B.weight": np.ones((8, 2), "float32")})  # fmt: skip
        matched, unmatched = lora.match(targets)
    assert list(matched) == [one.kohya_name] and not unmatched


@pytest.mark.parametrize(
    "stem",
    ["text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
     "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
     "text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder.encoder.layers.0.mlp.fc1",
     "lora_te1_text_model_encoder_layers_0_mlp_fc1"],
)  # fmt: skip
def test_text_encoders_are_found_as_well(tmp_path, stem):
    base = tiny.tiny_sd1(tmp_path / "base.safetensors", depths=(1, 0, 0, 0))
    with FileLender(base).borrow() as model:
        lora = saved(tmp_path / "l.safetensors", {f"{stem}.lora_A.weight": np.ones((2, 8), "float32"),
                                                  f"{stem}.lora_B.weight": np.ones((8, 2), "float32")})  # fmt: skip
        assert list(lora.match(model.lora_targets())[0]) == ["lora_te_text_model_encoder_layers_0_mlp_fc1"]


def test_differences_of_norms_and_biases_are_said_for_what_they_are(tmp_path):
    down, up, _, _ = factors(LINEAR)
    kohya = target(LINEAR).kohya_name
    lora = saved(tmp_path / "l.safetensors", {
        f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, f"{kohya}.diff_b": np.ones(8, "float32"),
        "lora_unet_down_blocks_0_norm1.w_norm": np.ones(8, "float32"), "lora_unet_x.diff": np.ones(8, "float32"),
        "lora_unet_down_blocks_0_norm1.b_norm": np.ones(8, "float32"),
    })  # fmt: skip
    adapters = AdapterSet.build(TARGETS, settings(lora_rank=4))
    told = init_from(adapters, lora)
    assert any("1 × b_norm, 1 × diff, 1 × diff_b, 1 × w_norm" in line and "not trained here" in line for line in told)
    assert any("not trained here" in problem for problem in describe(tmp_path / "l.safetensors").problems)


def test_a_tensor_that_changes_the_others_meaning_is_refused_everywhere(tmp_path):
    down, up, _, _ = factors(LINEAR)
    path = tmp_path / "l.safetensors"
    save_file({f"{LINEAR}.lora_A.weight": torch.from_numpy(down), f"{LINEAR}.lora_B.weight": torch.from_numpy(up),
               f"{LINEAR}.lora_unheard_of": torch.ones(4)}, path)  # fmt: skip
    for read in (
        read_lora,
        describe,
        lambda file: merge(tmp_path / "b.safetensors", file, 1, tmp_path / "o", targets=[]),
    ):
        with pytest.raises(UserError, match="lora_unheard_of changes what"):
            read(path)
