"""Tools on finished LoRAs against NumPy's SVD, sums of changes, diffusers' and PEFT's own readers."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.adapters.export import save_lora
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.adapters.merge import merge
from lora_trainer.cli import main
from lora_trainer.errors import UserError
from lora_trainer.loras.combine import combine
from lora_trainer.loras.convert import convert
from lora_trainer.loras.edit import edit_metadata
from lora_trainer.loras.extract import extract
from lora_trainer.loras.resize import resize
from lora_trainer.loras.strength import strength_by_block
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.detect import detect
from lora_trainer.models.families import families, targets_of
from tests import tiny
from tests.adapters.layers import randomize, settings

META = {"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "zwx", "lora_trainer.run": "abcd1234"}
KINDS = {
    "lora": {"lora_rank": 6, "alpha": 3.0, "conv_rank": 5},
    "loha": {"adapter": "loha", "lora_rank": 2, "conv_rank": 2},
    "lokr": {"adapter": "lokr", "lora_rank": 1, "conv_rank": 1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.tiny_sd1(tmp_path_factory.mktemp("base") / "base.safetensors", depths=(1, 0, 0, 0))


@pytest.fixture(scope="module")
def targets(base):
    return targets_of(FileLender(base).architecture())


def make(path, targets, seed=1, metadata=META, **values):
    adapters = AdapterSet.build(targets, settings(**{"train_text_encoder": True, **values}), "cpu")
    randomize(adapters, seed, deviation=0.1)
    save_lora(adapters, path, metadata, "fp32")
    return path


def deltas(path, targets):
    """ΔW of every layer as NumPy matrices, by the reading that merging uses."""
    from lora_trainer.adapters.base import weight_shape

    matched, unmatched = read_lora(path).match(targets)
    assert not unmatched
    shapes = {target.kohya_name: weight_shape(target.module) for target in targets}
    return {name: one.delta(shapes[name]).flatten(1).double().numpy() for name, one in matched.items()}


def best_of_rank(matrix, rank):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_the_usual_models_are_those_that_files_of_them_are_read_as():
    shapes = {
        "sd1": tiny.sd1_shapes(**tiny.SD1_FULL),
        "sd2": tiny.sd2_shapes(**tiny.SD2_FULL),
        "sdxl": tiny.sdxl_shapes(**tiny.SDXL_FULL),
    }
    for name, of_file in shapes.items():
        without_vae = {key: shape for key, shape in of_file.items() if not key.startswith("first_stage_model.")}
        assert families()[name].usual == detect(without_vae, dtypes={}, source="a file")


@pytest.mark.parametrize("kind", KINDS)
def test_resize_is_the_best_approximation_of_that_rank(tmp_path, base, targets, kind):
    lora = make(tmp_path / "a.safetensors", targets, **KINDS[kind])
    done = resize(lora, tmp_path / "b.safetensors", rank=3, base=base)
    whole, small = deltas(lora, targets), deltas(tmp_path / "b.safetensors", targets)
    assert whole.keys() == small.keys() and done.layers == len(whole)
    kept = total = 0.0
    for name, matrix in whole.items():
        expected = best_of_rank(matrix, 3)
        assert np.abs(small[name] - expected).max() < 1e-5 * max(1, np.abs(matrix).max())
        kept, total = kept + (expected**2).sum(), total + (matrix**2).sum()
    assert done.kept == pytest.approx(kept / total, abs=1e-5)
    assert {one.rank for one in read_lora(tmp_path / "b.safetensors").modules.values()} <= {1, 2, 3}


def test_resize_by_share_keeps_that_share_of_every_layer_and_no_rank_more(tmp_path, base, targets):
    lora = make(tmp_path / "a.safetensors", targets, lora_rank=8)
    done = resize(lora, tmp_path / "b.safetensors", share=0.9, base=base)
    whole, modules = deltas(lora, targets), read_lora(tmp_path / "b.safetensors").modules
    for name, matrix in whole.items():
        energy = np.cumsum(np.linalg.svd(matrix, compute_uv=False) ** 2)
        assert modules[name].rank == int((energy < 0.9 * energy[-1]).sum()) + 1
    assert done.ranks[0] < done.ranks[1] and 0.9 <= done.kept < 1
    metadata = read_lora(tmp_path / "b.safetensors").metadata
    assert metadata["ss_network_dim"] == "Dynamic" and metadata["modelspec.trigger_phrase"] == "zwx"
    assert "lora_trainer.run" not in metadata  # it is not the file that the run wrote


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "loha")])
def test_combined_loras_equal_the_sum_of_their_changes(tmp_path, base, targets, kinds):
    one = make(tmp_path / "one.safetensors", targets, 1, **KINDS[kinds[0]])
    other = make(tmp_path / "other.safetensors", targets, 2, **{**KINDS[kinds[1]], "target_modules": ["attention"]})
    combine([(one, 0.7), (other, -0.4)], tmp_path / "sum.safetensors", base=base)
    first, second, total = (deltas(path, targets) for path in (one, other, tmp_path / "sum.safetensors"))
    assert total.keys() == first.keys() | second.keys()
    for name, matrix in total.items():
        expected = 0.7 * first.get(name, 0) - 0.4 * second.get(name, 0)
        assert np.abs(matrix - expected).max() < 1e-5
    metadata = read_lora(tmp_path / "sum.safetensors").metadata
    assert "0.7 × one + -0.4 × other" in metadata["ss_training_comment"]


def test_a_combined_lora_of_a_lower_rank_is_the_best_approximation(tmp_path, base, targets):
    one, other = (make(tmp_path / f"{seed}.safetensors", targets, seed, lora_rank=4) for seed in (1, 2))
    done = combine([(one, 1.0), (other, 1.0)], tmp_path / "sum.safetensors", rank=4, base=base)
    first, second, small = (deltas(path, targets) for path in (one, other, done.path))
    for name, matrix in small.items():
        assert np.abs(matrix - best_of_rank(first[name] + second[name], 4)).max() < 1e-5


def test_extract_finds_the_difference_of_two_checkpoints(tmp_path, base, targets):
    lora = make(tmp_path / "a.safetensors", targets, lora_rank=3, conv_rank=2, target_modules=["attention", "conv"])
    tuned = tmp_path / "tuned.safetensors"
    merge(base, lora, 1.0, tuned, targets=targets)
    done = extract(base, tuned, tmp_path / "b.safetensors", rank=3, conv_rank=2, precision="fp32")
    whole, found = deltas(lora, targets), deltas(done.path, targets)
    assert found.keys() == whole.keys() and done.equal == len(targets) - len(whole)
    for name, matrix in found.items():
        assert np.abs(matrix - whole[name]).max() < 1e-5
    assert done.kept > 0.9999 and read_lora(done.path).metadata["ss_base_model_version"] == "sd_v1"


def test_extract_at_a_low_rank_is_the_best_approximation(tmp_path, base, targets):
    tuned = tmp_path / "tuned.safetensors"
    tensors = load_file(base)
    generator = torch.Generator().manual_seed(3)
    changed = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) if tensor.dim() > 1 else tensor
        for name, tensor in tensors.items()
    }
    save_file(changed, tuned)
    done = extract(base, tuned, tmp_path / "b.safetensors", rank=2, precision="fp32")
    found = deltas(done.path, targets)
    for target in targets:
        if target.kohya_name in found and target.checkpoint_name:
            key = f"{target.checkpoint_name}.weight"
            difference = (changed[key] - tensors[key]).flatten(1).double().numpy()
            assert np.abs(found[target.kohya_name] - best_of_rank(difference, 2)).max() < 1e-5
    assert not any("resnets" in name for name in found)  # conv_rank is 0


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_diffusers_layout_changes_diffusers_model_as_the_file_says(tmp_path, base, targets, kind):
    lora = make(tmp_path / "a.safetensors", targets, **KINDS[kind])
    layers, left_out = convert(lora, tmp_path / "b.safetensors", "diffusers", base=base, precision="fp32")
    assert left_out == [] and layers == len(deltas(lora, targets))
    whole, converted = deltas(lora, targets), load_file(tmp_path / "b.safetensors")
    for target in targets:
        down, up = (converted[f"{target.diffusers_name}.lora_{side}.weight"] for side in "AB")
        product = (up.flatten(1) @ down.flatten(1)).double().numpy()
        assert np.abs(product - whole[target.kohya_name]).max() < 1e-5
    again = tmp_path / "c.safetensors"
    convert(tmp_path / "b.safetensors", again, "kohya", base=base)
    for name, matrix in deltas(again, targets).items():
        assert np.abs(matrix - whole[name]).max() < 1e-5


def test_peft_reads_its_folders_and_changes_the_model_as_the_file_says(tmp_path, base, targets):
    peft = pytest.importorskip("peft")
    lora = make(tmp_path / "a.safetensors", targets, **KINDS["lora"])
    convert(lora, tmp_path / "folder", "peft", base=base, precision="fp32")
    with FileLender(base).borrow() as model:
        before = {name: weight.clone() for name, weight in model.unet.state_dict().items()}
        whole = deltas(lora, targets)
        unet = peft.PeftModel.from_pretrained(model.unet, str(tmp_path / "folder" / "unet")).merge_and_unload()
        after = unet.state_dict()
        for target in targets:
            if target.part == "unet":
                name = f"{target.diffusers_name.removeprefix('unet.')}.weight"
                change = (after[name] - before[name]).flatten(1).double().numpy()
                assert np.abs(change - whole[target.kohya_name]).max() < 1e-5
    settings_written = json.loads((tmp_path / "folder" / "text_encoder" / "adapter_config.json").read_text())
    assert settings_written["peft_type"] == "LORA"


def test_kohya_layout_keeps_the_kind_of_network(tmp_path, base, targets):
    lora = make(tmp_path / "a.safetensors", targets, **KINDS["lokr"])
    convert(lora, tmp_path / "b.safetensors", "kohya", base=base)
    one, other = load_file(lora), load_file(tmp_path / "b.safetensors")
    assert {n for n in one if not n.endswith("alpha")} == {n for n in other if not n.endswith("alpha")}
    assert all(torch.equal(one[name], other[name]) for name in one if not name.endswith("alpha"))


def test_strength_is_the_norm_of_each_block(tmp_path, base, targets):
    lora = make(tmp_path / "a.safetensors", targets, **KINDS["lora"])
    found, whole = strength_by_block(lora, base), deltas(lora, targets)
    place = next(t for t in targets if (t.checkpoint_name or "").startswith("model.diffusion_model.input_blocks.1."))
    stem = place.checkpoint_name.split(".")[:4]
    expected = sum(
        (whole[t.kohya_name] ** 2).sum() for t in targets if (t.checkpoint_name or "").split(".")[:4] == stem
    )
    assert found["IN01"] == pytest.approx(expected**0.5, rel=1e-5)
    assert {"TE1", "M00", "OUT00"} <= found.keys()


def test_a_lora_of_a_usual_model_needs_no_base(tmp_path):
    targets = targets_of(families()["sdxl"].usual)
    wanted = [t for t in targets if t.part == "unet" and t.group == "attention" and t.block == 11][:4]
    lora = make(tmp_path / "a.safetensors", wanted, lora_rank=4, metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    assert resize(lora, tmp_path / "b.safetensors", rank=2).ranks == (2, 2)
    assert convert(lora, tmp_path / "c.safetensors", "diffusers")[0] == 4
    assert list(strength_by_block(lora)) == ["M01"]


def test_edited_metadata_leaves_the_weights_and_the_webuis_hash(tmp_path, targets):
    lora = make(tmp_path / "a.safetensors", targets, lora_rank=2)
    before = read_lora(lora)
    out = tmp_path / "名 前.safetensors"
    edit_metadata(lora, out, set={"modelspec.trigger_phrase": "新词", "note": "x"}, remove=["lora_trainer.run"])
    after = read_lora(out)
    assert after.metadata["modelspec.trigger_phrase"] == "新词" and "lora_trainer.run" not in after.metadata
    assert after.metadata["sshs_model_hash"] == before.metadata["sshs_model_hash"]
    one, other = load_file(lora), load_file(out)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _dora(folder, targets):
    path = make(folder / "dora.safetensors", targets, lora_rank=2)
    tensors = load_file(path)
    magnitudes = {
        name.replace("lora_down.weight", "dora_scale"): torch.ones(1, *tensor.shape[1:2], *[1] * (tensor.dim() - 2))
        for name, tensor in tensors.items()
        if name.endswith("lora_down.weight")
    }
    save_file({**tensors, **magnitudes}, path, META)
    return path


REFUSED = {
    "no size": (["resize", "{lora}"], "rank"),
    "rank 0": (["resize", "{lora}", "--rank", "0"], "rank"),
    "share 2": (["resize", "{lora}", "--share", "2"], "share"),
    "dora": (["resize", "{dora}", "--rank", "2", "--base", "{base}"], "DoRA"),
    "one lora": (["combine", "{lora}"], "two"),
    "strength": (["combine", "{lora}:nan", "{lora}", "--base", "{base}"], "strength"),
    "two families": (["combine", "{lora}", "{xl}"], "different kinds"),
    "shape": (["resize", "{lora}", "--rank", "2"], "Name its base model"),
    "not there": (["resize", "{folder}/no.safetensors", "--rank", "2"], "There is no file"),
    "same checkpoint": (["extract", "--base", "{base}", "--tuned", "{copy}"], "do not differ"),
    "other kind": (["extract", "--base", "{base}", "--tuned", "{lora}"], "LoRA"),
    "nothing to edit": (["edit", "{lora}"], "Nothing"),
    "no equals sign": (["edit", "{lora}", "--set", "abc"], "NAME=VALUE"),
    "hash": (["edit", "{lora}", "--set", "sshs_model_hash=1"], "cannot be set"),
    "no entry": (["edit", "{lora}", "--remove", "nothing"], "no entry"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_message_and_write_nothing(tmp_path, capsys, base, targets, case):
    arguments, words = REFUSED[case]
    places = {
        "lora": make(tmp_path / "a.safetensors", targets, lora_rank=2),
        "base": base,
        "folder": tmp_path,
        "copy": tmp_path / "copy.safetensors",
    }
    places["copy"].write_bytes(base.read_bytes())
    if "{dora}" in str(arguments):
        places["dora"] = _dora(tmp_path, targets)
    if "{xl}" in str(arguments):
        xl = [t for t in targets_of(families()["sdxl"].usual) if "blocks.9." in t.diffusers_name][:2]
        usual = [t for t in targets_of(families()["sd1"].usual) if t.block == 12 and t.group == "attention"][:2]
        places["xl"] = make(tmp_path / "xl.safetensors", xl, lora_rank=1, metadata={})
        places["lora"] = make(tmp_path / "sd1.safetensors", usual, lora_rank=1)
    before = sorted(tmp_path.iterdir())
    filled = [str(argument).format(**places) for argument in arguments]
    assert main([*filled, "--output", str(tmp_path / "out.safetensors")]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and sorted(tmp_path.iterdir()) == before


def test_commands_write_what_they_say_and_nothing_over_a_file(tmp_path, capsys, base, targets):
    lora = make(tmp_path / "a.safetensors", targets, lora_rank=4)
    out = tmp_path / "out.safetensors"
    command = ["resize", str(lora), "--rank", "2", "--base", str(base), "--output", str(out)]
    assert main(command) == 0 and "rank 2" in capsys.readouterr().out
    written = out.read_bytes()
    assert main(command) == 2 and "exists already" in capsys.readouterr().err and out.read_bytes() == written
    assert main([*command[:3], "1", *command[4:], "--overwrite"]) == 0 and out.read_bytes() != written
    assert main(["resize", str(lora), "--rank", "2", "--output", str(lora), "--overwrite", "--base", str(base)]) == 2
    both = tmp_path / "both.safetensors"
    assert main(["combine", f"{lora}:0.5", str(out), "--base", str(base), "--output", str(both)]) == 0
    assert main(["info", str(lora), "--blocks", "--base", str(base)]) == 0
    assert re.search("IN01 +█", capsys.readouterr().out)
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert main(["convert", str(lora), "--to", "peft", "--base", str(base), "--output", str(folder)]) == 2
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_lora_of_zeros_is_said_to_be_one(tmp_path, base, targets):
    lora = make(tmp_path / "a.safetensors", targets, lora_rank=2)
    zeros = {name: torch.zeros_like(t) if "lora_up" in name else t for name, t in load_file(lora).items()}
    save_file(zeros, lora, {})
    with pytest.raises(UserError, match="changes nothing"):
        resize(lora, tmp_path / "b.safetensors", rank=1, base=base)
