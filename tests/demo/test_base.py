"""The embedded base: complete, readable, and not built twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lora_trainer.demo import base, networks
from lora_trainer.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return base.build_base(tmp_path_factory.mktemp("base") / "base.safetensors")


def test_embeddings_are_the_same_everywhere():
    table = networks.constructed_embeddings()
    # Written down once; a change would silently change what every unknown word means to a trained base.
    assert table[100, 1:5] == pytest.approx([0.52516544, -0.66923207, -0.42035961, -0.09797379], abs=1e-7)
    assert table[:, 1:].std() == pytest.approx(0.5, abs=1e-3)
    assert (table[:, 0] != 0).sum() == 2


def test_checkpoint_has_the_layout_of_sd1(checkpoint):
    with safe_open(checkpoint, "numpy") as file:
        names = set(file.keys())
        assert {str(file.get_slice(n).get_dtype()) for n in names} == {"F16", "I64"}
        assert file.get_slice(base.UNET + "input_blocks.0.0.weight").get_shape() == [64, 4, 3, 3]
        assert file.get_slice(base.TEXT + "embeddings.token_embedding.weight").get_shape() == [49408, 64]
        assert all(np.isfinite(file.get_tensor(n)).all() for n in names)
    counts = [sum(n.startswith(prefix) for n in names) for prefix in (base.UNET, base.VAE, base.TEXT)]
    assert [*counts, len(names)] == [440, 176, 197, 813]


def test_diffusers_reads_the_unet_as_it_was_trained(checkpoint):
    """The renaming against diffusers' own, which is independent of it."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from safetensors.torch import load_file

    config = dict(networks.new_unet().config)
    tensors = load_file(checkpoint)
    converted = convert_ldm_unet_checkpoint(dict(tensors), config)
    expected = {name: tensors[base.UNET + networks.ldm_unet_key(name)] for name in networks.new_unet().state_dict()}
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_the_same_bytes_are_built_every_time(checkpoint, tmp_path):
    assert base.build_base(tmp_path / "again.safetensors").read_bytes() == checkpoint.read_bytes()


def test_it_is_built_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv(base.CACHE_VARIABLE, str(tmp_path))
    first = base.build_base()
    assert first.parent == tmp_path
    stamp = first.stat().st_mtime_ns
    assert base.build_base() == first
    assert first.stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv(base.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert base.cache_folder() == tmp_path / "sd-webui-lora-trainer"


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_a_damaged_installation_is_named(tmp_path, monkeypatch, content):
    shipped = tmp_path / "base.safetensors"
    if content is not None:
        shipped.write_bytes(content)
    monkeypatch.setattr(base, "SHIPPED", shipped)
    with pytest.raises(UserError, match=r"base\.safetensors"):
        base.build_base(tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_project_reads_it(checkpoint):
    """Heads do not follow from shapes; the file says them."""
    from lora_trainer.models.hints import file_hints

    with safe_open(checkpoint, "numpy") as file:
        hints = file_hints(checkpoint, file.keys(), file.metadata())
    assert (hints.num_heads, hints.text_heads, hints.prediction_type) == (4, (4,), "epsilon")
