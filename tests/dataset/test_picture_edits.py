"""Pictures excluded, turned and cropped beside the original, which stays as it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.buckets import BatchPlan
from lora_trainer.dataset.folder import scan
from lora_trainer.dataset.images import load_mask, load_view
from lora_trainer.dataset.picture_edits import EDITS_NAME, UNTOUCHED, PictureEdit, load_edits, save_edits
from lora_trainer.dataset.thumbnails import ThumbnailCache
from lora_trainer.errors import UserError


@pytest.fixture
def root(tmp_path):
    """a.png, 128×64: red left, blue right, with a mask that is white on the right; b.png, all green."""
    image = Image.new("RGB", (128, 64), "red")
    image.paste("blue", (64, 0, 128, 64))
    image.save(tmp_path / "a.png")
    mask = Image.new("L", (64, 32), 0)  # of another size: it is stretched over the picture
    mask.paste(255, (32, 0, 64, 32))
    mask.save(tmp_path / "a.mask.png")
    Image.new("RGB", (64, 64), "green").save(tmp_path / "b.png")
    return tmp_path


def dataset(root):
    return scan(TrainConfig(train_data_dir=str(root), trigger_word="sks", use_masks=True))


def first(found, resolution):
    plan = BatchPlan(found, resolution, multiple=8, bucket_step=8, min_bucket_resolution=8, enable_bucket=False)
    return next(item for batch in plan.epoch(0) for item in batch if found.samples[item.sample].key == "a.png")


def test_training_sees_the_edited_picture_and_mask(root):
    before = {sample.key: sample for sample in dataset(root).samples}
    original = (root / "a.png").read_bytes()
    save_edits(root, {"a.png": PictureEdit(rotate=90, crop=(0, 0, 1, 0.5))})  # red is on top now; it alone stays
    found = dataset(root)
    sample = found.samples[0]
    assert sample.size == (64, 64) and sample.digest != before["a.png"].digest
    assert found.samples[1] == before["b.png"]
    pixels = load_view(sample, first(found, (64, 64))).numpy()
    assert np.allclose(pixels[0], 1) and np.allclose(pixels[2], -1)
    assert load_mask(sample, first(found, (64, 64)), (8, 8)).max() == 0
    save_edits(root, {"a.png": PictureEdit(crop=(0.5, 0, 1, 1))})
    found = dataset(root)
    assert np.allclose(load_view(found.samples[0], first(found, (64, 64)))[2], 1)
    assert load_mask(found.samples[0], first(found, (64, 64)), (8, 8)).min() == 1
    assert (root / "a.png").read_bytes() == original


def test_an_excluded_picture_is_left_out_and_needs_no_caption(root):
    save_edits(root, {"b.png": PictureEdit(excluded=True)})
    found = dataset(root)
    assert [sample.key for sample in found.samples] == ["a.png"]
    assert [(item.path.name, item.reason) for item in found.skipped] == [("b.png", "it is excluded in the editor")]
    (root / "a.txt").write_text("red and blue")
    assert len(scan(TrainConfig(train_data_dir=str(root))).samples) == 1  # without trigger word: b has no caption
    save_edits(root, {"a.png": PictureEdit(excluded=True)})
    with pytest.raises(UserError, match="excluded in the editor"):
        dataset(root)


def test_the_file_is_for_people_and_keeps_what_it_does_not_know(root):
    (root / EDITS_NAME).write_text('{"version": 1, "pictures": {}, "theirs": [1]}')
    save_edits(root, {"b.png": PictureEdit(rotate=180), "中.png": PictureEdit(True, 0, (0.25, 0, 1, 1))})
    save_edits(root, {"a.png": PictureEdit(rotate=270)})
    content = json.loads((root / EDITS_NAME).read_text(encoding="utf-8"))
    assert content["theirs"] == [1] and list(content["pictures"]) == ["a.png", "b.png", "中.png"]
    assert load_edits(root)["中.png"] == PictureEdit(True, 0, (0.25, 0, 1, 1))
    save_edits(root, {"b.png": UNTOUCHED})
    assert "b.png" not in load_edits(root)


@pytest.mark.parametrize("text", ["{", "[]", '{"pictures": {"a.png": {"rotate": 45}}}', '{"version": 9}',
                                  '{"pictures": {"a.png": {"crop": [0, 0]}}}', '{"pictures": 3}'])  # fmt: skip
def test_a_damaged_file_stops_a_training_instead_of_being_ignored(root, text):
    (root / EDITS_NAME).write_text(text)
    with pytest.raises(UserError, match=EDITS_NAME):
        dataset(root)
    with pytest.raises(UserError):
        save_edits(root, {"a.png": PictureEdit(rotate=90)})
    assert (root / EDITS_NAME).read_text() == text


@pytest.mark.parametrize(
    "values", [{"rotate": 45}, {"crop": (0, 0, 0, 1)}, {"crop": (-1, 0, 1, 1)}, {"crop": (0.5, 0, 0.2, 1)}]
)
def test_edits_that_cannot_be_are_refused(values):
    with pytest.raises(UserError):
        PictureEdit(**values)


def test_thumbnails_show_the_edit_and_are_made_once(root, tmp_path):
    Image.new("RGB", (2000, 1000), "red").save(root / "large.jpg")
    cache = ThumbnailCache(tmp_path / "thumbnails")
    path = cache.get(root / "large.jpg")
    made = path.stat().st_mtime_ns
    with Image.open(path) as image:
        assert image.size == (256, 128)
    assert cache.get(root / "large.jpg") == path and path.stat().st_mtime_ns == made
    path.write_bytes(b"")  # as a power cut may leave it
    assert cache.get(root / "large.jpg").stat().st_size
    with Image.open(cache.get(root / "large.jpg", PictureEdit(rotate=90, crop=(0, 0, 0.5, 1)))) as image:
        assert image.size == (64, 256)
    with Image.open(cache.get(root / "a.png", PictureEdit(crop=(0.5, 0, 1, 1)))) as image:
        red, _, blue = image.getpixel((30, 30))
        assert blue > 200 > 60 > red
    (root / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png"):
        cache.get(root / "broken.png")
