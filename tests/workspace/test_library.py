from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from lora_trainer.dataset.cache import TensorCache
from lora_trainer.errors import UserError
from lora_trainer.workspace.library import DatasetLibrary
from tests.workspace.evil import EVIL_PATHS


@pytest.fixture
def library(tmp_path):
    library = DatasetLibrary(tmp_path)
    library.create("cats")
    return library


def png(color=(1, 2, 3), size=(64, 48)):
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG")
    return data.getvalue()


def test_pictures_and_captions_come_back(library):
    assert library.add_picture("cats", "猫 1.png", png(), "a **cat**") == "猫 1.png"
    assert library.add_picture("cats", "b.jpg", png()) == "b.jpg"
    assert [(one.file, one.caption) for one in library.pictures("cats")] == [("b.jpg", ""), ("猫 1.png", "a **cat**")]
    assert [(one.name, one.pictures) for one in library.datasets()] == [("cats", 2)]


def test_a_picture_is_never_overwritten_and_the_same_one_is_added_once(library):
    assert library.add_picture("cats", "a.png", png((1, 1, 1)), "first") == "a.png"
    assert library.add_picture("cats", "a.png", png((1, 1, 1))) == "a.png"
    assert library.add_picture("cats", "a.png", png((2, 2, 2))) == "a_2.png"
    assert library.add_picture("cats", "A.jpg", png((3, 3, 3)), "third") == "A_3.jpg", "a.txt belongs to the first"
    captions = {one.file: one.caption for one in library.pictures("cats")}
    assert captions == {"a.png": "first", "a_2.png": "", "A_3.jpg": "third"}


def test_pictures_that_come_at_once_under_one_name_are_all_there(library):
    pictures = [png((shade, 0, 0)) for shade in range(0, 240, 20)]
    begin = threading.Barrier(len(pictures))

    def add(data):
        begin.wait()
        return library.add_picture("cats", "a.png", data)

    with ThreadPoolExecutor(len(pictures)) as pool:
        names = list(pool.map(add, pictures))
    assert len(set(names)) == len(pictures)
    assert {library.picture("cats", name).read_bytes() for name in names} == set(pictures)


def test_pictures_that_are_left_out_at_once_are_all_left_out(library):
    """Two quick clicks are two requests, which read and write the same file."""
    names = [library.add_picture("cats", f"{shade}.png", png((shade, 0, 0))) for shade in range(0, 120, 10)]
    begin = threading.Barrier(len(names))

    def leave_out(name):
        begin.wait()
        library.exclude("cats", [name])

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(leave_out, names))
    assert all(picture.excluded for picture in library.pictures("cats"))


def test_a_picture_that_comes_again_leaves_the_caption_as_it_was_edited(library):
    library.add_picture("cats", "a.png", png(), "as it came")
    library.add_picture("cats", "b.png", png((9, 9, 9)))
    library.write_captions("cats", {"a.png": "as somebody wrote it"})
    library.add_picture("cats", "a.png", png(), "as it came")
    library.add_picture("cats", "b.png", png((9, 9, 9)), "the first one")
    assert [one.caption for one in library.pictures("cats")] == ["as somebody wrote it", "the first one"]


@pytest.mark.parametrize("data", [b"", b"\x89PNG nonsense", b"<svg/>", png(size=(8, 8)), png(size=(2000, 20))])
def test_what_cannot_be_trained_on_leaves_nothing(library, data):
    before = sorted(library.folder("cats").iterdir())
    with pytest.raises(UserError, match=r"a\.png") as caught:
        library.add_picture("cats", "a.png", data)
    assert caught.value.field == "pictures" and "tmp" not in caught.value.message
    assert sorted(library.folder("cats").iterdir()) == before


NOT_PICTURES = ["a.exe", "a.txt", "metadata.csv", "CON.png", ".hidden.png", "a/b.png"]


@pytest.mark.parametrize("name", [*EVIL_PATHS[::3], *NOT_PICTURES])
def test_upload_names_are_plain(library, name, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError):
        library.add_picture("cats", name, png())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", EVIL_PATHS[::3])
def test_dataset_names_are_plain(library, name):
    for use in (library.create, library.folder, library.pictures):
        with pytest.raises(UserError):
            use(name)


def test_captions_are_written_where_they_were_read_from(library):
    for name in "ab":
        library.add_picture("cats", f"{name}.png", png((ord(name), 0, 0)))
    library.write_captions("cats", {"a.png": "first", "b.png": "second"})
    assert (library.folder("cats") / "a.txt").read_text() == "first\n"
    table = library.folder("cats") / "metadata.csv"
    table.write_text('filename,prompt\na.png,"from, table"\n')
    library.write_captions("cats", {"a.png": 'new, "quoted"\nline', "b.png": "third"})
    captions = {one.file: one.caption for one in library.pictures("cats")}
    assert captions == {"a.png": 'new, "quoted"\nline', "b.png": "third"}
    assert (library.folder("cats") / "a.txt").read_text() == "first\n"


def test_wrong_captions_change_nothing(library):
    library.add_picture("cats", "a.png", png(), "old")
    for bad in ({"a.png": "new", "nowhere.png": "x"}, {"a.png": "x" * 30_000}, {"a.png": "a\0b"}, {"../a.png": "x"}):
        with pytest.raises(UserError):
            library.write_captions("cats", bad)
    assert library.pictures("cats")[0].caption == "old"


def test_captions_in_json_lines_go_back_there(library):
    library.add_picture("cats", "a.png", png())
    (library.folder("cats") / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x", "id": 1}\n')
    library.write_captions("cats", {"a.png": "new"})
    table = library.folder("cats") / "metadata.jsonl"
    assert table.read_text() == '{"file_name": "a.png", "text": "new", "id": 1}\n'


def test_thumbnails_are_small_and_made_once(library):
    library.add_picture("cats", "a.png", png(size=(800, 600)))
    picture = library.picture("cats", "a.png")
    path = library.thumbnail(picture)
    assert Image.open(path).size == (256, 192)
    changed = path.stat().st_mtime_ns
    assert library.thumbnail(picture) == path and path.stat().st_mtime_ns == changed


def test_links_out_of_the_dataset_are_not_served(library, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    (library.folder("cats") / "link.png").symlink_to(secret)
    with pytest.raises(UserError):
        library.picture("cats", "link.png")


def test_the_list_says_how_much_lies_there_and_shows_a_picture(library, tmp_path):
    first, second = png(), png((9, 9, 9))
    library.add_picture("cats", "b.png", second)
    library.add_picture("cats", "a.png", first, "a cat")
    (tmp_path / "datasets" / "theirs").mkdir()
    cats, theirs = sorted(library.datasets(), key=lambda dataset: dataset.name)
    assert (cats.cover, cats.own, cats.pictures) == ("a.png", True, 2)
    assert cats.size == sum(path.stat().st_size for path in (tmp_path / "datasets" / "cats").iterdir())
    assert cats.size >= len(first) + len(second) + len("a cat")
    assert (theirs.cover, theirs.own, theirs.size) == (None, False, 0)


def test_a_data_set_takes_what_it_alone_has_in_the_cache_with_it(library, tmp_path):
    def cache(name):
        return TensorCache(tmp_path / "cache", user=library.folder(name).resolve())

    library.create("dogs")
    alone, shared, kept = ("0" * 64, "1" * 64, "2" * 64)
    for name, keys in (("cats", (alone, shared)), ("dogs", (kept,))):
        for key in keys:
            cache(name).put(key, {"x": torch.zeros(2)})
    assert cache("dogs").get(shared) is not None, "encoded for the other one, and used again"
    library.rename("cats", "kittens")
    library.set_aside("kittens")
    left = TensorCache(tmp_path / "cache")
    assert [key in left for key in (alone, shared, kept)] == [False, True, True]
    library.set_aside("dogs")
    assert not list((tmp_path / "cache").rglob("*.cache")) and not list((tmp_path / "cache").rglob("*.keys"))
