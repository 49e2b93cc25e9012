from __future__ import annotations

import errno
import json
import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora_trainer.dataset.cache import TensorCache, cache_key, latent_key, prompt_key
from lora_trainer.dataset.samples import Sample, View

KEY = cache_key(kind="test")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "moments": torch.randn(8, 4, 6, generator=generator),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "ids": torch.arange(5),
        "scalar": torch.tensor(1.5),
    }


def same(left, right) -> bool:
    return left is not None and set(left) == set(right) and all(
        left[name].dtype == right[name].dtype and left[name].equal(right[name]) for name in left
    )


def test_what_is_put_is_what_is_got(tmp_path):
    cache = TensorCache(tmp_path)
    assert KEY not in cache and cache.get(KEY) is None and not cache.contains(KEY)
    cache.put(KEY, tensors())
    assert KEY in cache and same(cache.get(KEY), tensors())
    assert same(TensorCache(tmp_path).get(KEY), tensors())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / KEY[:2] / f"{KEY}.cache"], "one file, no leftovers, nothing that a WebUI lists"
    assert same(safetensors.torch.load_file(files[0]), tensors()), "any safetensors reader opens it"


def test_views_and_shared_memory_and_gradients(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    given = {"t": base.T, "row": base[1], "same": base, "grad": torch.ones(2, requires_grad=True) * 2}
    TensorCache(tmp_path).put(KEY, given)
    assert same(TensorCache(tmp_path).get(KEY), {name: tensor.detach() for name, tensor in given.items()})


def test_truncated_and_damaged_files_are_misses_and_are_rewritten(tmp_path):
    cache = TensorCache(tmp_path)
    cache.put(KEY, tensors())
    path = cache.path(KEY)
    good = path.read_bytes()
    rng = random.Random(0)
    damaged = [b"", b"x", good[:7], good[:8], good[:100], good[:-1], good + b"\0", b"\xff" * len(good), b"[]" * 200]
    for _ in range(300):
        data = bytearray(good)
        position = rng.randrange(len(data))
        data[position] ^= 1 << rng.randrange(8)
        damaged.append(bytes(data))
    for data in damaged:
        path.write_bytes(data)
        found = cache.get(KEY)
        # A changed bit in white space of the header may leave the content as it was; never another content.
        assert found is None or same(found, tensors())
        assert (KEY in cache) == (found is not None)
    path.write_bytes(good[:-1])
    assert KEY not in cache
    cache.put(KEY, tensors())
    assert same(cache.get(KEY), tensors())


def test_a_file_under_another_name_is_a_miss(tmp_path):
    cache = TensorCache(tmp_path)
    cache.put(KEY, tensors())
    other = cache_key(kind="other")
    cache.path(other).parent.mkdir(exist_ok=True)
    cache.path(KEY).rename(cache.path(other))
    assert cache.get(other) is None


def test_a_safetensors_file_without_checksum_is_a_miss(tmp_path):
    cache = TensorCache(tmp_path)
    cache.path(KEY).parent.mkdir()
    safetensors.torch.save_file(tensors(), cache.path(KEY))
    assert cache.get(KEY) is None


def test_a_full_disk_warns_once_and_keeps_the_rest_in_memory(tmp_path, monkeypatch):
    warnings: list[str] = []
    cache = TensorCache(tmp_path, warnings.append)
    cache.put(KEY, tensors())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    later = [cache_key(index=index) for index in range(3)]
    for key in later:
        cache.put(key, tensors())
    assert len(warnings) == 1 and "No space left" in warnings[0]
    assert all(key in cache and same(cache.get(key), tensors()) for key in (KEY, *later))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{KEY}.cache"], "no half files remain"
    assert later[0] not in TensorCache(tmp_path)


def test_a_folder_that_cannot_be_made_warns(tmp_path):
    (tmp_path / "file").write_text("in the way")
    warnings: list[str] = []
    cache = TensorCache(tmp_path / "file", warnings.append)
    assert cache.get(KEY) is None
    cache.put(KEY, tensors())
    assert same(cache.get(KEY), tensors()) and len(warnings) == 1


def test_what_is_kept_in_memory_is_a_copy(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = TensorCache(tmp_path / "file", lambda text: None)
    given = torch.zeros(3)
    cache.put(KEY, {"x": given})
    given += 1
    assert cache.get(KEY)["x"].tolist() == [0, 0, 0]


def test_many_writers_of_one_key_never_show_half_a_file(tmp_path):
    cache = TensorCache(tmp_path)
    cache.put(KEY, tensors())
    wrong = []

    def work():
        for _ in range(30):
            TensorCache(tmp_path).put(KEY, tensors())
            if not same(cache.get(KEY), tensors()):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_cache_key_is_canonical():
    assert cache_key(a=1, b=(2, 3)) == cache_key(b=[2, 3], a=1)
    assert cache_key(a=1) != cache_key(a="1") and cache_key(a=1) != cache_key(b=1)
    assert cache_key(text="中\ud800") == cache_key(text="中\ud800")
    assert len(KEY) == 64 and int(KEY, 16) >= 0
    with pytest.raises(TypeError):
        cache_key(path=Path("a"))
    with pytest.raises(ValueError):
        cache_key(x=float("nan"))


def test_everything_that_changes_latents_changes_their_key():
    sample = Sample("a.png", "a.png", "x", (900, 500), "0" * 64)
    item = View(0, (512, 512), (922, 512), (205, 0), False, (500, 900, 0, 205, 512, 512))
    keys = [
        latent_key(sample, item, "vae"),
        latent_key(sample, item, "other vae"),
        latent_key(replace(sample, digest="1" * 64), item, "vae"),
        latent_key(sample, replace(item, bucket=(512, 448)), "vae"),
        latent_key(sample, replace(item, scaled=(923, 512)), "vae"),
        latent_key(sample, replace(item, crop=(204, 0)), "vae"),
        latent_key(sample, replace(item, flip=True), "vae"),
    ]
    assert len(set(keys)) == len(keys)
    # Names, captions and the place in the list do not change what the VAE sees.
    moved = replace(sample, file="b.png", key="b.png", caption="y")
    assert latent_key(moved, replace(item, sample=4), "vae") == keys[0]


def test_everything_that_changes_an_encoded_caption_changes_its_key():
    keys = [
        prompt_key("a", "te", 225, False),
        prompt_key("b", "te", 225, False),
        prompt_key("a", "te2", 225, False),
        prompt_key("a", "te", 75, False),
        prompt_key("a", "te", 225, True),
        cache_key(kind="prompt"),
    ]
    assert len(set(keys)) == len(keys)
    assert json.dumps(keys)


def test_what_is_known_to_be_there_is_not_read_again_and_damage_is_found_when_it_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    TensorCache(tmp_path, user=folder).put(KEY, tensors())
    path = TensorCache(tmp_path).path(KEY)
    old = path.stat().st_mtime_ns - 10**10
    os.utime(path, ns=(old, old))
    assert KEY in TensorCache(tmp_path, user=folder), "its time has changed: it is read, and noted as it is now"
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    cache = TensorCache(tmp_path, user=folder)
    assert KEY in cache and not read
    data = bytearray(read_bytes(path))
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(old, old))  # as a disk damages a file
    assert KEY in cache and cache.get(KEY) is None
    assert KEY not in cache and KEY not in TensorCache(tmp_path, user=folder), "it is made again"
    path.unlink()
    assert KEY not in cache


def test_what_another_process_has_made_is_not_read_once_the_list_was(tmp_path, monkeypatch):
    mine, other = (TensorCache(tmp_path, user=tmp_path / "pictures") for _ in range(2))
    other.put(KEY, tensors())
    later = time.time_ns() + 10**10
    monkeypatch.setattr(time, "time_ns", lambda: later)
    mine.refresh()
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    assert KEY in mine
