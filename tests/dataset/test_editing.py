"""Edits of captions, one or many: exact, undone to the letter, and saved without losing anybody's words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_trainer.dataset.caption_files import read_captions
from lora_trainer.dataset.captions import parse, plain_texts
from lora_trainer.dataset.checks import check_folder
from lora_trainer.dataset.editing import EditSession
from lora_trainer.dataset.edits import Edit, compile_pattern
from lora_trainer.dataset.fixes import apply_fix, apply_safe_fixes, fixes_of
from lora_trainer.dataset.picture_edits import PictureEdit, load_edits
from lora_trainer.dataset.writing import CaptionFolder, ConflictError
from lora_trainer.errors import UserError


def draw(path, color="red", size=(96, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def root(tmp_path):
    for name, caption in {"a": "sks, **red hat**, sky", "b": "Red Hat, *fog*", "c": ""}.items():
        draw(tmp_path / f"{name}.png", {"a": "red", "b": "green", "c": "blue"}[name])
        if caption:
            (tmp_path / f"{name}.txt").write_text(caption)
    return tmp_path


@pytest.fixture
def session(root):
    return EditSession(CaptionFolder(root))


@pytest.mark.parametrize(
    ("edit", "before", "after"),
    [
        (Edit("add", "blue, **Sky**"), "(sky:1.2), *fog*", "(sky:1.2), *fog*, blue"),
        (Edit("add", "sks", place="start"), "a ||| b", "sks, a ||| b"),
        (Edit("add", "x"), "", "x"),
        (Edit("remove", tags=("RED  hat",)), "a, **red hat**, (Red Hat:1.3), b", "a, b"),
        (Edit("remove", tags=("a",)), "a, b ||| a, c", "b ||| c"),
        (Edit("replace", "hat", ("red hat", "cap")), "**red hat**, cap, *dog*", "**hat**, *dog*"),
        (Edit("replace", "hat, **wool**", ("cap",)), "a, *cap*", "a, *hat*, **wool**"),
        (Edit("replace", "dog", ("cap",)), "dog, cap", "dog"),
        (Edit("move", tags=("c", "b"), place="start"), "a, b, **c**", "b, **c**, a"),
        (Edit("move", tags=("a",), place="end"), "a, b ||| c", "b ||| c, a"),
        (Edit("mark", "core", ("star",)), "a, *star*, b", "a, **star**, b"),
        (Edit("mark", "both", ("a red star",)), "a red **star**", "***a red star***"),
        (Edit("mark", "none", ("star",)), "***star***", "star"),
        (Edit("regex", r"\2 \1", pattern=r"(\w+) (hat)"), "red hat, blue hat", "hat red, hat blue"),
        (Edit("regex", "", pattern="HAT", ignore_case=True), "red hat", "red"),
        (Edit("remove", tags=("x",)), "odd ,  spacing,,", "odd ,  spacing,,"),
    ],
)
def test_an_edit_changes_what_it_says_and_nothing_else(edit, before, after):
    assert edit.function()(before).strip() == after


@pytest.mark.parametrize(
    "edit",
    [
        Edit("regex", "x", pattern="("),
        Edit("regex", r"\3", pattern="(a)"),
        Edit("regex", "x"),
        Edit("remove", tags=(" ",)),
        Edit("mark", "loud", ("a",)),
        Edit("move", tags=("a",), place="middle"),
        Edit("add", " "),
        Edit("explode"),
    ],
)
def test_an_edit_that_cannot_be_done_is_refused_before_anything_happens(session, edit):
    before = dict(session.captions)
    with pytest.raises(UserError):
        session.edit(edit, session.paths)
    assert session.captions == before and session.undo_label is None


@pytest.mark.parametrize("pattern", ["(a+)+$", "((a|b)*c)*", "(?:x{1,})*", r"(\w+,?)+!"])
def test_patterns_that_search_for_hours_are_refused(pattern):
    with pytest.raises(UserError, match="repeats"):
        compile_pattern(pattern)


@pytest.mark.parametrize("pattern", ["a+b+", r"\(a+\)+", "[(a+)]+", "(ab){2}", "(a|b)+", "(a+){3}"])
def test_harmless_patterns_are_not_refused(pattern):
    compile_pattern(pattern)


words = st.sampled_from(
    ["red hat", "**sky**", "*fog*", "(a:1.2)", "|||", "a\\, b", "中文**主体**", "x_y", "[b]", "{c|d}"]
)


@settings(max_examples=80, deadline=None)
@given(st.lists(words, max_size=6), st.sampled_from(["red hat", "sky", "fog", "a", "中文主体", "x_y"]), st.data())
def test_edits_keep_every_other_tag(items, tag, data):
    text = ", ".join(items)
    before = [plain for plain in plain_texts(parse(text)) if plain != tag]
    kind = data.draw(st.sampled_from(["remove", "replace", "move", "mark"]))
    edit = Edit(kind, {"replace": "new tag", "mark": "core"}.get(kind, ""), (tag,), place="start")
    after = [plain for plain in plain_texts(parse(edit.function()(text))) if plain not in (tag, "new tag")]
    assert after == before


def test_undo_and_redo_bring_back_every_letter(session):
    states = [dict(session.captions)]
    session.edit(Edit("add", "night"), session.paths)
    states.append(dict(session.captions))
    session.edit(Edit("replace", "cap", ("red hat",)), ["a.png", "b.png"])
    states.append(dict(session.captions))
    session.edit_pictures({"c.png": PictureEdit(excluded=True)})
    assert session.captions == states[-1] and session.pictures["c.png"].excluded
    session.undo()
    assert not session.pictures["c.png"].excluded
    for state in (states[1], states[0]):
        session.undo()
        assert session.captions == state
    with pytest.raises(UserError, match="nothing to undo"):
        session.undo()
    for state in states[1:]:
        assert session.redo() and session.captions == state
    assert session.undo_label == "replace red hat by cap"
    session.edit(Edit("set", "other"), ["a.png"])
    with pytest.raises(UserError, match="nothing to do again"):
        session.redo()
    assert session.edit(Edit("add", "other"), ["a.png"]).keys == ()  # nothing changed: no step
    assert session.undo_label == "write a caption"


def test_nothing_is_in_a_file_before_it_is_saved(session, root):
    session.edit(Edit("set", "a blue picture"), ["c.png"])
    session.edit_pictures({"a.png": PictureEdit(rotate=90, crop=(0, 0, 0.5, 1))})
    assert session.unsaved == ("a.png", "c.png")
    assert read_captions(root).keys() == {"a.png", "b.png"} and load_edits(root) == {}
    session.save()
    assert session.unsaved == () and read_captions(root)["c.png"].text == "a blue picture"
    assert load_edits(root)["a.png"].rotate == 90
    session.undo()
    session.undo()
    assert session.unsaved == ("a.png", "c.png")  # undone after saving: the files follow at the next save
    session.save()
    assert load_edits(root) == {} and "c.png" not in read_captions(root)


def test_other_peoples_changes_are_taken_over_or_told(session, root):
    session.edit(Edit("set", "mine"), ["a.png"])
    (root / "b.txt").write_text("theirs")
    draw(root / "new.png", "orange")
    session.save()
    assert session.captions["b.png"] == "theirs" and session.captions["new.png"] == "" and session.undo_label

    session.edit(Edit("set", "mine again"), ["a.png"])
    (root / "a.txt").write_text("theirs too")
    assert session.refresh().current == {"a.png": "theirs too"}
    with pytest.raises(ConflictError):
        session.save()
    assert (root / "a.txt").read_text() == "theirs too" and session.captions["a.png"] == "mine again"
    session.take_theirs(["a.png"])
    assert session.captions["a.png"] == "theirs too" and session.unsaved == ()
    session.undo()
    (root / "a.txt").write_text("and again")
    with pytest.raises(ConflictError):
        session.save()
    written = session.save(force=True)
    assert (root / "a.txt").read_text() == "mine again\n" and written.backup
    (root / "a.png").unlink()
    session.refresh()
    assert "a.png" not in session.captions and session.undo_label is None


@pytest.mark.parametrize("leave_folder", [True, False], ids=["empty", "gone"])
def test_a_drive_that_is_away_for_a_moment_costs_nothing(session, root, tmp_path_factory, leave_folder):
    session.edit(Edit("set", "mine"), ["a.png"])
    session.edit_pictures({"b.png": PictureEdit(excluded=True)})
    away = tmp_path_factory.mktemp("away") / "drive"
    root.rename(away)
    if leave_folder:
        root.mkdir()
    for look in (session.refresh, session.save):
        with pytest.raises(UserError):
            look()
    assert root.exists() == leave_folder and not list(root.glob("*"))
    if leave_folder:
        root.rmdir()
    away.rename(root)
    session.refresh()
    session.save()
    assert (root / "a.txt").read_text() == "mine\n" and load_edits(root)["b.png"].excluded


def test_typing_makes_one_backup_and_a_bulk_edit_another(session):
    backups = []
    for number in range(3):
        session.edit(Edit("set", f"text {number}"), ["a.png"])
        backups.append(session.save().backup)
    assert backups == [1, None, None]
    session.edit(Edit("add", "x"), ["a.png", "b.png"])
    assert session.save().backup == 2


def test_fixes_do_what_the_finding_asks_for(tmp_path):
    for index, caption in enumerate(["sks, red hat, dog", "sks, red-hat, dog", "red hat, dog", "sks, red hat, dog, x"]):
        draw(tmp_path / f"{index}.png", (index * 60, 20, 90), (700, 700 if index else 200))
        (tmp_path / f"{index}.txt").write_text(caption)
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "copy.txt").write_text("sks, dog")
    report = check_folder(tmp_path, trigger_word="sks")
    session = EditSession(CaptionFolder(tmp_path))
    kinds = {finding.kind: finding for finding in report.findings if fixes_of(finding)}
    assert {"trigger-missing", "near-synonyms", "universal-tag", "duplicate", "aspect-ratio"} <= kinds.keys()

    steps = apply_safe_fixes(session, report.findings)
    assert session.captions["2.png"] == "sks, red hat, dog" and session.captions["1.png"] == "sks, red hat, dog"
    assert session.pictures["copy.png"].excluded and session.captions["0.png"] == "sks, red hat, dog"
    for _ in steps:
        session.undo()
    assert session.unsaved == ()

    apply_fix(session, kinds["universal-tag"], "mark-core")
    assert session.captions["0.png"] == "sks, red hat, **dog**"
    apply_fix(session, kinds["aspect-ratio"], "crop")
    assert session.pictures["0.png"].size((700, 200)) == (400, 200)
    with pytest.raises(UserError, match="no fix"):
        apply_fix(session, kinds["aspect-ratio"], "mark-core")
    session.save()
    again = {finding.kind for finding in check_folder(tmp_path, trigger_word="sks").findings if finding.file == "0.png"}
    assert "aspect-ratio" not in again
