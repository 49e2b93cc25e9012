"""Pictures that have not changed since a run has looked at them are not decoded again; all others are."""

from __future__ import annotations

import os
import shutil

import pytest

from lora_trainer.config import TrainConfig
from lora_trainer.dataset import images, known
from lora_trainer.dataset.cache import forget, rename_user
from lora_trainer.dataset.folder import scan
from lora_trainer.dataset.known import KnownPictures
from lora_trainer.dataset.picture_edits import PictureEdit, save_edits
from tests.pictures import draw_dataset


@pytest.fixture
def looked(tmp_path, monkeypatch):
    """(``look``, the names of the files that it has read): scans a folder as a run does."""
    monkeypatch.setattr(known, "FRESH", -(10**12))  # the files of a test are young
    read, original = [], images._read
    monkeypatch.setattr(images, "_read", lambda path: read.append(path.name) or original(path))
    data = draw_dataset(tmp_path / "data", 4)
    for picture in data.glob("*.png"):
        picture.write_bytes(picture.read_bytes() + b"1")  # which decoders do not read
    (data / "damaged.png").write_bytes(b"no picture")

    def look(use_masks=False):
        read.clear()
        return scan(
            TrainConfig(train_data_dir=str(data), trigger_word="zwx", output_dir=str(tmp_path), use_masks=use_masks),
            known=KnownPictures(tmp_path / "cache", data),
        )

    return look, read, data


def test_a_second_start_decodes_what_is_damaged_and_nothing_else(looked):
    look, read, _ = looked
    first = look()
    assert len(read) == 5
    assert look() == first and read == ["damaged.png"]
    assert look() == first and read == ["damaged.png"], "and a third one"


@pytest.mark.parametrize("times_stay", [False, True])
def test_a_picture_that_changed_is_decoded(looked, times_stay):
    look, read, data = looked
    first = look()
    one = data / first.samples[0].key
    before = os.stat(one)
    one.write_bytes(one.read_bytes()[:-1] + b"2")  # of the same size
    if times_stay:
        os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = look()
    assert sorted(read) == ["damaged.png", one.name]
    assert second.samples[0].digest != first.samples[0].digest and second.samples[1:] == first.samples[1:]


def test_edits_and_new_pictures_count(looked):
    look, read, data = looked
    first = look()
    names = [sample.key for sample in first.samples]
    shutil.copyfile(data / names[0], data / "new.png")
    save_edits(data, {names[1]: PictureEdit(rotate=90), names[2]: PictureEdit(excluded=True)})
    second = {sample.key: sample for sample in look().samples}
    assert sorted(read) == ["damaged.png", "new.png"]
    assert names[2] not in second and second[names[1]].digest != first.samples[1].digest
    assert second["new.png"].digest == second[names[0]].digest == first.samples[0].digest


def test_a_young_file_may_still_change_unseen(looked, monkeypatch):
    look, read, _ = looked
    monkeypatch.setattr(known, "FRESH", 3600 * 10**9)
    look()
    look()
    assert len(read) == 5


def test_it_goes_with_the_cache_and_a_damaged_list_is_made_anew(looked, tmp_path):
    look, read, data = looked
    first = look()
    (listed,) = (tmp_path / "cache" / "users").glob("*.pictures")
    listed.write_text(listed.read_text()[:-20] + "\nno line\n")
    assert look() == first and 1 < len(read) < 5
    forget(tmp_path / "cache", data)
    assert not listed.exists()
    assert look() == first and len(read) == 5


def test_a_mask_is_decoded_again_when_it_has_changed_and_never_taken_for_a_picture(looked):
    look, read, data = looked
    names = [sample.key for sample in look(True).samples]
    masks = [data / f"{name[:-4]}_mask.png" for name in names[:2]]
    for mask in masks:
        shutil.copyfile(data / names[3], mask)
    first = look(True)
    assert sorted(read) == sorted(["damaged.png", *names[:2], *(mask.name for mask in masks)])
    assert look(True) == first and read == ["damaged.png"]
    masks[0].write_bytes(masks[0].read_bytes() + b"2")
    assert look(True) == first and sorted(read) == sorted(["damaged.png", names[0], masks[0].name])
    (data / names[1]).unlink()
    last = look(True).samples[1]
    assert sorted(read) == sorted(["damaged.png", masks[1].name]) and last.digest == first.samples[3].digest
    masks[0].write_bytes(b"no picture")
    assert names[0] not in [sample.key for sample in look(True).samples]


def test_a_folder_that_is_renamed_keeps_what_is_known_of_it(looked, tmp_path):
    look, read, data = looked
    first = look()
    new = data.rename(tmp_path / "new")
    rename_user(tmp_path / "cache", data, new)
    assert len(list((tmp_path / "cache" / "users").iterdir())) == 1, "and nothing under the old name"
    read.clear()
    config = TrainConfig(train_data_dir=str(new), trigger_word="zwx", output_dir=str(tmp_path))
    second = scan(config, known=KnownPictures(tmp_path / "cache", new))
    assert read == ["damaged.png"] and [one.digest for one in second.samples] == [one.digest for one in first.samples]
