"""The captioners through their real loading code, on small models made here."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lora_trainer.captioning import registry
from lora_trainer.captioning.base import Description, Settings, Tag, UnavailableError
from lora_trainer.captioning.batches import describe_all
from lora_trainer.captioning.phrases import GROUPS
from lora_trainer.captioning.registry import Sources, available, choose, open_captioner
from lora_trainer.captioning.tagger import prepare
from lora_trainer.captioning.weights import FOLDER_VARIABLE, find
from lora_trainer.errors import UserError
from tests.captioning import models


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    """What lies in the machine's own cache must not decide a test."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return models.tiny_blip(tmp_path_factory.mktemp("captioners") / "blip")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return models.tiny_clip(tmp_path_factory.mktemp("captioners") / "clip")


def test_blip_says_the_same_of_a_picture_alone_and_in_a_batch(blip):
    captioner = open_captioner("blip", Settings(max_length=6), Sources(given=blip))
    images = models.pictures(4)
    together = captioner.describe(images)
    alone = [captioner.describe([image])[0] for image in images]
    assert together == alone and captioner.describe(images) == together
    assert all(set(one.sentence.split()) <= {*models.WORDS} and one.sentence for one in together)
    assert len({one.sentence for one in together}) > 1  # it looks at the pictures
    captioner.close()


def test_clip_ranks_within_each_group_and_the_batch_does_not_matter(clip):
    captioner = open_captioner("clip", Settings(threshold=0.0), Sources(given=clip))
    images = models.pictures(3)
    together = captioner.describe(images)
    for image, found in zip(images, together):
        (alone,) = captioner.describe([image])
        assert [tag.text for tag in alone.tags] == [tag.text for tag in found.tags]
    for group in GROUPS:
        told = [tag for tag in together[0].tags if tag.category == group.name]
        assert len(told) == group.most and {tag.text for tag in told} <= set(group.phrases)
        assert told == sorted(told, key=lambda tag: -tag.score)
    strict = open_captioner("clip", Settings(threshold=1.01), Sources(given=clip))
    assert strict.describe(images[:1])[0].tags == ()


def test_a_tagger_reads_bgr_and_tells_what_passes_its_thresholds(tmp_path):
    folder = models.tiny_tagger(tmp_path / "tagger")
    captioner = open_captioner("tagger", Settings(), Sources(given=folder))
    red, green, blue = (Image.new("RGB", (20, 20), color) for color in ("#ff0000", "#00ff00", "#0000ff"))
    found = captioner.describe([red, green, blue])
    names = [[tag.text for tag in one.tags] for one in found]
    assert names[0] == ["1girl", "red_dress", "dress", "general"]  # the best rating last; ^_^ is below the threshold
    assert names[1] == ["hatsune_miku_(vocaloid)", "dress", "general"]  # characters come first
    assert names[2] == ["long_hair", "dress", "general"]
    assert found[0].tags[-1].category == "rating" and found[1].tags[0].category == "character"
    assert found[0].tags[0].score == pytest.approx(1 / (1 + np.exp(1 - 0.02 * 255)), rel=1e-4)
    assert [captioner.describe([image])[0] for image in (red, green, blue)] == found

    strict = open_captioner("tagger", Settings(threshold=0.99, character_threshold=0.99), Sources(given=folder))
    assert [tag.text for tag in strict.describe([red])[0].tags] == ["general"]


def test_a_tagger_that_takes_one_picture_at_a_time_is_given_one(tmp_path):
    folder = models.tiny_tagger(tmp_path / "tagger", batch=1)
    captioner = open_captioner("tagger", Settings(), Sources(given=folder))
    assert len(captioner.describe(models.pictures(3))) == 3


def test_pictures_are_padded_with_white_to_a_square():
    pixels = prepare(Image.new("RGB", (40, 20), "#ff0000"), 40)
    assert pixels.shape == (40, 40, 3) and pixels.dtype == np.float32
    assert (pixels[0] == 255).all() and (pixels[-1] == 255).all()
    assert pixels[20, 20].tolist() == [0, 0, 255]  # BGR
    assert prepare(Image.new("RGB", (40, 20)), 16).shape == (16, 16, 3)


def test_damaged_files_are_named(tmp_path, blip):
    folder = models.tiny_tagger(tmp_path / "tagger")
    (folder / "selected_tags.csv").write_text("tag_id,name,category,count\n1,cat,0,1\n")
    captioner = open_captioner("tagger", Settings(), Sources(given=folder))
    with pytest.raises(UserError, match="lists 1"):
        captioner.describe(models.pictures(1))
    (folder / "selected_tags.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"selected_tags\.csv is no list of tags"):
        open_captioner("tagger", Settings(), Sources(given=folder))
    (folder / "model.onnx").write_bytes(b"cut")
    folder = models.tiny_tagger(tmp_path / "other")
    (folder / "model.onnx").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"model\.onnx cannot be loaded"):
        open_captioner("tagger", Settings(), Sources(given=folder))
    broken = tmp_path / "blip"
    broken.mkdir()
    for path in blip.iterdir():
        (broken / path.name).write_bytes(path.read_bytes() if path.suffix != ".safetensors" else b"\x00" * 40)
    with pytest.raises(UserError, match="cannot be loaded as BlipForConditionalGeneration"):
        open_captioner("blip", Settings(), Sources(given=broken))


def test_missing_weights_say_which_file_where_to_and_how_large(tmp_path):
    with pytest.raises(UnavailableError) as caught:
        find(registry.KINDS["tagger"], [tmp_path / "captioners"])
    text = str(caught.value)
    for part in ("model.onnx", "selected_tags.csv", "380 MB", str(tmp_path / "captioners" / "tagger"), "--download"):
        assert part in text
    with pytest.raises(UnavailableError, match=r"lacks config\.json"):
        find(registry.KINDS["blip"], given=tmp_path)
    with pytest.raises(UserError, match="no captioner 'florence'"):
        choose("blip+florence", Sources())
    with pytest.raises(UnavailableError, match=r"(?s)No captioner can run here.*blip.*tagger.*clip"):
        choose("auto", Sources())
    assert all(row.problem and row.remedy for row in available(Sources()))


def test_weights_are_found_in_folders_and_in_the_variable(tmp_path, monkeypatch, blip):
    assert find(registry.KINDS["blip"], [tmp_path, blip.parent]) == blip
    monkeypatch.setenv(FOLDER_VARIABLE, str(blip.parent))
    assert find(registry.KINDS["blip"]) == blip
    assert choose("auto", Sources()) == "blip"
    assert {row.name: row.problem is None for row in available(Sources())}["blip"]


def test_nothing_is_downloaded_unless_asked_for(monkeypatch, tmp_path):
    asked: list[tuple[str, str]] = []

    def fetch(repository, name):
        asked.append((repository, name))
        (tmp_path / name).write_text("")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    loaded = []
    kind = registry.KINDS["tagger"]
    monkeypatch.setitem(
        registry.KINDS, "tagger", type(kind)(kind.name, kind.title, kind.weights, lambda *a: loaded.append(a))
    )
    with pytest.raises(UnavailableError):
        open_captioner("tagger", Settings(), Sources())
    assert not asked
    open_captioner("tagger", Settings(), Sources(download=True))
    assert {name for _, name in asked} == {"model.onnx", "selected_tags.csv"} and loaded[0][0] == tmp_path
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(UserError, match="could not be downloaded: no route"):
        open_captioner("tagger", Settings(), Sources(download=True))


class Sayer:
    def __init__(self, text):
        self.text, self.closed = text, False

    def describe(self, images):
        return [Description(self.text, (Tag(f"{self.text} tag"),)) for _ in images]

    def close(self):
        self.closed = True


def test_several_captioners_are_one_and_a_host_brings_its_own():
    from lora_trainer.captioning.base import HostCaptioner

    first, second = Sayer("one"), Sayer("")
    host = {
        "host-blip": HostCaptioner("BLIP", lambda settings: first),
        "host-deepbooru": HostCaptioner("tags", lambda settings: second),
    }
    combined = open_captioner("host-deepbooru+host-blip", Settings(), Sources(host=host))
    (found,) = combined.describe(models.pictures(1))
    assert found.sentence == "one" and [tag.text for tag in found.tags] == [" tag", "one tag"]
    combined.close()
    assert first.closed and second.closed
    assert choose("auto", Sources(host=host)) == "host-blip"


class Short:
    """Runs out of memory above ``limit`` pictures at once."""

    def __init__(self, limit, error):
        self.limit, self.error, self.sizes = limit, error, []

    def describe(self, images):
        self.sizes.append(len(images))
        if len(images) > self.limit:
            raise self.error
        return [Description(str(image.size[0])) for image in images]


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA out of memory. Tried"),
    pytest.param(MemoryError(), marks=pytest.mark.slow),
    pytest.param(Exception("Failed to allocate memory for requested buffer"), marks=pytest.mark.slow),
])  # fmt: skip
def test_out_of_memory_halves_the_batch_and_nothing_is_lost(error):
    captioner, told = Short(2, error), []
    keys = list(range(1, 12))
    turns = []

    class Turn:
        def __enter__(self):
            turns.append(1)

        def __exit__(self, *exception):
            turns.append(-1)

    found = {}
    for some, descriptions in describe_all(
        captioner, keys, lambda key: Image.new("RGB", (key, 4)), batch_size=8, turn=Turn, on_smaller=told.append
    ):
        found.update({key: one.sentence for key, one in zip(some, descriptions)})
    assert found == {key: str(key) for key in keys} and list(found) == keys
    assert told == [4, 2] and captioner.sizes[:3] == [8, 4, 2] and max(captioner.sizes[2:]) == 2
    assert sum(turns) == 0 and len(turns) == 2 * len(captioner.sizes)
    with pytest.raises(UserError, match="single picture"):
        list(describe_all(Short(0, error), [1], lambda key: Image.new("RGB", (4, 4))))


def test_another_error_is_not_mistaken_for_it():
    with pytest.raises(RuntimeError, match="shapes"):
        list(describe_all(Short(0, RuntimeError("shapes differ")), [1, 2], lambda key: Image.new("RGB", (4, 4))))


def test_pictures_that_cannot_be_loaded_are_left_out():
    captioner = Short(9, None)
    batches = list(describe_all(captioner, [1, 2, 3], lambda key: None if key == 2 else Image.new("RGB", (key, 4))))
    assert [keys for keys, _ in batches] == [[1, 3]]
