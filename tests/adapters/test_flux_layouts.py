"""LoRAs of FLUX.1 in every program's layout: read, merged and converted as the products of their factors say."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.adapters.describe import describe
from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.adapters.merge import merge
from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.loras.convert import convert
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import targets_of
from tests import flux as tiny

W, H, RANK = tiny.WIDTH, tiny.HIDDEN, 2
# Layers of Black Forest Labs' model: diffusers' names of their rows, from top to bottom; and how wide their input is.
FUSED = {
    "double_blocks.1.img_attn.qkv": ([("transformer_blocks.1.attn.to_q", W), ("transformer_blocks.1.attn.to_k", W),
                                      ("transformer_blocks.1.attn.to_v", W)], W),
    "double_blocks.0.txt_attn.qkv": ([("transformer_blocks.0.attn.add_q_proj", W),
                                      ("transformer_blocks.0.attn.add_k_proj", W),
                                      ("transformer_blocks.0.attn.add_v_proj", W)], W),
    "double_blocks.0.txt_attn.proj": ([("transformer_blocks.0.attn.to_add_out", W)], W),
    "double_blocks.1.img_mlp.2": ([("transformer_blocks.1.ff.net.2", W)], H),
    "single_blocks.0.linear1": ([("single_transformer_blocks.0.attn.to_q", W),
                                 ("single_transformer_blocks.0.attn.to_k", W),
                                 ("single_transformer_blocks.0.attn.to_v", W),
                                 ("single_transformer_blocks.0.proj_mlp", H)], W),
    "single_blocks.1.linear2": ([("single_transformer_blocks.1.proj_out", W)], W + H),
    "single_blocks.1.modulation.lin": ([("single_transformer_blocks.1.norm.linear", 3 * W)], W),
}  # fmt: skip
LAYOUTS = {
    "kohya": ("lora_unet_{}", "_", ("lora_down.weight", "lora_up.weight"), False, True),
    "ComfyUI": ("diffusion_model.{}", ".", ("lora_A.weight", "lora_B.weight"), False, False),
    "LyCORIS": ("lycoris_{}", "_", ("lora_down.weight", "lora_up.weight"), False, True),
    "diffusers": ("transformer.{}", ".", ("lora_A.weight", "lora_B.weight"), True, False),
    "OneTrainer": ("lora_transformer_{}", "_", ("lora_down.weight", "lora_up.weight"), True, True),
}
"""Name, what stands for its dots, the factors' suffixes, whether fused layers are split, whether alpha is written."""


def written(path, layout, **more):
    """Random factors in a layout; returns the change of every fused weight by the definition of a LoRA."""
    stem, dot, (down_name, up_name), split, has_alpha = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(7)
    tensors, changes = {}, {}
    for name, (parts, inside) in FUSED.items():
        rows = []
        for part, height in parts if split else [(name, sum(height for _, height in parts))]:
            down = torch.randn(RANK, inside, generator=generator)
            up = torch.randn(height, RANK, generator=generator) * 0.1
            alpha = torch.rand((), generator=generator) * 4
            key = stem.format(part.replace(".", dot))
            tensors |= {f"{key}.{down_name}": down, f"{key}.{up_name}": up}
            if has_alpha:
                tensors[f"{key}.alpha"] = alpha
            rows.append(up @ down * (alpha / RANK if has_alpha else 1.0))
        changes[name] = torch.cat(rows)
    save_file({**tensors, **more}, str(path), metadata={"format": "pt"})
    return changes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.tiny_flux(tmp_path_factory.mktemp("flux"))["base_model"]


@pytest.fixture(scope="module")
def targets(base):
    return targets_of(FileLender(base).architecture())


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_is_read_described_and_continued_from(layout, tmp_path, targets):
    changes = written(tmp_path / "lora.safetensors", layout)
    lora = read_lora(tmp_path / "lora.safetensors")
    matched, unmatched = lora.match(targets)
    assert not unmatched and len(matched) == len(FUSED)
    deltas = {name.removeprefix("lora_unet_"): weights for name, weights in matched.items()}
    for name, change in changes.items():
        torch.testing.assert_close(deltas[name.replace(".", "_")].delta(change.shape), change, atol=1e-5, rtol=1e-5)
    described = describe(tmp_path / "lora.safetensors")
    assert set(described.modules) == {"unet"} and not described.problems

    chosen = [target for target in targets if target.kohya_name in matched]
    for target in chosen:
        target.module.weight = torch.nn.Parameter(torch.zeros(target.module.weight.shape), requires_grad=False)
    config = from_mapping({"base_model": "x", "train_data_dir": "x", "lora_rank": 4 * RANK})
    adapters = AdapterSet.build(chosen, config, torch.device("cpu"))
    assert init_from(adapters, lora) == []
    for target, adapter in adapters.items():
        change = changes[target.checkpoint_name.removeprefix("model.diffusion_model.")]
        torch.testing.assert_close(adapter.delta_weight(), change, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_it_is_merged_into_the_file_and_converted(layout, tmp_path, base, targets):
    path = tmp_path / "lora.safetensors"
    changes = written(path, layout)
    result = merge(base, path, 0.5, tmp_path / "merged.safetensors", targets=targets)
    assert result.merged == len(FUSED) and not result.unmatched
    before, after = load_file(base), load_file(str(result.path))
    for name, tensor in before.items():
        expected = tensor + 0.5 * changes[stem] if (stem := name.removesuffix(".weight")) in changes else tensor
        torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=1e-5)

    for other in ("kohya", "diffusers"):
        new = tmp_path / f"{other}.safetensors"
        assert convert(path, new, other, base=base) == (len(FUSED), [])
        matched, unmatched = read_lora(new).match(targets)
        assert not unmatched
        for target in targets:
            if target.kohya_name in matched:
                change = changes[target.checkpoint_name.removeprefix("model.diffusion_model.")]
                ours = matched[target.kohya_name].delta(change.shape)
                torch.testing.assert_close(ours, change, atol=1e-4, rtol=1e-4)
    assert "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight" in load_file(str(new))


def test_what_cannot_be_put_together_is_refused(tmp_path, targets):
    more = {f"transformer.single_transformer_blocks.1.attn.to_q.{name}": torch.ones(shape)
            for name, shape in {"lokr_w1": (4, 4), "lokr_w2": (W // 4, W // 4)}.items()}  # fmt: skip
    written(tmp_path / "lora.safetensors", "diffusers", **more)
    with pytest.raises(UserError, match="are one layer in this model"):
        read_lora(tmp_path / "lora.safetensors").match(targets)


def test_a_part_alone_changes_its_rows(tmp_path, targets):
    down, up = torch.randn(3, W), torch.randn(W, 3)
    stem = "transformer.single_transformer_blocks.1.attn.to_k"
    path = tmp_path / "k.safetensors"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, str(path))
    matched, unmatched = read_lora(path).match(targets)
    delta = matched["lora_unet_single_blocks_1_linear1"].delta((3 * W + H, W))
    torch.testing.assert_close(delta[W : 2 * W], up @ down)
    assert not unmatched and not delta[:W].any() and not delta[2 * W :].any()
