"""Every planted fault is found, and a clean set of photographs or drawings raises no alarm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from lora_trainer.dataset.checks import BLURRED, check_folder
from lora_trainer.dataset.inspection import inspect
from lora_trainer.errors import UserError

SIDE = 600
COUNT = 6


def photograph(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """Noise of all scales over a gradient: sharp detail and large shapes, as in a photograph."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3), np.float32)
    for grid, strength in (((3, 3), 70), ((9, 9), 40), ((40, 40), 25), ((size[1] // 2, size[0] // 2), 25)):
        grain = Image.fromarray(rng.integers(0, 256, (*grid, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        total += (np.asarray(grain, np.float32) / 127.5 - 1) * strength
    total += np.linspace(70, 170, size[0], dtype=np.float32)[None, :, None]
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def drawing(seed: int, blur: float = 0) -> Image.Image:
    """A disc on an even background: like its neighbors to a perceptual hash, and unlike them to a person."""
    rng = np.random.default_rng(seed)
    colors = [tuple(int(value) for value in rng.integers(30, 220, 3)) for _ in range(2)]
    image = Image.new("RGB", (SIDE, SIDE), colors[0])
    x, y, radius = (int(value) for value in rng.integers((150, 150, 40), (450, 450, 120)))
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), colors[1])
    return image.filter(ImageFilter.GaussianBlur(blur)) if blur else image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(COUNT):
        photograph(index).save(tmp_path / f"clean{index}.jpg", quality=92)
        (tmp_path / f"clean{index}.txt").write_text(f"sks, **cat**, scene {index}")
    return tmp_path


def caption(path: Path, text: str | None = None) -> None:
    path.with_suffix(".txt").write_text(text if text is not None else f"sks, **cat**, {path.stem}")


def kinds(folder: Path, **options) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in check_folder(folder, **{"trigger_word": "sks", **options}).findings:
        found.setdefault(finding.file, set()).add(finding.kind)
        assert finding.message.endswith(".") and finding.remedy.endswith("."), finding
    return found


def test_a_clean_set_of_photographs_raises_no_alarm(folder):
    report = check_folder(folder, trigger_word="sks")
    assert report.findings == ()
    assert (report.images, report.captions, report.stops_training) == (COUNT, COUNT, False)
    assert [(row["resolution"], row["images"]) for row in report.buckets] == [((512, 512), COUNT)]
    assert report.steps_preview == {"visits_per_epoch": COUNT, "batch_size": 1, "steps_per_epoch": COUNT}


def test_a_clean_set_of_drawings_raises_no_alarm(tmp_path):
    for index in range(30):
        drawing(index).save(tmp_path / f"{index:02}.png")
        caption(tmp_path / f"{index:02}.png")
    assert kinds(tmp_path) == {}


def test_every_planted_fault_is_found_and_nothing_else(folder):
    picture = photograph(1)
    turned = Image.Exif()
    turned[0x0112] = 6
    shutil.copy(folder / "clean0.jpg", folder / "copy.jpg")
    picture.resize((520, 520)).save(folder / "saved_again.jpg", quality=60)
    data = (folder / "clean2.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "not_a_picture.png").write_bytes(b"hello")
    photograph(20).save(folder / "turned.jpg", exif=turned)
    photograph(21, (200, 200)).save(folder / "tiny.jpg")
    photograph(22, (500, 500)).save(folder / "small.jpg")
    photograph(23, (1300, 600)).save(folder / "long.jpg")
    photograph(24, (1900, 600)).save(folder / "longer.jpg")
    photograph(25).filter(ImageFilter.GaussianBlur(2)).save(folder / "blurred.jpg")
    photograph(26).convert("CMYK").save(folder / "print.jpg")
    ImageEnhance.Brightness(photograph(27)).enhance(0.1).save(folder / "dark.jpg")
    Image.blend(photograph(28), Image.new("RGB", (SIDE, SIDE), "white"), 0.93).save(folder / "bright.jpg")
    see_through = photograph(29)
    see_through.putalpha(Image.linear_gradient("L").resize(see_through.size))
    see_through.save(folder / "glass.png")
    Image.fromarray(np.asarray(photograph(30).convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    photograph(31).save(folder / "moving.gif", save_all=True, append_images=[photograph(32)])
    for path in folder.iterdir():
        if path.suffix != ".txt" and not path.with_suffix(".txt").exists():
            caption(path)
    photograph(33).save(folder / "silent.jpg")
    caption(folder / "silent.jpg", " \n")
    photograph(34).save(folder / "undescribed.jpg")
    photograph(35).save(folder / "stranger.jpg")
    caption(folder / "stranger.jpg", "**cat**, no trigger")
    photograph(36).save(folder / "unclosed.jpg")
    caption(folder / "unclosed.jpg", "sks, **cat, open")
    photograph(37).save(folder / "wordy.jpg")
    caption(folder / "wordy.jpg", "sks, cat, " + "and a word " * 30)
    caption(folder / "lost.jpg")
    (folder / "README.txt").write_text("about this set")

    found = kinds(folder)
    assert found.pop("moving.gif") - {"blurred"} == {"animated"}  # 256 colors may take the detail away
    assert found == {
        "copy.jpg": {"duplicate"},
        "saved_again.jpg": {"near-duplicate"},
        "truncated.jpg": {"unreadable"},
        "not_a_picture.png": {"unreadable"},
        "turned.jpg": {"rotated"},
        "tiny.jpg": {"too-small"},
        "small.jpg": {"too-small"},
        "long.jpg": {"aspect-ratio"},
        "longer.jpg": {"aspect-ratio"},
        "blurred.jpg": {"blurred"},
        "print.jpg": {"cmyk"},
        "dark.jpg": {"dark"},
        "bright.jpg": {"bright"},
        "glass.png": {"transparent"},
        "deep.png": {"16-bit"},
        "silent.jpg": {"empty-caption"},
        "undescribed.jpg": {"no-caption"},
        "stranger.jpg": {"trigger-missing"},
        "unclosed.jpg": {"caption-syntax"},
        "wordy.jpg": {"long-caption"},
        "lost.txt": {"orphan-caption"},
    }
    report = check_folder(folder, trigger_word="sks")
    (wordy,) = (finding.message for finding in report.findings if finding.file == "wordy.jpg")
    assert "about 9" in wordy  # 90 words, a trigger, a tag and the commas, none of them counted by a tokenizer
    severities = {finding.file: finding.severity for finding in report.findings}
    assert {file for file, severity in severities.items() if severity == "error"} == {
        "truncated.jpg", "not_a_picture.png", "tiny.jpg", "longer.jpg",
    }  # fmt: skip
    assert not report.stops_training  # what cannot be read is left out, the rest can be trained
    assert json.loads(json.dumps(report.to_json()))["findings"][0].keys() == {
        "file", "kind", "severity", "message", "remedy",
    }  # fmt: skip


def test_a_blurred_drawing_is_found(tmp_path):
    for index in range(4):
        drawing(index).save(tmp_path / f"{index}.png")
        caption(tmp_path / f"{index}.png")
    drawing(9, blur=3).save(tmp_path / "soft.png")
    caption(tmp_path / "soft.png")
    assert kinds(tmp_path) == {"soft.png": {"blurred"}}


def test_a_cropped_copy_is_told_with_its_original(folder):
    photograph(2).crop((10, 10, SIDE - 10, SIDE - 10)).save(folder / "cropped.jpg")
    caption(folder / "cropped.jpg")
    (finding,) = check_folder(folder, trigger_word="sks").findings
    assert (finding.file, finding.severity) == ("cropped.jpg", "warning") and "clean2.jpg" in finding.message


def test_a_soft_background_is_no_blur(folder):
    portrait = photograph(40).filter(ImageFilter.GaussianBlur(6))
    portrait.paste(photograph(41, (150, 150)), (220, 220))
    portrait.save(folder / "portrait.jpg")
    caption(folder / "portrait.jpg")
    assert inspect(folder / "portrait.jpg").sharpness < BLURRED  # the measure of the whole would be wrong
    assert kinds(folder) == {}


def test_captions_are_looked_at_together(folder):
    for index in range(COUNT):
        caption(folder / f"clean{index}.jpg", f"sks, **cat**, white wall, red scarf, {index}")
    caption(folder / "clean4.jpg", "sks, white wall, red scarfs, 4")
    caption(folder / "clean5.jpg", "sks, **cat**, white wall, red scarf, 0")
    texts = {(finding.file, finding.kind): finding for finding in check_folder(folder, trigger_word="sks").findings}
    assert set(texts) == {
        ("", "core-missing"), ("", "universal-tag"), ("", "near-synonyms"), ("clean0.jpg", "identical-captions"),
    }  # fmt: skip
    assert "83%" in texts["", "core-missing"].message and "clean4.jpg" in texts["", "core-missing"].message
    assert "white wall" in texts["", "universal-tag"].message


def test_tokens_are_counted_when_a_tokenizer_is_given(folder):
    report = check_folder(folder, trigger_word="sks", count_tokens=lambda text: 80 if "scene 3" in text else 10)
    (finding,) = report.findings
    assert (finding.file, finding.kind) == ("clean3.jpg", "long-caption") and "has 80 tokens" in finding.message


def test_a_trigger_that_nobody_wrote_is_told_once(folder):
    report = check_folder(folder, trigger_word="ohwx")
    assert {(finding.file, finding.kind, finding.severity) for finding in report.findings} == {
        ("", "trigger-missing", "info"),
        ("", "universal-tag", "info"),  # sks, which is only a tag now
    }


def test_chinese_captions_are_told_once(folder):
    for index in range(3):
        caption(folder / f"clean{index}.jpg", f"sks, **cat**, 场景{index}")
    (finding,) = check_folder(folder, trigger_word="sks").findings
    assert finding.kind == "chinese" and finding.message.startswith("3 captions")


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("clean1.txt", "猫咪".encode("gbk"), "caption-file"),
        ("metadata.csv", b'filename,prompt\nclean0.jpg,"open', "caption-file"),
    ],
)
def test_caption_files_that_cannot_be_read_stop_a_training(folder, name, data, kind):
    (folder / name).write_bytes(data)
    report = check_folder(folder, trigger_word="sks")
    assert report.stops_training
    assert (name, kind, "error") in {(finding.file, finding.kind, finding.severity) for finding in report.findings}
    assert "cannot-train" in {finding.kind for finding in report.findings}
    assert report.buckets == ()


def test_an_empty_caption_in_a_table_is_told_with_its_line(folder):
    (folder / "clean5.txt").unlink()
    (folder / "metadata.csv").write_text("filename,prompt\nclean5.jpg,\n")
    assert kinds(folder) == {"metadata.csv": {"empty-caption"}, "clean5.jpg": {"no-caption"}}


def test_no_captions_stop_a_training_unless_a_word_stands_in(folder):
    for path in folder.glob("*.txt"):
        path.unlink()
    assert check_folder(folder).stops_training
    assert kinds(folder, trigger_word="") == {"": {"no-captions", "cannot-train"}}
    assert not check_folder(folder, trigger_word="sks").stops_training
    assert [finding.severity for finding in check_folder(folder, trigger_word="sks").findings] == ["info"]


def test_an_empty_folder_stops_a_training_and_a_missing_one_is_an_error(tmp_path):
    report = check_folder(tmp_path)
    assert report.stops_training and report.images == 0
    with pytest.raises(UserError, match="no folder"):
        check_folder(tmp_path / "missing")


def test_buckets_repeats_and_steps_are_previewed(tmp_path):
    (tmp_path / "10_cat").mkdir()
    photograph(0, (900, 600)).save(tmp_path / "10_cat/a.jpg")
    photograph(1).save(tmp_path / "10_cat/b.jpg")
    report = check_folder(tmp_path, batch_size=4)
    assert report.steps_preview == {"visits_per_epoch": 20, "batch_size": 4, "steps_per_epoch": 6}
    assert sum(row["count"] for row in report.to_json()["buckets"]) == 20


def test_each_picture_is_decoded_once_and_progress_can_cancel(folder, monkeypatch):
    seen = []
    monkeypatch.setattr("lora_trainer.dataset.checks.inspect", lambda path, edit: seen.append(path) or inspect(path))
    monkeypatch.setattr("lora_trainer.dataset.checks.measure", lambda path: pytest.fail("decoded again"))
    calls = []
    check_folder(folder, progress=lambda done, total: calls.append((done, total)))
    assert len(seen) == COUNT and calls == [(done, COUNT) for done in range(1, COUNT + 1)]

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_folder(folder, progress=cancel)


def test_nothing_in_the_folder_is_changed(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    check_folder(folder, trigger_word="sks")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("b.png", "a.png")])
def test_of_two_that_are_alike_the_smaller_one_may_go(tmp_path, names):
    large, small = (tmp_path / name for name in names)
    picture = Image.radial_gradient("L").convert("RGB").resize((192, 192))
    picture.paste((200, 30, 30), (20, 60, 120, 90))
    picture.save(large)
    picture.resize((96, 96)).save(small)
    (finding,) = [one for one in check_folder(tmp_path, resolution=64).findings if one.kind.endswith("duplicate")]
    assert finding.file == small.name and finding.files == (large.name, small.name)


def test_what_settings_would_change_is_found(folder):
    caption(folder / "clean0.jpg", "a {red|blue} **cat**, [trigger]")
    caption(folder / "clean1.jpg", "a **cat** that sits\na **cat** that runs")
    found = {finding.message: finding for finding in check_folder(folder).findings if finding.kind == "settings"}
    trigger, choices = sorted(found.values(), key=lambda finding: "[trigger]" not in finding.message)
    assert trigger.message == "1 captions hold [trigger], and trigger_word is empty: clean0.jpg."
    assert (trigger.remedy, trigger.files) == ("Set trigger_word.", ("clean0.jpg",))
    assert "several lines or {a|b}" in choices.message and "wildcards: true" in choices.remedy
    assert choices.files == ("clean0.jpg", "clean1.jpg")
    assert "[trigger]" in check_folder(folder).to_text() and "wildcards: true" in check_folder(folder).to_text()


def test_the_place_of_the_trigger_word_counts_as_the_word(folder):
    for index in range(COUNT):
        caption(folder / f"clean{index}.jpg", f"**cat** called [trigger], scene {index}")
    assert "trigger-missing" not in kinds(folder).get("", set()) and "settings" not in kinds(folder).get("", set())


def test_errors_that_do_not_stop_a_training_are_not_called_a_good_start(folder):
    assert check_folder(folder).to_text().endswith("A training can start.")
    photograph(9, (SIDE, SIDE // 4)).save(folder / "long.jpg")
    caption(folder / "long.jpg")
    report = check_folder(folder)
    assert not report.stops_training and any(finding.severity == "error" for finding in report.findings)
    assert report.to_text().endswith("A training can start, but leaves out or learns badly what the errors name.")
