"""Captions written to files: nothing else in them changes, nothing is lost, and whoever changed them first is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_trainer.dataset.backups import BACKUP_FOLDER, list_backups, make_backup, restore_backup
from lora_trainer.dataset.caption_files import read_captions
from lora_trainer.dataset.listing import list_folder
from lora_trainer.dataset.metadata import read_rows
from lora_trainer.dataset.metadata_rows import render, rewrite_csv
from lora_trainer.dataset.writing import CaptionFolder, ConflictError, merge
from lora_trainer.errors import UserError


def pictures(root: Path, *names: str) -> Path:
    for name in names or ("a.png", "b.png", "c.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), "red").save(root / name, "PNG")
    return root


def texts(root: Path, **options) -> dict[str, str]:
    return {key: source.text for key, source in read_captions(root, **options).items()}


def test_a_caption_goes_back_to_where_it_came_from(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "sub/c.png", "d.png")
    (tmp_path / "metadata.csv").write_text("filename,prompt\na.png,one\n")
    (tmp_path / "b.caption").write_text("two")
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "three", "id": 7}\n')
    written = CaptionFolder(tmp_path).write({"a.png": "1, 一", "b.png": "2", "sub/c.png": "3", "d.png": "4"})
    assert texts(tmp_path) == {"a.png": "1, 一", "b.png": "2", "sub/c.png": "3", "d.png": "4"}
    assert (tmp_path / "b.caption").read_text() == "2\n" and not (tmp_path / "b.txt").exists()
    assert json.loads((tmp_path / "sub" / "metadata.jsonl").read_text()) == {"file_name": "c.png", "text": "3", "id": 7}
    # What has no caption yet joins the folder's metadata file, which would win over a text file.
    assert (tmp_path / "metadata.csv").read_text(encoding="utf-8") == 'filename,prompt\na.png,"1, 一"\nd.png,4\n'
    assert written.backup == 1 and len(written.files) == 3


def test_every_other_byte_of_a_csv_stays(tmp_path):
    pictures(tmp_path)
    source = (
        "\ufeffid;Image;Prompt;note\r\n"
        '1;a.png;"old; one";keep \r\n'
        "\r\n"
        '2;gone.png;"two\r\nlines";"x"\r\n'
        "3;b.png;;empty\r\n"
        "too few\r\n"
    )
    (tmp_path / "metadata.csv").write_bytes(source.encode())
    CaptionFolder(tmp_path).write({"a.png": 'new; "quoted"', "b.png": "filled", "c.png": "added"})
    expected = (
        source.replace('1;a.png;"old; one";keep \r\n', '1;a.png;"new; ""quoted""";keep \r\n')
        .replace("3;b.png;;empty", "3;b.png;filled;empty") + ";c.png;added;\r\n"
    )  # fmt: skip
    assert (tmp_path / "metadata.csv").read_bytes() == expected.encode()


def test_a_caption_with_commas_and_no_quotes_is_replaced_as_a_whole(tmp_path):
    pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text("a.png,red, green, blue\nb.png,two")
    CaptionFolder(tmp_path).write({"a.png": "x", "c.png": "y, z"})
    assert (tmp_path / "metadata.csv").read_text() == 'a.png,x\nb.png,two\nc.png,"y, z"\n'


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")), min_size=1, max_size=5))
def test_any_caption_comes_back_from_csv_and_jsonl(tmp_path_factory, captions):
    folder = tmp_path_factory.mktemp("rows")
    wanted = {f"{index}.png": caption.strip() for index, caption in enumerate(captions) if caption.strip()}
    for kind in (".csv", ".jsonl"):
        path = folder / f"metadata{kind}"
        path.write_bytes(render(kind, wanted).encode("utf-8"))
        problems: list = []
        rows = read_rows(path, problems)
        assert {row.filename: row.caption for row in rows} == wanted and not problems


def test_rewriting_nothing_changes_nothing():
    source = 'a.png,"x"\r\n\r\nb.png,y,z'
    assert rewrite_csv(source, lambda line, name, caption: None) == source


def test_an_empty_text_file_is_filled_and_a_caption_can_be_emptied(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "A.TXT").write_text("")
    (tmp_path / "b.txt").write_text("two")
    CaptionFolder(tmp_path).write({"a.png": "one", "b.png": ""})
    assert (tmp_path / "A.TXT").read_text() == "one\n" and not (tmp_path / "a.txt").exists()
    assert texts(tmp_path) == {"a.png": "one"} and (tmp_path / "b.txt").read_bytes() == b""


def test_pictures_of_one_stem(tmp_path):
    pictures(tmp_path, "a.png", "a.jpg")
    CaptionFolder(tmp_path).write({"a.png": "one", "a.jpg": "two"})
    assert texts(tmp_path) == {"a.png": "one", "a.jpg": "two"}
    shared = pictures(tmp_path / "shared", "a.png", "a.jpg")
    (shared / "a.txt").write_text("both")
    with pytest.raises(UserError, match=r"share the caption file a\.txt"):
        CaptionFolder(shared).write({"a.png": "one"})
    CaptionFolder(shared).write({"a.png": "same", "a.jpg": "same"})
    assert texts(shared) == {"a.png": "same", "a.jpg": "same"}


def test_somebody_elses_words_are_told_and_nothing_is_written(tmp_path):
    pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text("filename,prompt\na.png,one\nb.png,two\n")
    folder = CaptionFolder(tmp_path)
    (tmp_path / "metadata.csv").write_text("filename,prompt\na.png,theirs\nb.png,changed too\n")
    with pytest.raises(ConflictError, match=r"a\.png") as caught:
        folder.write({"a.png": "mine", "c.png": "new"}, expected={"a.png": "one", "c.png": ""})
    assert caught.value.current == {"a.png": "theirs"}
    assert texts(tmp_path) == {"a.png": "theirs", "b.png": "changed too"} and not list_backups(tmp_path)
    folder.write({"a.png": "theirs", "c.png": "new"}, expected={"a.png": "one", "c.png": ""})  # the same words
    assert texts(tmp_path) == {"a.png": "theirs", "b.png": "changed too", "c.png": "new"}


def test_what_cannot_be_read_is_not_written(tmp_path):
    pictures(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        CaptionFolder(tmp_path).write({"b.png": "fine", "a.png": "new"})
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xe9" and not (tmp_path / "b.txt").exists()
    with pytest.raises(UserError, match="no picture"):
        CaptionFolder(tmp_path).write({"../a.png": "x"})
    with pytest.raises(UserError, match="characters"):
        CaptionFolder(tmp_path).write({"b.png": "half \ud83d"})


def test_links_stay_links_and_do_not_lead_out(tmp_path):
    root = pictures(tmp_path / "data")
    outside = tmp_path / "outside.txt"
    outside.write_text("theirs")
    (root / "a.txt").symlink_to(outside)
    with pytest.raises(UserError, match="leads out"):
        CaptionFolder(root, confined=True).write({"a.png": "new"})
    CaptionFolder(root).write({"a.png": "new"})
    assert (root / "a.txt").is_symlink() and outside.read_text() == "new\n"


def test_output_elsewhere_leaves_the_text_files_alone(tmp_path):
    pictures(tmp_path)
    (tmp_path / "a.txt").write_text("by hand")
    output = tmp_path / "metadata.csv"
    CaptionFolder(tmp_path, output=output).write({"a.png": "by hand, more", "b.png": "two"})
    assert texts(tmp_path) == {"a.png": "by hand, more", "b.png": "two"}
    assert (tmp_path / "a.txt").read_text() == "by hand"
    CaptionFolder(tmp_path, output=".txt").write(texts(tmp_path))
    assert (tmp_path / "b.txt").read_text() == "two\n"
    with pytest.raises(UserError, match="neither"):
        CaptionFolder(tmp_path, output=tmp_path / "captions.xlsx")


def test_backups_are_numbered_exact_and_can_be_put_back(tmp_path):
    pictures(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    folder = CaptionFolder(tmp_path)
    assert folder.write({"a.png": "two", "b.png": "new"}).backup == 1
    assert folder.write({"a.png": "three"}).backup == 2
    assert folder.write({"a.png": "three"}).backup is None
    assert [(one.number, one.files) for one in list_backups(tmp_path)] == [(2, ("a.txt",)), (1, ("a.txt",))]
    assert not any(key.startswith(".") for key in list_folder(tmp_path).files)
    assert restore_backup(tmp_path, 1) == 3
    assert (tmp_path / "a.txt").read_bytes() == b"\xef\xbb\xbfone\r\n"
    restore_backup(tmp_path, 3)
    assert texts(tmp_path)["a.png"] == "three"
    (tmp_path / BACKUP_FOLDER / "0009.zip").write_bytes(b"cut off")
    assert [one.number for one in list_backups(tmp_path)] == [4, 3, 2, 1]
    assert make_backup(tmp_path, [tmp_path / "a.txt"]) == 10
    for number in (9, 77):
        with pytest.raises(UserError, match="no backup"):
            restore_backup(tmp_path, number)


@pytest.mark.parametrize(
    ("old", "new", "mode", "expected"),
    [
        ("mine", "theirs", "keep", "mine"),
        ("", "theirs", "keep", "theirs"),
        ("mine", "theirs", "replace", "theirs"),
        ("**red  hat**, (x:1.2)", "Red Hat, sky", "append", "**red  hat**, (x:1.2), sky"),
        ("a ||| b", "c, b", "prepend", "c, a ||| b"),
        ("", "c", "append", "c"),
    ],
)
def test_merging_keeps_what_was_there(old, new, mode, expected):
    assert merge(old, new, mode) == expected
    assert merge(expected, new, mode) == expected or mode == "replace"  # a job that runs again adds nothing twice


KILLED = """
import sys, itertools
from pathlib import Path
from lora_trainer.dataset.writing import CaptionFolder
folder = CaptionFolder(Path(sys.argv[1]))
keys = sorted(folder.read().listing.pictures)
print("ready", flush=True)
for turn in itertools.count(1):
    folder.write({key: f"caption of turn {turn} " + "x" * 2000 for key in keys})
"""


@pytest.mark.parametrize("table", [False, True], ids=["text files", "metadata.csv"])
def test_killed_in_the_middle_of_saving_every_caption_is_old_or_new(tmp_path, table):
    pictures(tmp_path, *(f"{index:02}.png" for index in range(6)))
    if table:
        rows = {f"{index:02}.png": "caption of turn 0 " + "x" * 2000 for index in range(6)}
        (tmp_path / "metadata.csv").write_text(render(".csv", rows))
    else:
        CaptionFolder(tmp_path).write({f"{index:02}.png": "caption of turn 0 " + "x" * 2000 for index in range(6)})
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = read_captions(tmp_path)  # raises if a file is half written
    turns = {int(source.text.split()[3]) for source in found.values()}
    assert len(found) == 6 and all(len(source.text.split()[4]) == 2000 for source in found.values())
    assert max(turns) > 0 and max(turns) - min(turns) <= 1 and (not table or len(turns) == 1)
