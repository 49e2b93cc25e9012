"""Masks, several captions, trigger words and tables as other tools write them; and what has no effect is said."""

from __future__ import annotations

import dataclasses
import random

import pytest
from PIL import Image

from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.captions import one_of, train_text
from lora_trainer.dataset.folder import scan
from lora_trainer.errors import UserError
from tests.dataset.folders import picture, write
from tests.pictures import draw_dataset


def scanned(root, **values):
    return scan(TrainConfig(train_data_dir=str(root), **{"trigger_word": "zwx", **values}))


def mask(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (32, 24), 255).save(path)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.mask.png", "a.png.mask.png", "a-masklabel.png", "A-masklabel.PNG", "a-mask.png", "a_mask.jpg", "masks/a.png",
     "mask/a.png", "masks/a.mask.png", "Masks/a.png", "MASK/A.PNG", "a-Mask.png", "a_MASK.png", "a.Mask.png",
     "a-MaskLabel.png", "masks/a.png_mask.png"],
)  # fmt: skip
def test_masks_of_every_tool_are_masks_and_no_pictures(tmp_path, name):
    picture(tmp_path / ("A.png" if name.startswith("A") else "a.png"))
    made = mask(tmp_path / name)
    dataset = scanned(tmp_path, use_masks=True)
    assert [sample.mask_path for sample in dataset.samples] == [made] and not dataset.warnings
    assert any("1 of 1 pictures have a mask" in note for note in scanned(tmp_path).warnings)


def test_masks_beside_a_folder_of_pictures_and_anywhere_else(tmp_path):
    picture(tmp_path / "data" / "images" / "a.png")
    near = mask(tmp_path / "data" / "masks" / "a.png")
    assert [sample.mask_path for sample in scanned(tmp_path / "data", use_masks=True).samples] == [near]
    far = mask(tmp_path / "elsewhere" / "a.png")
    config = {"use_masks": True, "mask_dir": str(tmp_path / "elsewhere")}
    assert [sample.mask_path for sample in scanned(tmp_path / "data" / "images", **config).samples] == [far]


@pytest.mark.parametrize(
    ("image", "name"),
    [("sub/a.jpg", "masks/sub/a.png"), ("images/sub/a.jpg", "Masks/sub/a.png"), ("sub/a.jpg", "sub/masks/a.png"),
     ("images/sub/a.jpg", "images/masks/sub/a.png")],
)  # fmt: skip
def test_a_folder_of_masks_mirrors_that_of_the_pictures(tmp_path, image, name):
    picture(tmp_path / image)
    picture(tmp_path / image.replace("a.jpg", "b.jpg"))
    made, stray = mask(tmp_path / name), mask(tmp_path / name.replace("a.png", "c.png"))
    dataset = scanned(tmp_path, use_masks=True)
    assert [sample.mask_path for sample in dataset.samples] == [made, None]
    assert dataset.warnings == (
        f"1 masks belong to no picture and are left out: {stray.relative_to(tmp_path).as_posix()}.",
    )


@pytest.mark.parametrize("name", ["a.png", "A_mask.png", "a-MaskLabel.png"])
def test_masks_elsewhere_are_found_under_the_names_of_tools(tmp_path, name):
    picture(tmp_path / "data" / "a.png")
    made = mask(tmp_path / "there" / name)
    (sample,) = scanned(tmp_path / "data", use_masks=True, mask_dir=str(tmp_path / "there")).samples
    assert sample.mask_path == made


@pytest.mark.parametrize("name", ["a-condlabel.png", "a-CondLabel.png", "conditioning/a.jpg", "Conditioning/a.png"])
def test_conditioning_pictures_are_left_out(tmp_path, name):
    picture(tmp_path / "a.png")
    picture(tmp_path / name)
    dataset = scanned(tmp_path)
    assert [sample.key for sample in dataset.samples] == ["a.png"]
    assert f"1 conditioning pictures are left out: {name}" in dataset.warnings[0]


def test_a_picture_that_is_called_a_mask_and_has_no_picture_beside_it_is_one(tmp_path):
    for name in ("carnival_mask.png", "masks/venice.png", "blue-mask.png"):
        picture(tmp_path / name)
    assert len(scanned(tmp_path).samples) == 3


def test_masks_that_are_asked_for_and_not_there_are_said_with_the_number(tmp_path):
    for name in ("a.jpg", "b.png"):
        picture(tmp_path / name)
    assert scanned(tmp_path, use_masks=True).warnings == (
        "use_masks has no effect: none of 2 pictures has a mask or transparency.",
    )
    Image.new("RGBA", (32, 24)).save(tmp_path / "c.png")
    assert not scanned(tmp_path, use_masks=True).warnings


@pytest.mark.parametrize("written", ["[trigger]", "[Trigger]", "[name]"])
def test_the_trigger_word_takes_the_place_that_is_kept_for_it(tmp_path, written):
    picture(tmp_path / "a.png")
    write(tmp_path / "a.txt", f"a photo of {written}, smiling".encode())
    (sample,) = scanned(tmp_path).samples
    assert sample.caption == "a photo of zwx, smiling"
    (note,) = scanned(tmp_path, trigger_word="").warnings
    assert "hold [trigger]" in note and "Set trigger_word" in note


def test_one_of_several_captions_at_each_visit():
    text = "a {red|blue} disc\na circle\n\n"
    dice = [random.Random(seed) for seed in range(60)]
    drawn = {train_text(one_of(text, True, rng), rng=rng) for rng in dice}
    assert drawn == {"a red disc", "a blue disc", "a circle"}
    assert train_text(one_of(text, True, None)) == "a red disc"
    assert train_text(one_of(text, False, random.Random(0))) == "a {red|blue} disc, a circle"


@pytest.mark.parametrize("caption", ["a red disc\na circle", "a {red|blue} disc"])
def test_captions_with_choices_are_said_while_choices_are_off(tmp_path, caption):
    draw_dataset(tmp_path, 2, caption=lambda index: caption if index else "a disc")
    (note,) = scanned(tmp_path, trigger_word="").warnings
    assert note.startswith("1 captions have several lines") and "wildcards: true" in note
    assert not scanned(tmp_path, trigger_word="", wildcards=True).warnings
    write(tmp_path / "disc 01.txt", b"a disc")
    assert "wildcards has no effect" in scanned(tmp_path, trigger_word="", wildcards=True).warnings[0]


@pytest.mark.parametrize(
    ("values", "caption", "said"),
    [
        ({"shuffle_tags": True}, "one part only", "shuffle_tags has no effect"),
        ({"shuffle_tags": True}, "two, parts", ""),
        ({"repeats": 3}, "x", "repeats: 3 has no effect"),
        ({"tag_dropout": 0.3}, "one part only", "tag_dropout leaves out whole captions: no caption of 2 pictures"),
        ({"tag_dropout": 0.3}, "two, parts", ""),
        ({"secondary_separator": ";"}, "two, parts", "secondary_separator has no effect: no caption of 2 pictures"),
        ({"secondary_separator": ";"}, "two; parts", ""),
        ({"weighted_captions": True}, r"a *red* (disc), \\(literal\\) | [trigger", "weighted_captions has no effect"),
        ({"weighted_captions": True}, "a (red:1.2) disc", ""),
        ({"weighted_captions": True}, "((a disc))", ""),
    ],
)
def test_settings_that_change_nothing_on_these_pictures(tmp_path, values, caption, said):
    root = tmp_path / ("2_dog" if "repeats" in values else "plain")
    draw_dataset(root, 2, caption=lambda index: caption)
    notes = scanned(root, trigger_word="", **values).warnings
    assert said in "".join(notes) and bool(notes) == bool(said)


@pytest.mark.parametrize(("term", "said"), [("square", True), ("DISC", False)])
def test_a_mapping_that_matches_nothing_is_said_with_the_numbers(tmp_path, term, said):
    draw_dataset(tmp_path, 2, caption=lambda index: "a  disc")
    write(tmp_path / "map.yaml", f"{term}: circle\nother: thing\n")
    warned = scanned(tmp_path, caption_mapping=str(tmp_path / "map.yaml")).warnings
    note = "caption_mapping has no effect: no caption of 2 pictures holds one of its 2 terms."
    assert warned == ((note,) if said else ())


@pytest.mark.parametrize("word", ["zwx", ""])
def test_a_default_caption_that_no_picture_needs_is_said(tmp_path, word):
    draw_dataset(tmp_path, 2)
    values = {"default_caption": "a disc", "trigger_word": word}
    (note,) = scanned(tmp_path, **values).warnings
    assert note == "default_caption has no effect: each of 2 pictures has a caption without it."
    (tmp_path / "disc 00.txt").unlink()
    dataset = scanned(tmp_path, **values)
    assert dataset.samples[0].caption == "a disc" and not any("no effect" in note for note in dataset.warnings)
    draw_dataset(tmp_path / "classes" / "2_dog", 2, caption=lambda index: None)
    assert "default_caption has no effect" in "".join(scanned(tmp_path / "classes", **values).warnings)


def test_an_ending_that_no_caption_file_has_is_said(tmp_path):
    draw_dataset(tmp_path, 2)
    (note,) = scanned(tmp_path, caption_extension=".tags").warnings
    assert note == "caption_extension: .tags has no effect: no caption of 2 pictures comes from such a file."
    write(tmp_path / "disc 00.TAGS", b"a red disc")
    assert not scanned(tmp_path, caption_extension=".tags").warnings
    write(tmp_path / "metadata.csv", b"filename,prompt\ndisc 00.png,another\ndisc 01.png,other\n")
    assert "caption_extension: .tags has no effect" in "".join(scanned(tmp_path, caption_extension=".tags").warnings)


def test_a_table_that_says_another_thing_than_the_text_files_is_told(tmp_path):
    draw_dataset(tmp_path, 3)
    write(tmp_path / "metadata.csv", b"filename,prompt\ndisc 00.png,another\ndisc 01.png,other too\n")
    dataset = scanned(tmp_path)
    assert dataset.samples[0].caption == "another"
    (note,) = [note for note in dataset.warnings if "metadata.csv" in note]
    assert "2 of its captions are not those of disc 00.txt" in note
    same = "".join(f'{path.stem}.png,"{path.read_text()}"\n' for path in sorted(tmp_path.glob("*.txt")))
    write(tmp_path / "metadata.csv", b"filename,prompt\n" + same.encode())
    assert not scanned(tmp_path).warnings


@pytest.mark.parametrize("name", ["disc 00.png", "disc 00", "DISC 00.PNG"])
def test_bare_names_in_a_table_are_looked_up_below(tmp_path, name):
    draw_dataset(tmp_path / "images", 2, caption=lambda index: None)
    table = write(tmp_path / "captions.csv", f"filename,prompt\n{name},a disc\n".encode())
    dataset = scanned(tmp_path, metadata_path=str(tmp_path / "captions.csv"))
    assert {sample.key: sample.caption for sample in dataset.samples}["images/disc 00.png"] == "a disc", table


def test_a_name_that_two_pictures_have_is_not_guessed(tmp_path):
    for folder in ("one", "two"):
        draw_dataset(tmp_path / folder, 1, caption=lambda index: None)
    draw_dataset(tmp_path / "three", 2, caption=lambda index: None)
    write(tmp_path / "metadata.csv", b"filename,prompt\ndisc 00.png,a disc\ndisc 01.png,b disc\n")
    captions = {sample.key: sample.caption for sample in scanned(tmp_path).samples}
    assert captions["three/disc 01.png"] == "b disc" and captions["one/disc 00.png"] == "zwx"


def test_a_table_of_which_nothing_matches_is_an_error(tmp_path):
    draw_dataset(tmp_path, 2)
    write(tmp_path / "metadata.csv", b"filename,prompt\nx.png,a disc\ny.png,b disc\n")
    with pytest.raises(UserError, match=r"none of its 2 rows names a picture.*x\.png"):
        scanned(tmp_path)


@pytest.mark.parametrize("row", ["/elsewhere/disc 00.png", "C:\\data\\disc 00.png", "../disc 00.png", "~/disc 00.png"])
def test_a_table_of_which_no_row_can_be_used_is_an_error(tmp_path, row):
    draw_dataset(tmp_path, 2)
    write(tmp_path / "metadata.csv", f"filename,prompt\n{row},a disc\n".encode())
    with pytest.raises(UserError, match=r"no row that can be used\. First, line 2: .*disc 00\.png"):
        scanned(tmp_path)
    write(tmp_path / "metadata.csv", f"filename,prompt\n{row},a disc\ndisc 01.png,another\n".encode())
    assert scanned(tmp_path).samples[1].caption == "another"


@pytest.mark.parametrize("place", ["data", "link"])
@pytest.mark.parametrize("table", ["data/metadata.csv", "captions.csv"])
def test_absolute_paths_of_the_pictures_are_read(tmp_path, place, table):
    draw_dataset(tmp_path / "data" / "images", 2, caption=lambda index: None)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    rows = f"filename,prompt\n{tmp_path / place / 'images' / 'disc 01.png'},a disc\n/etc/disc 00.png,a secret\n"
    write(tmp_path / table, rows.encode())
    dataset = scanned(tmp_path / place, metadata_path=str(tmp_path / table))
    assert [sample.caption for sample in dataset.samples] == ["zwx", "a disc"]
    assert any("/etc/disc 00.png is an absolute path" in text for text in dataset.warnings)


@pytest.mark.parametrize("name", ["captions.csv", "images/dataset.jsonl"])
def test_a_table_that_is_not_used_is_said(tmp_path, name):
    draw_dataset(tmp_path / "images", 2, caption=lambda index: None)
    row = "disc 00.png,a disc\n" if name.endswith(".csv") else '{"file_name": "disc 00.png", "text": "a disc"}\n'
    write(tmp_path / name, row.encode())
    write(tmp_path / "scores.csv", b"epoch,loss\n1,0.5\n")
    assert scanned(tmp_path).warnings == (
        f"{name} has captions of 1 pictures and is not used; to use it, name it in metadata_path or call it "
        f"metadata.{name.partition('.')[2]}.",
    )
    write(tmp_path / "images" / "disc 00.txt", b"a disc")
    assert not scanned(tmp_path).warnings[1:] and "no caption of their own" in scanned(tmp_path).warnings[0]
    (tmp_path / "images" / "disc 00.txt").unlink()
    dataset = scanned(tmp_path, metadata_path=str(tmp_path / name))
    assert dataset.samples[0].caption == "a disc" and not any("not used" in text for text in dataset.warnings)


def test_choices_survive_a_mapping(tmp_path):
    draw_dataset(tmp_path, 1, caption=lambda index: "圆\na {圆|disc}")
    write(tmp_path / "map.yaml", "圆: circle\n".encode())
    config = TrainConfig(train_data_dir=str(tmp_path), caption_mapping=str(tmp_path / "map.yaml"), wildcards=True)
    assert scan(config).samples[0].caption.splitlines()[0] == "circle"
    assert len(scan(dataclasses.replace(config)).samples[0].caption.splitlines()) == 2
