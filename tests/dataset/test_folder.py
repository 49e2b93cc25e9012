"""Which pictures of a folder are taken, and which caption each gets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.caption_files import read_captions
from lora_trainer.dataset.folder import scan
from lora_trainer.dataset.listing import list_folder
from lora_trainer.dataset.metadata import CaptionProblem
from lora_trainer.errors import UserError
from tests.dataset.folders import captions, picture, scan_folder, write
from tests.pictures import draw_dataset

# --- which pictures ---------------------------------------------------------------------------------------------


def test_pictures_of_all_sub_folders_with_every_ending_and_name(tmp_path):
    names = ["a.png", "B.JPG", "中文 图片 1.webp", "sub/deep/ö.bmp", "x y/#1, 'q'.gif", "wrong.tiff", "t.tif", "j.jpeg"]
    for name in names:
        picture(tmp_path / name)
    dataset = scan_folder(tmp_path, trigger_word="sks")
    assert list(captions(dataset)) == sorted(names)
    assert all(sample.size == (32, 24) and len(sample.digest) == 64 for sample in dataset.samples)
    assert not dataset.skipped


def test_hidden_files_caches_masks_and_outputs_are_no_samples(tmp_path):
    for name in (
        "a.png", "a.mask.png", "._a.png", ".cache/b.png", "__MACOSX/c.png", "@eaDir/d.png", "out/preview.png",
        "reg/1_dog/e.png", "latents/f.png",
    ):  # fmt: skip
        picture(tmp_path / name)
    config = TrainConfig(
        train_data_dir=str(tmp_path),
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "latents"),
        reg_data_dir=str(tmp_path / "reg"),
        trigger_word="sks",
    )
    samples = scan(config).samples
    assert [(sample.key, sample.caption, sample.is_regularization) for sample in samples] == [
        ("a.png", "sks", False),
        ("reg:1_dog/e.png", "dog", True),
    ]
    assert samples[0].mask_path == tmp_path / "a.mask.png" and samples[1].mask_path is None


def test_the_output_folder_may_be_the_data_folder_itself(tmp_path):
    picture(tmp_path / "a.png")
    assert scan(TrainConfig(train_data_dir=str(tmp_path), output_dir=str(tmp_path), trigger_word="x")).samples


def test_kohya_folders_nested_and_as_the_root(tmp_path):
    root = tmp_path / "3_sks dog"
    for name in ("a.png", "5_a b_c/b.png", "5_a b_c/plain/c.png", "10_x/2_y/d.png"):
        picture(root / name)
    dataset = scan_folder(root, repeats=7, trigger_word="trigger")
    found = {sample.key: (sample.repeats, sample.caption) for sample in dataset.samples}
    assert found == {
        "a.png": (3, "sks dog"),
        "5_a b_c/b.png": (5, "a b_c"),
        "5_a b_c/plain/c.png": (5, "a b_c"),
        "10_x/2_y/d.png": (2, "y"),
    }


def test_folder_names_that_are_dates_or_zero(tmp_path):
    picture(tmp_path / "20240131_party" / "a.png")
    picture(tmp_path / "2024_trip" / "b.png")
    picture(tmp_path / "0_off" / "c.png")
    dataset = scan_folder(tmp_path, trigger_word="sks", repeats=4)
    assert [(sample.key, sample.repeats) for sample in dataset.samples] == [
        ("20240131_party/a.png", 4),
        ("2024_trip/b.png", 2024),
    ]
    assert [item.reason for item in dataset.skipped] == ["its folder's name says 0 repeats"]
    assert any("20240131_party" in text for text in dataset.warnings)
    assert any("2024 repeats" in text for text in dataset.warnings)


def test_links_are_followed_and_loops_end(tmp_path):
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    picture(root / "a.png")
    picture(elsewhere / "b.png")
    (elsewhere / "again").symlink_to(elsewhere)
    (elsewhere / "home").symlink_to(root)
    (root / "linked").symlink_to(elsewhere)
    (root / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "self.png").symlink_to(root / "self.png")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    (root / "c.png").symlink_to(elsewhere / "b.png")
    os.mkfifo(root / "pipe.png")  # reading it would block for ever
    dataset = scan_folder(root, trigger_word="sks")
    assert sorted(captions(dataset)) == ["a.png", "c.png", "linked/b.png"]
    assert {item.path.name for item in dataset.skipped} == {"self.png", "gone.png"}
    assert sum("the link is left out" in text for text in dataset.warnings) == 4


def test_unusable_pictures_are_skipped_with_their_reason(tmp_path):
    picture(tmp_path / "good.png")
    write(tmp_path / "empty.png", b"")
    write(tmp_path / "text.jpg", "not a picture")
    picture(tmp_path / "1x1.png", (1, 1))
    picture(tmp_path / "long.png", (20000, 20))
    write(tmp_path / "cut.png", (tmp_path / "good.png").read_bytes()[:55])
    write(tmp_path / "phone.heic", b"\0\0\0\x18ftypheic")
    dataset = scan_folder(tmp_path, trigger_word="sks")
    assert list(captions(dataset)) == ["good.png"]
    reasons = {item.path.name: item.reason for item in dataset.skipped}
    assert set(reasons) == {"empty.png", "text.jpg", "1x1.png", "long.png", "cut.png", "phone.heic"}
    assert "0 bytes" in reasons["empty.png"]
    assert "no picture" in reasons["text.jpg"]
    assert "too small" in reasons["1x1.png"]
    assert "aspect ratio" in reasons["long.png"]
    assert "damaged" in reasons["cut.png"]
    assert "HEIC" not in reasons["phone.heic"] and ".heic" in reasons["phone.heic"]


def test_a_name_that_is_not_utf8_is_skipped(tmp_path):
    picture(tmp_path / "good.png")
    os.link(tmp_path / "good.png", os.path.join(os.fsencode(tmp_path), b"\xff.png"))
    dataset = scan_folder(tmp_path, trigger_word="sks")
    assert list(captions(dataset)) == ["good.png"]
    assert "UTF-8" in dataset.skipped[0].reason


def test_no_usable_picture_left_lists_the_reasons(tmp_path):
    write(tmp_path / "a.png", b"")
    with pytest.raises(UserError, match=r"a\.png is empty") as caught:
        scan_folder(tmp_path, trigger_word="sks")
    assert caught.value.field == "train_data_dir"


def test_no_pictures_says_what_was_looked_for_and_found(tmp_path):
    write(tmp_path / "archive.zip", b"PK")
    with pytest.raises(UserError, match=r"\.png, \.jpg.*found 1 × \.zip"):
        scan_folder(tmp_path)
    with pytest.raises(UserError, match=r"train_data_dir: There is no folder .*missing"):
        scan_folder(tmp_path / "missing")
    with pytest.raises(UserError, match="is a file, not a folder"):
        scan_folder(tmp_path / "archive.zip")
    with pytest.raises(UserError, match="train_data_dir: is empty"):
        scan(TrainConfig())


def test_a_broken_mask_matters_only_when_masks_are_used(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    write(tmp_path / "a.mask.png", b"broken")
    assert len(scan_folder(tmp_path, trigger_word="sks").samples) == 2
    dataset = scan_folder(tmp_path, trigger_word="sks", use_masks=True)
    assert list(captions(dataset)) == ["b.png"]
    assert "a.mask.png" in dataset.skipped[0].reason


def test_progress_counts_every_picture(tmp_path):
    for index in range(3):
        picture(tmp_path / f"{index}.png")
    seen = []
    config = TrainConfig(train_data_dir=str(tmp_path), trigger_word="x")
    scan(config, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- which caption ----------------------------------------------------------------------------------------------


def test_precedence_of_captions_step_by_step(tmp_path):
    folder = tmp_path / "2_class tokens"
    key = "2_class tokens/a.png"
    picture(tmp_path / key)

    def caption(**settings) -> str:
        return captions(scan_folder(tmp_path, trigger_word="trigger", caption_extension=".tags", **settings))[key]

    assert caption() == "class tokens"
    write(folder / "a.caption", "from caption")
    assert caption() == "from caption"
    write(folder / "a.txt", "from txt")
    assert caption() == "from txt"
    write(folder / "a.tags", "from tags")
    assert caption() == "from tags"
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": key, "text": "from jsonl"}))
    assert caption() == "from jsonl"
    write(tmp_path / "metadata.csv", f"filename,prompt\n{key},from csv\n")
    assert caption() == "from csv"
    write(folder / "metadata.csv", "filename,prompt\na.png,from the nearer csv\n")
    assert caption() == "from the nearer csv"
    named = write(tmp_path.parent / "named.csv", f"filename,prompt\n{key},from the named csv\n")
    assert caption(metadata_path=str(named)) == "from the named csv"


def test_caption_files_beside_the_full_name_and_in_capitals(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    write(tmp_path / "a.png.txt", "one")
    write(tmp_path / "B.TXT", "\ufefftwo\r\nlines\r\n")
    assert captions(scan_folder(tmp_path)) == {"a.png": "one", "b.png": "two\r\nlines"}


def test_an_empty_caption_file_counts_as_none(tmp_path):
    picture(tmp_path / "a.png")
    write(tmp_path / "a.txt", " \n")
    dataset = scan_folder(tmp_path, trigger_word="sks")
    assert captions(dataset) == {"a.png": "sks"}
    assert any("a.txt: is empty" in text for text in dataset.warnings)


def test_a_picture_without_caption_is_named(tmp_path):
    for index in range(8):
        picture(tmp_path / f"p{index}.png")
    write(tmp_path / "p0.txt", "a caption")
    with pytest.raises(UserError, match=r"7 of 8 pictures have no caption.*p1\.png.*and 2 more") as caught:
        scan_folder(tmp_path)
    assert "p0.png" not in str(caught.value) and caught.value.remedy
    # The reason is shown as well, when rows were meant for them.
    write(tmp_path / "metadata.csv", "filename,prompt\nelse/p1.png,x\n")
    with pytest.raises(UserError, match=r"line 2: else/p1\.png is not in the folder"):
        scan_folder(tmp_path)


def test_a_regularization_picture_does_not_take_the_trigger_word(tmp_path):
    picture(tmp_path / "data" / "a.png")
    picture(tmp_path / "reg" / "b.png")
    with pytest.raises(UserError, match=r"reg_data_dir: .*b\.png"):
        scan_folder(tmp_path / "data", reg_data_dir=str(tmp_path / "reg"), trigger_word="sks")


def test_partial_metadata_is_mentioned(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    write(tmp_path / "metadata.csv", "filename,prompt\na.png,x\n")
    dataset = scan_folder(tmp_path, trigger_word="sks")
    assert dataset.warnings == ("1 pictures have no caption of their own: b.png.",)


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ("一张照片".encode("gb18030"), r"a\.txt, line 1: is not UTF-8: byte 0xd5 at position 2"),
        (b"\xef\xbb\xbfok\nbad \xff", r"a\.txt, line 2: is not UTF-8: byte 0xff at position 10"),
        ("photo".encode("utf-16"), r"a\.txt: is UTF-16"),
        (b"a\0b", r"a\.txt, line 1: holds a NUL byte"),
    ],
)
def test_captions_that_are_not_utf8_name_file_and_byte(tmp_path, data, where):
    picture(tmp_path / "a.png")
    write(tmp_path / "a.txt", data)
    with pytest.raises(UserError, match=where):
        scan_folder(tmp_path, trigger_word="sks")
    with pytest.raises(UserError, match=where):
        read_captions(tmp_path)
    problems: list[CaptionProblem] = []
    assert read_captions(tmp_path, problems=problems) == {}
    assert [problem.fatal for problem in problems] == [True]


def test_listing_an_unreadable_metadata_folder_does_not_recurse_for_ever(tmp_path):
    folder = tmp_path
    for index in range(30):
        folder = folder / f"d{index}"
    picture(folder / "a.png")
    write(tmp_path / "metadata.csv" / "inner.txt", "a folder, not a file")
    listing = list_folder(tmp_path)
    assert len(listing.pictures) == 1 and read_captions(tmp_path) == {}


def test_a_mapping_translates_captions_as_they_are_read(tmp_path):
    picture(tmp_path / "data" / "a.png")
    write(tmp_path / "data" / "a.txt", "**红色帽子**, sky, (雨:1.2)")
    mapping = write(tmp_path / "terms.yaml", "红色帽子: red hat\n雨: rain\n")
    found = scan_folder(tmp_path / "data", caption_mapping=str(mapping))
    assert captions(found) == {"a.png": "**red hat**, sky, (rain:1.2)"}
    assert captions(scan_folder(tmp_path / "data")) == {"a.png": "**红色帽子**, sky, (雨:1.2)"}
    with pytest.raises(UserError, match=r"caption_mapping.*terms\.txt"):
        scan_folder(tmp_path / "data", caption_mapping=str(tmp_path / "terms.txt"))


def test_further_folders_have_repeats_and_words_of_their_own(tmp_path):
    first = draw_dataset(tmp_path / "5_five", 1)
    second = draw_dataset(tmp_path / "7_seven", 1, caption=lambda index: None)
    third = draw_dataset(tmp_path / "plain", 1, caption=lambda index: None)
    config = TrainConfig(
        train_data_dir=str(first),
        more_folders=[f"3_a dog={second}", str(second), str(third)],
        default_caption="a thing",
        repeats=2,
    )
    samples = scan(config).samples
    assert [(sample.repeats, sample.caption.partition(" **")[0]) for sample in samples] == [
        (5, "a red"), (3, "a dog"), (7, "seven"), (2, "a thing")
    ]  # fmt: skip
    assert len({sample.key for sample in samples}) == 4


def linked_set(tmp_path, names):
    """A data set whose caption files are links to a secret beside it."""
    root, outside = tmp_path / "data", tmp_path / "private"
    picture(root / "a.png")
    write(outside / "secret", "filename,prompt\na.png,a secret of mine\n")
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(outside / "secret")
    return root


@pytest.mark.parametrize("name", ["a.txt", "a.png.txt", "a.caption", "metadata.csv", "metadata.jsonl"])
def test_caption_files_that_are_links_out_of_the_data_set_are_not_followed(tmp_path, name):
    dataset = scan_folder(linked_set(tmp_path, [name]), trigger_word="sks")
    assert captions(dataset) == {"a.png": "sks"}
    assert any(f"not followed: {name}" in text for text in dataset.warnings)


def test_a_link_that_claims_to_be_a_picture_opens_no_folder(tmp_path):
    dataset = scan_folder(linked_set(tmp_path, ["b.png", "a.txt"]), trigger_word="sks")
    assert captions(dataset) == {"a.png": "sks"}


@pytest.mark.parametrize("place", ["secret", "/etc", "picture"])
@pytest.mark.parametrize("name", ["a.txt", "metadata.csv", "a-mask.png", "masks/a.png"])
def test_a_link_to_a_folder_or_picture_opens_no_other_file_there(tmp_path, place, name):
    root = linked_set(tmp_path, [name])
    picture(tmp_path / "private" / "p.png")
    if place == "picture":
        (root / "b.png").symlink_to(tmp_path / "private" / "p.png")
    else:
        if place == "/etc" and not Path(place).is_dir():
            pytest.skip("there is no such folder")
        (root / "x").symlink_to(tmp_path / "private" if place == "secret" else "/etc")
    dataset = scan_folder(root, trigger_word="sks", use_masks=True)
    assert set(captions(dataset).values()) == {"sks"}
    assert all(sample.mask_path is None for sample in dataset.samples)
    assert any(text.startswith("2 links" if place == "/etc" else "1 links") and name in text
               for text in dataset.warnings)  # fmt: skip


def test_linked_pictures_keep_the_captions_and_masks_beside_them(tmp_path):
    """As folders that several runs share are made."""
    root, there = tmp_path / "data", tmp_path / "there"
    root.mkdir()
    for name in ("a", "b"):
        picture(there / f"{name}.png")
        picture(there / f"{name}-mask.png")
        write(there / f"{name}.txt", f"disc {name}")
    (there / "c.txt").symlink_to(there / "a.txt")
    picture(there / "c.png")
    for file in ("a.png", "a.txt", "a-mask.png"):
        (root / file).symlink_to(there / file)
    (root / "more").symlink_to(there)
    dataset = scan_folder(root, use_masks=True)
    assert captions(dataset) == {
        "a.png": "disc a", "more/a.png": "disc a", "more/b.png": "disc b", "more/c.png": "disc a"
    }  # fmt: skip
    assert [sample.mask_path is not None for sample in dataset.samples] == [True, True, True, False]


def test_the_cache_of_the_hub_keeps_its_captions(tmp_path):
    root, blobs = tmp_path / "datasets--discs" / "snapshots" / "0f", tmp_path / "datasets--discs" / "blobs"
    root.mkdir(parents=True)
    picture(blobs / "0123")
    write(blobs / "4567", "a red disc")
    write(tmp_path / "blobs" / "8", "a secret of mine")
    for name, target in (("a.png", blobs / "0123"), ("a.txt", blobs / "4567"), ("b.png", blobs / "0123"),
                         ("b.txt", tmp_path / "blobs" / "8")):  # fmt: skip
        (root / name).symlink_to(target)
    assert captions(scan_folder(root, trigger_word="sks")) == {"a.png": "a red disc", "b.png": "sks"}


def test_links_inside_the_data_set_are_followed(tmp_path):
    root = tmp_path / "data"
    picture(root / "a.png")
    write(root / "texts" / "one.txt", "a red disc")
    (root / "a.txt").symlink_to(root / "texts" / "one.txt")
    assert captions(scan_folder(root)) == {"a.png": "a red disc"}


@pytest.mark.parametrize("folder", ["control", "conditioning"])
def test_captioned_pictures_are_trained_whatever_their_folder_is_called(tmp_path, folder):
    """Numbered names stand in many folders."""
    for name in (f"{folder}/1", f"{folder}/2", "alan/1", "alan/2"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a man", encoding="utf-8")
    assert len(captions(scan_folder(tmp_path))) == 4


def test_captioned_pictures_beside_a_mask_are_trained(tmp_path):
    for name in ("masks/1", "masks/2", "masks/3", "people/1"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("carnival", encoding="utf-8")
    assert sorted(captions(scan_folder(tmp_path))) == ["masks/2.png", "masks/3.png", "people/1.png"]


def test_linked_masks_in_a_folder_near_linked_pictures_are_followed(tmp_path):
    root, pool = tmp_path / "data", tmp_path / "pool"
    picture(pool / "a.png")
    picture(pool / "masks" / "a.png")
    (root / "masks").mkdir(parents=True)
    (root / "a.png").symlink_to(pool / "a.png")
    (root / "masks" / "a.png").symlink_to(pool / "masks" / "a.png")
    (sample,) = scan_folder(root, trigger_word="sks", use_masks=True).samples
    assert sample.mask_path is not None
