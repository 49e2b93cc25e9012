"""metadata.csv and metadata.jsonl: what is read, what is refused, and with which words."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lora_trainer.dataset.caption_files import read_captions
from lora_trainer.dataset.metadata import CaptionProblem, read_rows
from lora_trainer.errors import UserError
from tests.dataset.folders import captions, picture, scan_folder, write


def rows_of(tmp_path: Path, name: str, data: str | bytes) -> tuple[list[tuple[int, str, str]], list[CaptionProblem]]:
    problems: list[CaptionProblem] = []
    rows = read_rows(write(tmp_path / name, data), problems)
    assert all(problem.path == tmp_path / name for problem in problems)
    return [(row.line, row.filename, row.caption) for row in rows], problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("filename,prompt\na.png,x\n", [(2, "a.png", "x")]),
        ("a.png,x\nb.png,y", [(1, "a.png", "x"), (2, "b.png", "y")]),
        ("file_name,text\r\na.png,x\r\n", [(2, "a.png", "x")]),
        ("Caption,extra,Image\nx,1,a.png\n", [(2, "a.png", "x")]),
        ("\ufefffilename,prompt\n\n\na.png,x\n", [(4, "a.png", "x")]),
        ('filename,prompt\na.png,"a ""b"", c\nd"\nb.png,y\n', [(2, "a.png", 'a "b", c\nd'), (4, "b.png", "y")]),
        ('"中文 图.png","**主体**，光"\n', [(1, "中文 图.png", "**主体**，光")]),
        ("filename;prompt\na.png;x, y\n", [(2, "a.png", "x, y")]),
        ("", []),
        ("filename,prompt\n", []),
    ],
)
def test_csv_as_rfc_4180_has_it(tmp_path, text, expected):
    assert rows_of(tmp_path, "metadata.csv", text) == (expected, [])


@pytest.mark.parametrize(
    ("text", "line", "message", "fatal"),
    [
        ("filename,prompt\na.png\n", 2, "1 of 2 fields", False),
        ("filename,prompt\n,x\n", 2, "names no picture", False),
        ("filename,prompt\na.png,\n", 2, "no caption", False),
        ("filename,prompt\n/etc/a.png,x\n", 2, "absolute path", False),
        ("filename,prompt\nC:\\a.png,x\n", 2, "absolute path", False),
        ("filename,prompt\nb/../../a.png,x\n", 2, "'..'", False),
        ("filename,prompt\n..\\a.png,x\n", 2, "'..'", False),
        ("filename,label\na.png,x\n", 1, "needs a column", True),
        ('filename,prompt\na.png,"x\nb.png,y\n', 2, "not valid CSV", True),
        ('filename,prompt\na.png,"x" y\n', 2, "not valid CSV", True),
        ("filename,prompt\na.png,x\0y\n", 2, "NUL", True),
        (b"filename,prompt\na.png,x\xe9\n", 2, "0xe9", True),
    ],
)
def test_a_malformed_csv_names_file_and_line(tmp_path, text, line, message, fatal):
    rows, problems = rows_of(tmp_path, "metadata.csv", text)
    assert rows == []
    assert [(problem.line, problem.fatal) for problem in problems] == [(line, fatal)]
    assert message in problems[0].message and "metadata.csv" in str(problems[0])


def test_a_caption_with_unquoted_commas_is_kept_whole(tmp_path):
    rows, problems = rows_of(tmp_path, "metadata.csv", "filename,prompt\na.png,a cat, sitting, 4k\n")
    assert rows == [(2, "a.png", "a cat, sitting, 4k")]
    assert problems[0].line == 2 and "quotes" in problems[0].message


@pytest.mark.parametrize(
    ("text", "line", "fatal"),
    [
        ('{"filename": "a.png"', 1, True),
        ('\n["a.png", "x"]', 2, True),
        ("[" * 100_000, 1, True),
        ("1" * 5000, 1, True),
        ('{"filename": 1, "prompt": "x"}', 1, False),
        ('{"filename": "a.png", "prompt": ["x"]}', 1, False),
        ('{"filename": "a.png", "prompt": "\\ud800"}', 1, False),
        ('{"filename": "a\\u0000.png", "prompt": "x"}', 1, False),
        ('{"filename": "a.png", "label": "x"}', 1, False),
        ("{}", 1, False),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path, text, line, fatal):
    rows, problems = rows_of(tmp_path, "metadata.jsonl", text)
    assert rows == []
    assert [(problem.line, problem.fatal) for problem in problems] == [(line, fatal)]


def test_jsonl_with_aliases_and_more_fields(tmp_path):
    text = '\ufeff{"image": "a.png", "caption": " x\\ny ", "score": 3}\r\n\r\n{"file_name": "b.png", "text": "z"}\r\n'
    assert rows_of(tmp_path, "metadata.jsonl", text) == ([(1, "a.png", "x\ny"), (3, "b.png", "z")], [])


def test_rows_are_matched_as_people_write_names(tmp_path):
    for name in ("Sub/Ä b.PNG", "c.png", "中.png"):
        picture(tmp_path / name)
    write(tmp_path / "metadata.csv", "filename,prompt\nsub\\A\u0308 B.png,x\n./c.png,y\n中.png,z\n")
    assert captions(scan_folder(tmp_path)) == {"Sub/Ä b.PNG": "x", "c.png": "y", "中.png": "z"}


def test_missing_duplicate_and_non_picture_rows_warn_with_file_and_line(tmp_path):
    picture(tmp_path / "a.png")
    write(tmp_path / "notes.md", "x")
    write(tmp_path / "metadata.csv", "filename,prompt\na.png,first\nb.png,x\na.png,second\nnotes.md,x\n")
    dataset = scan_folder(tmp_path)
    assert captions(dataset) == {"a.png": "first"}
    messages = [text.replace(str(tmp_path) + "/", "") for text in dataset.warnings]
    assert messages == [
        "metadata.csv, line 3: b.png is not in the folder; the row is left out.",
        "metadata.csv, line 4: names a.png again; line 2 counts.",
        "metadata.csv, line 5: notes.md is no picture that can be trained on; the row is left out.",
    ]


def test_csv_goes_before_jsonl_and_says_so(tmp_path):
    picture(tmp_path / "a.png")
    write(tmp_path / "metadata.csv", "a.png,csv")
    write(tmp_path / "metadata.jsonl", '{"filename": "a.png", "prompt": "jsonl"}')
    dataset = scan_folder(tmp_path)
    assert captions(dataset) == {"a.png": "csv"}
    assert any("metadata.jsonl" in text and "left out" in text for text in dataset.warnings)


def test_a_named_metadata_file_must_exist_and_be_of_a_known_kind(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"metadata_path: .*gone\.csv: there is no such file"):
        scan_folder(tmp_path, metadata_path=str(tmp_path / "gone.csv"), trigger_word="x")
    other = write(tmp_path / "labels.xlsx", b"PK")
    with pytest.raises(UserError, match=r"labels\.xlsx: is neither"):
        scan_folder(tmp_path, metadata_path=str(other), trigger_word="x")


def test_a_caption_source_says_where_it_came_from(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    write(tmp_path / "metadata.csv", "filename,prompt\na.png,x\n")
    write(tmp_path / "b.txt", "y")
    found = read_captions(tmp_path)
    assert (found["a.png"].kind, found["a.png"].line, found["a.png"].path.name) == ("metadata", 2, "metadata.csv")
    assert (found["b.png"].kind, found["b.png"].line, found["b.png"].path.name) == ("file", None, "b.txt")


def test_hundreds_of_damaged_metadata_files_end_in_rows_or_named_problems(tmp_path):
    good = {
        "metadata.csv": 'filename,prompt\na.png,"one, ""two"""\n中 文.png,三\nsub/b.png,x\n'.encode(),
        "metadata.jsonl": '{"filename": "a.png", "prompt": "one"}\n{"file_name": "中.png", "text": "二"}\n'.encode(),
    }
    rng = random.Random(0)
    spice = [b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"{", b"}", b"[", b"\\", b"\\ud800", b"../", b";"]
    spice.append(b"\xef\xbb\xbf")
    outcomes = set()
    for _ in range(400):
        for name, data in good.items():
            damaged = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
            for _ in range(rng.randrange(1, 6)):
                position = rng.randrange(len(damaged) + 1)
                damaged[position : position + rng.randrange(3)] = rng.choice(spice)
            rows, problems = rows_of(tmp_path, name, bytes(damaged))
            outcomes.add((bool(rows), bool(problems)))
            for _, filename, caption in rows:
                assert filename and caption and ".." not in filename.split("/")
                (filename + caption).encode("utf-8")
    assert outcomes >= {(True, False), (True, True), (False, True)}


@pytest.mark.parametrize("row, caption", [
    ('a.png, "a red hat, on a dog"', "a red hat, on a dog"), ('a.png, "a"', "a"),
    ('a.png, "say ""hi"", you"', 'say "hi", you'),
    ('a.png,"""a"""', '"a"'), ('a.png, "a" dog', '"a" dog'), ('a.png, "', '"'),
])  # fmt: skip
def test_a_space_before_a_quoted_caption_puts_no_quotes_into_it(tmp_path, row, caption):
    path = write(tmp_path / "metadata.csv", f"filename, prompt\n{row}\n")
    assert [found.caption for found in read_rows(path, [])] == [caption]
