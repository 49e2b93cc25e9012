"""Presets of one's own: what goes into their files, and what is believed of a file that is read."""

from __future__ import annotations

import pytest
import yaml

from lora_trainer.config import FACTS
from lora_trainer.errors import UserError
from lora_trainer.workspace.presets import HELD, OwnPresets
from tests.workspace.evil import EVIL_PATHS


@pytest.fixture
def presets(tmp_path):
    return OwnPresets(tmp_path)


def by_name(presets):
    return {preset.name: preset for preset in presets.presets()}


def test_what_is_saved_comes_back(presets):
    settings = {"network_dim": 8, "learning_rate": "2e-4", "optimizer": "lion", "flip": False}
    saved = presets.save("我的 preset", "style", settings)
    assert saved.settings == {"lora_rank": 8, "learning_rate": 2e-4, "optimizer": "lion", "flip": False}
    assert by_name(presets) == {"我的 preset": saved}
    complete = presets.save("all", None, {"lora_rank": 8, "flip": False})
    assert complete.settings == {"lora_rank": 8}, "all that is not said is a default"


def test_nothing_of_one_lora_and_no_path_is_saved(presets, tmp_path):
    own = {"output_name": "x", "trigger_word": "zwx", "train_data_dir": "/data", "base_model": "m", "overwrite": True,
           "description": "mine", "plugins": ["evil.py"], "init_lora": "/x.safetensors", "merge_into_base": "/y",
           "cache_dir": "/tmp", "output_dir": "/tmp", "vae": "/vae", "mask_dir": "/r", "resume": "never"}  # fmt: skip
    assert presets.save("a", "style", {**own, "epochs": 3}).settings == {"epochs": 3}
    assert "/" not in (tmp_path / "presets" / "a.yaml").read_text()
    assert not {name for name in HELD if FACTS[name].path}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("settings: {lora_rank: 8, plugins: [/evil.py]}", "plugins"),
        ("settings: {merge_into_base: /etc/passwd}", "merge_into_base"),
        ("settings: {lora_rank: many}", "lora_rank: "),
        ("settings: {no_such_thing: 1}", "no_such_thing"),
        ("kind: evil\nsettings: {}", "no preset 'evil'"),
        ("kind: [style]\nsettings: {}", "no preset"),
        ("settings: [1, 2]", "is no preset"),
        ("more: 1\nsettings: {}", "is no preset"),
        ("settings: {1: 2}", "1"),
        ("just words", "holds a str"),
        ("a: [", "cannot be read as YAML"),
        ("settings: {optimizer_args: {a: &a [x], b: *a}}", "is no preset"),
        ("settings: !!python/object/apply:os.system [echo]", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("#" * 70_000, "larger than 64 KB"),
        ("[" * 5000, "cannot be read as YAML"),
    ],
)
def test_a_file_is_not_believed(presets, tmp_path, content, words):
    presets.save("good", "style", {"epochs": 3})
    path = tmp_path / "presets" / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = by_name(presets)
    assert words in found["bad"].problem and found["bad"].settings == {}
    assert found["good"].settings == {"epochs": 3} and found["good"].problem is None
    presets.delete("bad")
    assert list(by_name(presets)) == ["good"]


def test_a_link_that_leads_out_is_not_read(presets, tmp_path):
    presets.save("good", "style", {})
    secret = tmp_path / "secret.yaml"
    secret.write_text("settings: {epochs: 7}")
    (tmp_path / "presets" / "link.yaml").symlink_to(secret)
    assert by_name(presets)["link"].problem and not by_name(presets)["link"].settings
    with pytest.raises(UserError):
        presets.delete("link")
    assert secret.exists()


def test_names(presets, tmp_path):
    presets.save("Mine", "style", {"epochs": 3})
    with pytest.raises(UserError, match="There is a preset Mine already"):
        presets.save("mine", "style", {})
    presets.save("Mine", "scene", {"epochs": 4}, overwrite=True)
    presets.save("other", None, {})
    with pytest.raises(UserError, match="already"):
        presets.rename("other", "MINE")
    presets.rename("other", "another")
    assert list(by_name(presets)) == ["another", "Mine"] and by_name(presets)["Mine"].kind == "scene"
    for name in [path for path in EVIL_PATHS if path != "~"]:
        for act in (lambda name=name: presets.save(name, "style", {}), lambda name=name: presets.rename("Mine", name),
                    lambda name=name: presets.delete(name)):  # fmt: skip
            with pytest.raises(UserError):
                act()
    assert sorted(path.name for path in (tmp_path / "presets").iterdir()) == ["Mine.yaml", "another.yaml"]


def test_what_is_saved_replaces_the_file_as_a_whole(presets, tmp_path, monkeypatch):
    presets.save("mine", "style", {"epochs": 3})
    before = (tmp_path / "presets" / "mine.yaml").read_bytes()

    def fails(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fails)
        with pytest.raises(UserError):
            presets.save("mine", "style", {"epochs": 4}, overwrite=True)
    assert (tmp_path / "presets" / "mine.yaml").read_bytes() == before
    assert [path.name for path in (tmp_path / "presets").iterdir()] == ["mine.yaml"]
    assert yaml.safe_load(before) == {"kind": "style", "settings": {"epochs": 3}}
