"""A merged checkpoint: another model with the same keys, that computes what base and LoRA compute together."""

from __future__ import annotations

import pytest
import safetensors
import safetensors.torch
import torch

from lora_trainer.adapters.export import save_diffusers, save_lora
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.adapters.merge import merge
from lora_trainer.errors import UserError
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import refuse_other_family
from tests import tiny
from tests.adapters.layers import randomize, settings
from tests.adapters.test_diffusers import BASES, assert_same, outputs

SMALL = {"sd1": {"depths": (1, 0, 0, 0)}, "sd2": {"depths": (1, 0, 0, 0)}, "sdxl": {"depths": (0, 1, 0)}}
KINDS = {
    "lora": {"alpha": 2.0, "conv_rank": 2},
    "dora": {"dora": True},
    "loha": {"adapter": "loha", "conv_rank": 2},
    "lokr": {"adapter": "lokr", "lora_rank": 1},
}


def trained(model, **values):
    adapters = AdapterSet.build(
        model.lora_targets(), settings(**{"lora_rank": 4, "train_text_encoder": True, **values})
    )
    randomize(adapters, deviation=0.1)
    return adapters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2", "sdxl"))])
def test_merged_file_computes_what_base_and_lora_do(tmp_path, family, kind):
    base = BASES[family](tmp_path / "base.safetensors", metadata={"format": "pt", "note": "mine"}, **SMALL[family])
    out = tmp_path / "merged.safetensors"
    with FileLender(base).borrow() as model:
        adapters = trained(model, **KINDS[kind])
        save_lora(adapters, tmp_path / "lora.safetensors", {}, "fp32")
        adapters.multiplier = 0.6
        with adapters:
            expected = outputs(model)
        result = merge(base, tmp_path / "lora.safetensors", 0.6, out, targets=model.lora_targets())
    assert result.merged == len(adapters) and result.unmatched == ()
    with FileLender(out).borrow() as model:
        assert_same(outputs(model), expected)
    with safetensors.safe_open(base, "pt") as one, safetensors.safe_open(out, "pt") as other:
        assert one.metadata() == other.metadata() and set(one.keys()) == set(other.keys())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base.safetensors",
        "lora.safetensors",
        "merged.safetensors",
    ]


def test_number_format_is_kept_and_the_rest_is_untouched(tmp_path):
    base = tiny.tiny_sd1(tmp_path / "base.safetensors", dtype=torch.float16, **SMALL["sd1"])
    with FileLender(base).borrow() as model:
        targets = model.lora_targets()
        adapters = trained(model, target_modules=["to_q"])
        save_diffusers(adapters, tmp_path, {})
        merge(base, tmp_path, 1.0, tmp_path / "out.safetensors", targets=targets)
    before, after = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("base", "out"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert all(before[key].dtype == after[key].dtype for key in before)
    trained_here = {f"{target.checkpoint_name}.weight" for target, _ in adapters.items()}
    assert changed == trained_here


@pytest.fixture
def files(tmp_path):
    base = tiny.tiny_sd1(tmp_path / "base.safetensors", **SMALL["sd1"])
    with FileLender(base).borrow() as model:
        targets = model.lora_targets()
        adapters = trained(model)
        save_lora(adapters, tmp_path / "lora.safetensors", {"ss_base_model_version": "sd_v1"})
        yield tmp_path, targets


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_makes_no_checkpoint(files, weight):
    folder, targets = files
    out = folder / "out.safetensors"
    with pytest.raises(UserError, match="no number"):
        merge(folder / "base.safetensors", folder / "lora.safetensors", weight, out, targets=targets)
    assert not out.exists()


def test_nothing_is_written_over(files):
    folder, targets = files
    base, lora, out = (folder / f"{name}.safetensors" for name in ("base", "lora", "out"))
    contents = {path: path.read_bytes() for path in (base, lora)}
    (folder / "link.safetensors").symlink_to(base)
    for target in (base, lora, folder / "link.safetensors"):
        with pytest.raises(UserError, match="would replace"):
            merge(base, lora, 1.0, target, targets=targets, overwrite=True)
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already") as error:
        merge(base, lora, 1.0, out, targets=targets)
    assert error.value.field == "overwrite" and out.read_text() == "mine"
    merge(base, lora, 1.0, out, targets=targets, overwrite=True)
    assert out.stat().st_size > 1000 and {path: path.read_bytes() for path in (base, lora)} == contents


@pytest.mark.parametrize("what", ["family", "shape", "nothing", "nan", "folder", "ckpt", "absent", "damaged", "ending"])
def test_refusals_leave_nothing_behind(files, what):
    folder, targets = files
    base, lora, out = (folder / f"{name}.safetensors" for name in ("base", "lora", "out"))
    family = "sdxl" if what == "family" else "sd1"
    tensors = safetensors.torch.load_file(lora)
    key = next(name for name in tensors if name.endswith("attn2_to_k.lora_down.weight"))
    if what == "shape":
        tensors[key] = torch.ones(4, 99)
    if what == "nan":
        tensors[key][0, 0] = float("nan")
    if what == "nothing":
        tensors = {name.replace("lora_", "lora_other_", 1): value for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, lora, {"ss_base_model_version": "sd_v1"})
    if what == "damaged":
        base.write_bytes(base.read_bytes()[:-100])
    base = {"folder": folder, "ckpt": folder / "base.ckpt", "absent": folder / "no.safetensors"}.get(what, base)
    if what == "ckpt":
        base.write_bytes(b"x")
    if what == "ending":
        out = folder / "out.ckpt"
    before = sorted(folder.iterdir())
    with pytest.raises(UserError):
        refuse_other_family(read_lora(lora).metadata, lora, family)
        merge(base, lora, 1.0, out, targets=targets)
    assert sorted(folder.iterdir()) == before


def test_what_the_base_lacks_is_told(files):
    folder, targets = files
    lora = folder / "lora.safetensors"
    tensors = safetensors.torch.load_file(lora)
    tensors.update(
        {"lora_unet_new.lora_down.weight": torch.ones(1, 2), "lora_unet_new.lora_up.weight": torch.ones(2, 1)}
    )
    tensors["lora_unet_old.diff"] = torch.ones(2)
    safetensors.torch.save_file(tensors, lora)
    result = merge(folder / "base.safetensors", lora, 1.0, folder / "out.safetensors", targets=targets)
    assert set(result.unmatched) == {"lora_unet_new"} and "1 × diff" in result.notes[0]
