from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer.config import from_mapping
from lora_trainer.errors import ConfigError, UserError
from lora_trainer.host.base import AccessPolicy
from lora_trainer.workspace.paths import allowed, confine_config, confined, redact
from tests.workspace.evil import EVIL_PATHS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    base = tmp_path_factory.mktemp("confined")
    root = base / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").touch()
    (base / "secret.txt").write_text("secret")
    (base / "root-beside").mkdir()
    (root / "link").symlink_to(base / "secret.txt")
    (root / "folder-link").symlink_to(base)
    (root / "circle").symlink_to(root / "circle")
    (root / "inner").symlink_to(root / "sub")
    return root


@pytest.mark.parametrize("path", ["sub/a.png", "new.png", "sub/ünï 猫.png", "a..b.png", "inner/a.png", "sub/%2e%2e"])
def test_what_is_inside_is_found(root, path):
    assert root in confined(root, path).parents


LINKS = ["link", "folder-link/secret.txt", "circle", "circle/x", "sub/./a.png", "a//b"]


@pytest.mark.parametrize("path", [*EVIL_PATHS, *LINKS])
def test_what_leads_out_is_refused_with_the_same_words(root, path):
    with pytest.raises(UserError) as caught:
        confined(root, path)
    assert caught.value.message == "This path may not be used here."


PIECES = st.sampled_from(
    ["..", ".", "", "~", "/", "\\", "C:", "\0", "link", "folder-link", "sub", "a.png", "secret.txt", "%2e%2e", " ",
     "..\\", "\\\\server\\share", "file:", "root-beside", "circle", "\ud800", "x" * 300, "\n"]
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(PIECES, st.text(max_size=6)), max_size=6), st.sampled_from(["/", "", "\\"]))
def test_nothing_that_is_accepted_lies_outside(root, pieces, separator):
    text = separator.join(pieces)
    try:
        path = confined(root, text)
    except UserError:
        return
    assert Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
    assert "\0" not in text and "\\" not in text and ".." not in text.split("/")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(PIECES, st.text(max_size=6)), max_size=6), st.booleans())
def test_server_folders_are_allowed_under_the_roots_only(root, pieces, inside):
    text = str(root) + "/" + "/".join(pieces) if inside else "/".join(pieces)
    data = root.parent / "data"
    try:
        path = allowed(text, data, AccessPolicy(roots=(root,)))
    except UserError:
        return
    assert path.is_relative_to(root) or path.is_relative_to(data)


def test_without_roots_any_folder_is_fine_and_hidden_paths_allow_the_trainers_own_only(root):
    data, outside = root.parent / "data", root / "sub"
    assert allowed(str(outside), data, AccessPolicy()) == outside
    hidden = AccessPolicy(hide_paths=True)
    with pytest.raises(UserError, match="may not be named"):
        allowed(str(outside), data, hidden)
    assert allowed(str(data / "datasets/x"), data, hidden) == data / "datasets/x"
    for text in ("", "a\0b", "x" * 5000, "\ud800"):
        with pytest.raises(UserError):
            allowed(text, data, AccessPolicy(roots=(root,)))


def test_every_path_of_a_configuration_is_checked_and_all_problems_told(root):
    data = root.parent / "data"
    fields = ("train_data_dir", "metadata_path", "reg_data_dir", "init_lora", "vae", "base_model", "resume",
              "merge_into_base")  # fmt: skip
    config = from_mapping(dict.fromkeys(fields, "/etc/passwd"))
    with pytest.raises(ConfigError) as caught:
        confine_config(config, data, AccessPolicy(roots=(root,)))
    assert {problem.field for problem in caught.value.problems} == set(fields)
    config = from_mapping(dict.fromkeys(fields, str(root / "sub")))
    assert confine_config(config, data, AccessPolicy(roots=(root,))).vae == str(root / "sub")


@pytest.mark.parametrize("field", ["base_model", "vae"])
def test_relative_ways_out_are_no_model_names(root, field):
    for evil in ("../../x", "..", "~/x", "models/../../x", "/x"):
        config = from_mapping({field: evil})
        with pytest.raises(ConfigError):
            confine_config(config, root.parent / "data", AccessPolicy(roots=(root,)))
    config = from_mapping({field: "known/model [abc]" if field == "base_model" else "kl-f8.safetensors"})
    known = {"known/model [abc]"}
    plain = from_mapping({field: "model"})
    assert getattr(confine_config(plain, root.parent / "data", AccessPolicy(roots=(root,))), field) == "model"
    assert getattr(confine_config(config, root.parent / "data", AccessPolicy(roots=(root,)), known), field)


def test_a_dataset_of_the_library_has_a_name(root):
    data = root.parent / "data"
    (data / "datasets" / "cats").mkdir(parents=True, exist_ok=True)
    config = confine_config(from_mapping({"train_data_dir": "cats"}), data, AccessPolicy(hide_paths=True))
    assert config.train_data_dir == str(data / "datasets" / "cats")
    (data / "datasets" / "way-out").symlink_to("/etc")
    with pytest.raises(ConfigError):
        confine_config(from_mapping({"train_data_dir": "way-out"}), data, AccessPolicy(hide_paths=True))


def test_a_user_without_a_home_reads_redacted_text_too(root, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7, raising=False)
    assert redact(f"{root}/x", root, None) == "<trainer>/x"


def test_redacted_text_names_no_folder(root):
    data = root / "sub"
    text = redact(f"{data}/jobs/1 and {root}/Lora/x could not be read", data, root / "Lora")
    assert str(root) not in text.replace(str(root), "", 0) and "<trainer>/jobs/1" in text and "<Lora>/x" in text


def test_the_evil_ones_are_many():
    assert len(set(EVIL_PATHS)) > 250 and len(list(itertools.islice(EVIL_PATHS, 5))) == 5


def test_further_folders_are_confined_as_the_first_one_is(root):
    access = AccessPolicy(roots=(root,), hide_paths=False)
    inside, outside = root / "sub", root.parent / "root-beside"
    config = from_mapping({"train_data_dir": str(inside), "more_folders": [f"3_a dog={inside}", str(inside)]})
    kept = confine_config(config, root / "data", access)
    assert kept.more_folders == [f"3_a dog={inside}", str(inside)]
    with pytest.raises(ConfigError, match="more_folders"):
        confine_config(from_mapping({"more_folders": [f"3_a dog={outside}"]}), root / "data", access)
