"""The editor through HTTP: open, filter, edit, undo, save, check, fix, caption, export."""

from __future__ import annotations

import base64
import io
import json
import time

import pytest
from fastapi import FastAPI
from PIL import Image

from lora_trainer.api import add_routes
from lora_trainer.captioning.base import Description, HostCaptioner
from lora_trainer.dataset.caption_files import read_captions
from lora_trainer.dataset.picture_edits import load_edits
from lora_trainer.dataset.thumbnails import ThumbnailCache
from lora_trainer.host.base import AccessPolicy
from tests.api.conftest import Client
from tests.counting import calls
from tests.jobs.fakes import wait_for

CAPTIONS = {"a.png": "sks, **red hat**, sky", "b.png": "sks, Red Hat, *fog*", "c.png": "dog, sks"}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "trainer" / "datasets" / "cats"
    folder.mkdir(parents=True)
    for index, (name, caption) in enumerate(CAPTIONS.items()):
        Image.new("RGB", (80, 60), (index * 90, 30, 30)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder


@pytest.fixture
def editor(client, root):
    answer = client.post("/editor", json={"folder": "cats", "trigger_word": "sks"})
    assert answer.status_code == 200, answer.text
    return Editor(client, answer.json()["id"])


class Editor:
    def __init__(self, client, identifier):
        self.client, self.id = client, identifier

    def post(self, path, status=200, **body):
        answer = self.client.post(f"/editor/{self.id}/{path}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def get(self, path="", status=200):
        answer = self.client.get(f"/editor/{self.id}/{path}".rstrip("/"))
        assert answer.status_code == status, answer.text
        return answer.json()

    def files(self, **wanted):
        return self.post("keys", **wanted)["files"]

    def wait(self):
        return wait_for(lambda: (state := self.get())["task"]["status"] != "running" and state, "the task")


def texts(root):
    return {key: source.text for key, source in read_captions(root).items()}


def test_pages_and_filters(editor):
    page = editor.post("pictures?limit=2&offset=1")
    assert page["total"] == 3 and [row["file"] for row in page["rows"]] == ["b.png", "c.png"]
    assert page["rows"][0]["caption"] == CAPTIONS["b.png"] and page["state"]["captioned"] == 3
    assert editor.files(tags=["red hat"]) == ["a.png", "b.png"]
    assert editor.files(missing=["RED HAT"]) == ["c.png"]
    assert editor.files(core="red hat") == ["a.png"] and editor.files(mood="fog") == ["b.png"]
    assert editor.files(text="FOG") == ["b.png"] and editor.files(text="c.png") == ["c.png"]
    assert editor.files(tags=["sks"], missing=["sky", "dog"]) == ["b.png"]
    assert editor.files(state="uncaptioned") == [] and editor.files(state="unsaved") == []
    assert editor.post("keys", 400, state="odd")["field"] == "state"
    editor.get("pictures", 405)


def test_edit_undo_redo_and_save(editor, root):
    changed = editor.post("edit", kind="replace", tags=["red hat"], value="cap", filter={})
    assert changed["changed"] == 2 and changed["rows"][0]["caption"] == "sks, **cap**, sky"
    assert changed["rows"][0]["unsaved"] and changed["state"]["unsaved"] == 2
    assert changed["state"]["undo"] == "replace red hat by cap" and texts(root) == CAPTIONS
    assert editor.post("undo")["state"]["unsaved"] == 0
    assert editor.post("redo")["changed"] == 2 and editor.files(state="unsaved") == ["a.png", "b.png"]
    editor.post("captions", captions={"c.png": "a black dog"})
    editor.post("pictures/edit", files=["c.png"], rotate=450, crop=[0, 0, 0.5, 1])
    editor.post("pictures/edit", files=["b.png"], excluded=True)
    saved = editor.post("save")
    assert saved["saved"] and saved["backup"] == 1
    assert saved["state"]["unsaved"] == 0 and saved["state"]["excluded"] == 1
    assert texts(root) == {"a.png": "sks, **cap**, sky", "b.png": "sks, cap, *fog*", "c.png": "a black dog"}
    assert load_edits(root)["c.png"].rotate == 90 and load_edits(root)["b.png"].excluded
    row = editor.post("pictures")["rows"][2]
    assert row["crop"] == [0, 0, 0.5, 1] and row["rotate"] == 90
    answer = editor.client.get(f"/editor/{editor.id}/thumbnails/c.png?v={row['version']}")
    assert Image.open(io.BytesIO(answer.content)).size == (30, 80)
    assert editor.client.get(f"/editor/{editor.id}/pictures/c.png").content == (root / "c.png").read_bytes()
    editor.post("pictures/edit", files=["c.png"], clear_crop=True, rotate=0)
    editor.post("edit", kind="regex", pattern="black (dog)", value=r"\1", files=["c.png"])
    assert editor.files(text="a dog") == ["c.png"]


def test_what_is_wrong_is_told_and_changes_nothing(editor, client, root):
    for body in ({"kind": "regex", "pattern": "(a+)+", "filter": {}}, {"kind": "explode", "filter": {}},
                 {"kind": "add", "value": "x"}, {"kind": "add", "value": "x", "files": ["../x.png"]}):  # fmt: skip
        assert {"message", "remedy"} <= editor.post("edit", 400, **body).keys()
    editor.post("pictures/edit", 400, files=["a.png"], crop=[0, 0])
    editor.post("pictures/edit", 400, files=["a.png"], rotate=45)
    editor.post("pictures/edit", 400, files=["nobody.png"], excluded=True)
    editor.post("undo", 400)
    assert editor.get()["unsaved"] == 0
    for file in ("../../jobs.sqlite", "a.txt", "/etc/passwd", "%2e%2e/x.png"):
        for kind in ("pictures", "thumbnails"):
            assert client.get(f"/editor/{editor.id}/{kind}/{file}").status_code in (400, 404)
    assert client.get("/editor/0123456789abcdef").status_code == 404


def test_thumbnails_come_together_as_far_as_they_are_made_in_a_moment(editor, root, monkeypatch):
    editor.post("pictures/edit", files=["c.png"], rotate=90)
    (root / "b.png").write_bytes(b"no picture")
    wanted = ["c.png", "b.png", "../../jobs.sqlite", "a.txt", "a.png"]
    monkeypatch.setattr("lora_trainer.api.editor.THUMBNAILS_SECONDS", 60)
    found = editor.post("thumbnails", files=wanted)["pictures"]
    assert list(found) == wanted and not any(found[name] for name in wanted[1:-1])
    head, data = found["c.png"].split(",")
    assert head == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (60, 80)
    monkeypatch.setattr("lora_trainer.api.editor.THUMBNAILS_SECONDS", -1)
    assert list(editor.post("thumbnails", files=["a.png", "c.png"])["pictures"]) == ["a.png"]


def test_a_thumbnail_that_is_deleted_meanwhile_costs_only_itself(editor, manager, monkeypatch):
    get = ThumbnailCache.get

    def get_and_lose(cache, picture, *edit):
        path = get(cache, picture, *edit)
        if picture.name == "b.png":
            path.unlink()
        elif picture.name == "c.png":  # the folder is read again by another request
            del editor_session.session.pictures["a.png"]
        return path

    editor_session = manager.sessions.get(editor.id)
    monkeypatch.setattr(ThumbnailCache, "get", get_and_lose)
    monkeypatch.setattr("lora_trainer.api.editor.THUMBNAILS_SECONDS", 60)
    found = editor.post("thumbnails", files=["c.png", "b.png", "a.png"])["pictures"]
    assert found["c.png"] and found["a.png"] and not found["b.png"]


def test_a_conflict_is_told_with_both_texts(editor, root):
    editor.post("captions", captions={"a.png": "mine", "b.png": "mine too"})
    (root / "a.txt").write_text("theirs")
    (root / "c.txt").write_text("theirs, not mine")
    answer = editor.post("save")
    assert not answer["saved"] and answer["conflicts"] == [{"file": "a.png", "yours": "mine", "theirs": "theirs"}]
    assert texts(root)["b.png"] == CAPTIONS["b.png"]
    assert editor.post("refresh")["conflicts"] == answer["conflicts"]
    editor.post("theirs", files=["a.png"])
    assert editor.post("save")["saved"]
    assert texts(root) == {"a.png": "theirs", "b.png": "mine too", "c.png": "theirs, not mine"}
    editor.post("captions", captions={"a.png": "mine"})
    (root / "a.txt").write_text("again")
    assert editor.post("save", force=True)["saved"] and texts(root)["a.png"] == "mine"
    backups = editor.get("backups")["backups"]
    editor.post("restore", number=backups[0]["number"])
    assert texts(root)["a.png"] == "again" and editor.files(text="again") == ["a.png"]


def test_the_session_outlives_the_page_and_reload_ui(editor, client, manager, host, root):
    editor.post("captions", captions={"a.png": "not saved"})
    (root / "new.txt").write_text("new")
    Image.new("RGB", (50, 50)).save(root / "new.png")
    again = client.post("/editor", json={"folder": "cats"}).json()
    assert again["id"] == editor.id and again["unsaved"] == 1 and again["pictures"] == 4
    app = FastAPI()
    add_routes(app, manager, host)
    assert Client(app).get(f"/editor/{editor.id}").json()["unsaved"] == 1
    editor.post("close", 400)
    editor.post("close?discard=true")
    editor.get(status=404)
    assert texts(root)["a.png"] == CAPTIONS["a.png"]


def test_who_may_open_what(client, host, tmp_path, root):
    outside = tmp_path / "photos"
    outside.mkdir()
    Image.new("RGB", (50, 50)).save(outside / "a.png")
    assert client.post("/editor", json={"folder": str(outside)}).json()["pictures"] == 1
    host.policy = AccessPolicy(roots=())
    assert client.post("/editor", json={"folder": str(outside)}).status_code == 400
    assert client.post("/editor", json={"folder": "cats"}).status_code == 200
    assert client.post("/editor", json={"folder": "cats", "metadata_path": str(outside / "m.csv")}).status_code == 400
    assert client.post("/editor", json={"folder": "no such"}).status_code == 400
    assert client.post("/editor", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    host.policy = AccessPolicy(api_credentials={"u": "p"})
    assert client.get("/captioners").status_code == 401


def test_tags_suggestions_and_synonyms(editor):
    answer = editor.get("tags")
    assert answer["tags"][0] == {"text": "sks", "count": 3, "share": 1, "weight": 1, "core": False, "mood": False}
    assert {tag["text"] for tag in answer["tags"] if tag["core"]} == {"red hat"}
    editor.post("captions", captions={"c.png": "red-hat"})
    assert editor.get("tags")["synonyms"] == [{"often": "red hat", "seldom": "red-hat", "reason": "spacing"}]


def test_check_and_fix(editor, root):
    (root / "copy.png").write_bytes((root / "a.png").read_bytes())
    (root / "copy.txt").write_text("a copy")
    editor.get("report", 400)
    editor.post("refresh")
    editor.post("check", 202, resolution="64")
    state = editor.wait()
    assert state["task"]["status"] == "finished" and state["has_report"] and not state["report_stale"]
    report = editor.get("report")
    (duplicate,) = (one for one in report["findings"] if one["kind"] == "duplicate")
    assert duplicate["fixes"][0] == {"name": "exclude", "label": "Exclude the picture", "safe": True}
    assert editor.files(problem="duplicate") == ["a.png", "copy.png"] and "copy.png" in editor.files(problem="any")
    fixed = editor.post("fix", index=duplicate["index"], name="exclude")
    assert fixed["rows"][0]["excluded"] and fixed["state"]["report_stale"]
    editor.post("undo")
    assert "copy.png" in {row["file"] for row in editor.post("fix", all_safe=True)["rows"]}
    assert editor.files(text="sks, a copy") == ["copy.png"]
    editor.post("fix", 400, index=999, name="exclude")
    editor.post("check", 400)  # unsaved
    editor.post("save")
    editor.post("check", 202)
    assert not any(one["kind"] == "duplicate" for one in (editor.wait(), editor.get("report"))[1]["findings"])


class Slow:
    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def describe(self, images):
        time.sleep(self.seconds)
        return [Description(f"{image.width} wide") for image in images]

    def close(self): ...


def test_captioning_in_the_background(editor, host, root):
    host.captioners = lambda: {"slow": HostCaptioner("Slow", lambda settings: Slow())}
    listed = editor.client.get("/captioners").json()
    assert listed["captioners"][0]["name"] == "slow" and "append" in listed["modes"]
    assert str(root.parents[1] / "captioners") in json.dumps(listed)  # where weights would go
    editor.post("caption", 202, captioner="slow", mode="append", files=["a.png"], template="**{caption}**")
    state = editor.wait()
    assert state["task"]["status"] == "finished" and state["task"]["result"]["written"] == 1
    assert texts(root)["a.png"] == CAPTIONS["a.png"] + ", **80 wide**"
    assert editor.files(tags=["80 wide"]) == ["a.png"]
    editor.post("caption", 400, captioner="blip")
    editor.post("caption", 400, captioner="slow", template="x")
    editor.post("captions", captions={"a.png": "unsaved"})
    assert "not saved" in editor.post("caption", 400, captioner="slow")["message"]


def test_a_caption_task_can_be_cancelled_and_fails_in_words(editor, host, root):
    host.captioners = lambda: {"slow": HostCaptioner("Slow", lambda settings: Slow(0.2))}
    editor.post("caption", 202, captioner="slow", mode="replace", batch_size=1)
    editor.post("caption", 400, captioner="slow")  # one at a time
    assert "captioner is at work" in editor.post("edit", 400, kind="add", value="x", filter={})["message"]
    editor.post("cancel")
    state = editor.wait()
    assert state["task"]["status"] == "cancelled" and 0 < state["task"]["result"]["written"] < 3
    host.captioners = lambda: {"broken": HostCaptioner("Broken", lambda settings: 1 / 0)}
    editor.post("caption", 202, captioner="broken", mode="replace")
    assert "ZeroDivisionError" in editor.wait()["task"]["error"]["message"]


def test_the_preview_shows_what_the_tokenizer_reads(client):
    wish = {"caption": r"a **red star**, (x:1.2)", "trigger_word": "sks"}
    answer = client.post("/captions/preview", json=wish).json()
    assert answer["train"].startswith("sks, ") and "**" not in answer["train"] and answer["core"] == ["red star"]
    assert answer["count"] >= 5 and answer["chunks"] == 1
    if answer["tokens"] is not None:
        assert "".join(answer["tokens"]).replace(" ", "") == answer["train"].replace(" ", "")


def test_export(editor, root):
    answer = editor.post("export", format="csv")
    assert answer["files"] == 1 and "counts before" in answer["note"]
    assert (root / "metadata.csv").read_text().startswith('filename,prompt\na.png,"sks, **red hat**, sky"\n')
    assert editor.post("export", format="caption")["files"] == 3 and (root / "a.caption").exists()
    assert editor.post("export", format="jsonl")["note"]
    assert texts(root) == CAPTIONS
    editor.post("export", 400, format="xls")


def test_two_thousand_pictures_stay_fluid(client, tmp_path):
    folder = tmp_path / "trainer" / "datasets" / "many"
    folder.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "0000.png")
    data = (folder / "0000.png").read_bytes()
    rows = ["filename,prompt"]
    for index in range(2000):
        (folder / f"{index:04}.png").write_bytes(data)
        tags = ", ".join(f"tag {(index * step) % 97}" for step in range(1, 21))
        rows.append(f'{index:04}.png,"sks {index}, **red hat**, {tags}"')
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    editor = Editor(client, client.post("/editor", json={"folder": "many"}).json()["id"])
    assert len(editor.files(tags=["tag 5"])) > 100  # the first one reads every caption

    searched = {"tags": ["red hat"], "text": "sks"}
    assert calls(lambda: editor.post("pictures?offset=1000&limit=50", **searched)) < 2000 * 40
    assert calls(lambda: editor.post("pictures?offset=1950&limit=50")) < 2000 * 40
    changed = editor.post("edit", kind="replace", tags=["red hat"], value="cap", filter={})
    assert changed["changed"] == 2000 and len(changed["rows"]) == 200
    assert len(editor.files(tags=["cap"])) == 2000
