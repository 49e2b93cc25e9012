"""Routes of rows and language models, without a browser."""

from __future__ import annotations

import base64
import json

import pytest

from tests.language_models import ROWS, tiny_language_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_language_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def settings(host, llama):
    folder = host.root / "LLM"
    folder.mkdir()
    (folder / "llama").symlink_to(llama, target_is_directory=True)
    return {"base_model": "llama", "chat_template": "plain", "task": "text"}


def upload(client, lines, name="rows.jsonl"):
    data = base64.b64encode("\n".join(lines).encode()).decode()
    return client.post("/texts", json={"name": name, "data": data})


def test_language_models_are_listed_by_name(client, settings):
    assert client.get("/language-models").json() == {"names": ["llama"]}


def test_a_file_is_uploaded_shown_and_seen_as_the_model_sees_it(client, settings):
    lines = [json.dumps(row) for row in ROWS]
    lines[1:1] = ["{", json.dumps({"prompt": "<script>alert(1)</script>", "response": "the cat"})]
    name = upload(client, lines).json()["name"]
    assert name == "rows" and upload(client, lines).json()["name"] == "rows_2"
    listed = {one["name"]: one["texts"] for one in client.get("/datasets").json()["datasets"]}
    assert listed == {"rows": 1, "rows_2": 1}

    settings["train_data_dir"] = name
    found = client.post("/texts/rows", json={"settings": settings}).json()
    assert (found["total"], found["wrong"]) == (10, 1)
    wrong = found["rows"][1]
    assert wrong["where"] == "rows.jsonl:2" and wrong["answer"] == ""
    assert wrong["problems"][0]["severity"] == "error" and "no JSON" in wrong["problems"][0]["message"]
    assert found["rows"][2]["prompt"] == "<script>alert(1)</script>"

    seen = client.post("/texts/seen", json={"settings": settings, "row": 0}).json()
    assert "".join(one["text"] for one in seen["segments"] if one["learned"]).startswith(ROWS[0]["response"])
    assert any(ROWS[0]["prompt"] in one["text"] for one in seen["segments"] if not one["learned"])
    assert 0 < seen["learned"] < seen["tokens"]
    for row in (1, 99):
        assert client.post("/texts/seen", json={"settings": settings, "row": row}).status_code == 400
    estimate = client.post("/estimate", json={"settings": settings}).json()
    assert (estimate["task"], estimate["rows"], estimate["steps"]) == ("text", 9, 90)


def test_rows_come_in_pages_of_fifty_and_without_a_model(client, settings):
    lines = [json.dumps({"prompt": f"who {number}", "response": "the cat"}) for number in range(60)]
    given = {"train_data_dir": upload(client, lines).json()["name"]}
    first, rest = (client.post("/texts/rows", json={"settings": given, "row": row}).json() for row in (0, 50))
    assert [len(one["rows"]) for one in (first, rest)] == [50, 10]
    assert rest["rows"][0]["prompt"] == "who 50"


@pytest.mark.parametrize("name, lines", [("rows.txt", ["{}"]), ("rows.jsonl", ["no"]), ("../rows.jsonl", ["{}"])])
def test_what_is_no_file_of_rows_is_refused_and_leaves_nothing(client, settings, name, lines):
    assert upload(client, lines, name).status_code == 400
    assert client.get("/datasets").json()["datasets"] == []


def test_paths_that_may_not_be_named_are_refused(client, host, settings, tmp_path):
    from lora_trainer.host.base import AccessPolicy

    (tmp_path / "secret.jsonl").write_text(json.dumps(ROWS[0]))
    given = {**settings, "train_data_dir": str(tmp_path / "secret.jsonl")}
    assert client.post("/texts/rows", json={"settings": given}).status_code == 200
    host.policy = AccessPolicy(hide_paths=True)
    for path in ("rows", "seen"):
        answer = client.post(f"/texts/{path}", json={"settings": given})
        assert answer.status_code == 400 and answer.json()["problems"][0]["field"] == "train_data_dir"
