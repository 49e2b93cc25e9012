from __future__ import annotations

import asyncio
import base64
import io
import json
from urllib.parse import quote

import pytest
from PIL import Image

from lora_trainer.api import PREFIX
from lora_trainer.host.base import AccessPolicy
from tests.config.foreign_presets import kohya_gui
from tests.counting import calls
from tests.jobs.fakes import make_pictures, wait_for, weights_at
from tests.workspace.evil import EVIL_PATHS


@pytest.fixture
def trained(manager, client, settings):
    """The id of a finished job."""
    manager.start_worker()
    job_id = client.post("/jobs", json={"settings": settings}).json()["id"]
    wait_for(lambda: client.get(f"/jobs/{job_id}").json()["status"] == "finished")
    return job_id


def picture(color=(9, 9, 9), size=(64, 64)):
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def test_from_pictures_to_a_published_lora(client, manager, host):
    assert client.post("/datasets", json={"name": "cats"}).status_code == 201
    uploads = [{"name": f"{i}.png", "data": picture((i, 0, 0)), "caption": "a cat"} for i in range(3)]
    uploads += [{"name": "bad.png", "data": "AAAA"}, {"name": "worse.png", "data": "!"}]
    uploads += [{"name": "../e.png", "data": picture()}]
    uploads += [{"name": "url.png", "data": "data:image/png;base64," + picture((0, 0, 1))}]
    answer = client.post("/datasets/cats/pictures", json={"pictures": uploads}).json()
    assert answer["added"] == ["0.png", "1.png", "2.png", "url.png"]
    assert [one["field"] for one in answer["refused"]] == ["bad.png", "worse.png", "../e.png"]
    client.post("/datasets/cats/captions", json={"captions": {"url.png": "a dog"}})
    rows = client.get("/datasets/cats").json()["pictures"]
    assert {row["file"]: row["caption"] for row in rows}["url.png"] == "a dog"
    thumbnail = client.get("/datasets/cats/thumbnails/0.png")
    assert thumbnail.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(thumbnail.content)).size == (64, 64)
    assert client.get("/datasets/cats/pictures/0.png").headers["content-type"] == "image/png"
    facts = client.post("/estimate", json={"settings": {"train_data_dir": "cats", "epochs": 2}}).json()
    assert (facts["pictures"], facts["steps"]) == (4, 8)
    manager.start_worker()
    job = client.post("/jobs", json={"yaml": "train_data_dir: cats\noutput_name: kitty\n"}).json()
    assert job["dataset"] == "cats"
    done = wait_for(lambda: (one := client.get(f"/jobs/{job['id']}").json())["status"] == "finished" and one)
    assert done["published"] == "kitty" and (host.root / "Lora" / "kitty.safetensors").exists()
    assert client.get(f"/jobs/{job['id']}/files/{done['lora']}").content == weights_at(4)


def test_commands_reach_the_job(client, manager, train, settings):
    train.free = False
    manager.start_worker()
    job_id = client.post("/jobs", json={"settings": settings}).json()["id"]
    train.allow(1)
    wait_for(lambda: client.get(f"/jobs/{job_id}").json()["step"] == 1)
    assert client.post(f"/jobs/{job_id}/pause", json={}).json()["status"] == "paused"
    assert client.get("/status").json()["running"]["status"] == "paused"
    assert client.post(f"/jobs/{job_id}/resume", json={}).json()["status"] == "running"
    for command in ("save-now", "preview-now"):
        assert client.post(f"/jobs/{job_id}/{command}", json={}).status_code == 200
    assert client.post(f"/jobs/{job_id}/stop-and-save", json={}).json()["status"] in ("stopping", "stopped")
    wait_for(lambda: client.get(f"/jobs/{job_id}").json()["status"] == "stopped")
    assert client.post(f"/jobs/{job_id}/start", json={}).json()["status"] in ("queued", "running")
    assert client.post(f"/jobs/{job_id}/stop", json={}).status_code == 200
    refused = client.request("DELETE", f"/jobs/{job_id}", json={})
    assert refused.status_code == 400 and "confirm" in refused.json()["remedy"]
    wait_for(lambda: client.get(f"/jobs/{job_id}").json()["status"] == "stopped")
    assert client.request("DELETE", f"/jobs/{job_id}", json={"confirm": True}).status_code == 200
    assert client.get(f"/jobs/{job_id}").status_code == 404


def test_commands_without_a_body_are_understood(client, settings):
    job_id = client.post("/jobs", json={"settings": settings}).json()["id"]
    answer = client.post(f"/jobs/{job_id}/pause", headers={"Content-Type": "application/json"})
    assert answer.status_code == 200 and answer.json()["status"] == "paused"


def test_the_queue_is_reordered_duplicated_and_listed(client, settings):
    ids = [client.post("/jobs", json={"settings": {**settings, "output_name": name}}).json()["id"] for name in "abc"]
    answer = client.post("/jobs/reorder", json={"jobs": [ids[2]]}).json()
    assert [job["id"] for job in answer["jobs"]] == [ids[2], ids[0], ids[1]]
    copy = client.post(f"/jobs/{ids[0]}/duplicate", json={"changes": {"epochs": 3}, "held": True}).json()
    assert copy["name"] == "a_2" and copy["status"] == "paused" and "epochs: 3" in copy["effective_config"]
    assert client.get("/jobs?status=queued").json()["counts"] == {"queued": 3, "paused": 1}
    assert len(client.get("/jobs?limit=2").json()["jobs"]) == 2
    assert client.get("/jobs?status=nonsense").json()["field"] == "status"


def test_polling_tells_what_changed_and_then_nothing(client, trained):
    first = client.get("/status").json()
    assert [job["id"] for job in first["changed"]] == [trained] and len(first["points"]) == 4
    again = client.get("/status", params={"since": first["cursor"]}).json()
    assert again["unchanged"] and again["points"] == [] and again["cursor"] == first["cursor"]
    for nonsense in ("x", "1-2-3", "0-0-0-0-0-" + "9" * 18, "a-1-1-1-1-1;DROP TABLE jobs"):
        assert client.get("/status", params={"since": nonsense}).json()["changed"]


def test_what_a_job_leaves_behind_can_be_read(client, trained):
    events = client.get(f"/jobs/{trained}/events").json()["events"]
    assert [event["kind"] for event in events][:2] == ["status", "phase"]
    assert client.get(f"/jobs/{trained}/events", params={"since": events[-1]["id"]}).json()["events"] == []
    metrics = client.get(f"/jobs/{trained}/metrics").json()
    assert [point["step"] for point in metrics["points"]] == [1, 2, 3, 4]
    assert client.get(f"/jobs/{trained}/metrics", params={"since": metrics["offset"]}).json()["points"] == []
    log = client.get(f"/jobs/{trained}/log").json()
    assert "tiny-model" in log["text"] and not log["truncated"]
    assert client.get(f"/jobs/{trained}/log", params={"tail": 5}).json()["truncated"]
    paths = [file["path"] for file in client.get(f"/jobs/{trained}/files").json()["files"]]
    assert {"config.yaml", "job.log", "output/cat.safetensors", "output/logs/metrics.jsonl"} <= set(paths)
    for path in paths:
        answer = client.get(f"/jobs/{trained}/files/{path}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert "attachment" in answer.headers["content-disposition"]


def test_errors_name_the_field_and_the_remedy(client, settings):
    answer = client.post("/jobs", json={"settings": {**settings, "epochs": 0, "nonsense": 1}})
    assert answer.status_code == 400
    assert {one["field"] for one in answer.json()["problems"]} == {"epochs", "nonsense"}
    assert all(one["remedy"] for one in answer.json()["problems"])
    answer = client.post("/jobs", json={"settings": {"train_data_dir": ""}})
    assert answer.json()["field"] == "train_data_dir" and answer.json()["remedy"]
    for body in ({}, {"settings": {}, "yaml": ""}, {"yaml": "- a list"}, {"yaml": "a: [b"}):
        assert client.post("/jobs", json=body).status_code == 400
    assert client.post("/jobs", json={"settings": "x"}).status_code == 422
    assert client.post("/estimate", json={"settings": {**settings, "base_model": "missing"}}).status_code == 400


@pytest.mark.parametrize("job_id", ["0", "-1", "99", "9" * 30, "x", "1.5", "%00", "1;DROP"])
def test_job_numbers_that_are_none(client, job_id):
    for path in ("", "/events", "/metrics", "/log", "/files", "/files/x"):
        assert client.get(f"/jobs/{job_id}{path}").status_code in (404, 422)
    assert client.post(f"/jobs/{job_id}/pause", json={}).status_code in (404, 422)


def test_no_path_leads_out_of_a_job_or_a_dataset(client, trained, manager, host):
    client.post("/datasets", json={"name": "cats"})
    secret = host.root / "secret.png"
    Image.new("RGB", (32, 32)).save(secret)
    folder = manager.folders.of(manager.store.get(trained))
    (folder / "link.png").symlink_to(secret)
    (folder / "way").symlink_to(host.root)
    (manager.folders.datasets / "cats" / "link.png").symlink_to(secret)
    (manager.folders.datasets / "way").symlink_to(host.root)
    depth = "../" * 12
    evil = [*EVIL_PATHS, "link.png", "way/secret.png", f"{depth}{secret}", str(secret), "%2e%2e/secret.png"]
    evil += [".lora-trainer-job", "way", "way/Lora"]
    bases = (f"/jobs/{trained}/files/", "/datasets/cats/pictures/", "/datasets/cats/thumbnails/", "/datasets/")
    for path in (path for path in evil if "\ud800" not in path):
        for base in bases:
            for encoded in {quote(path, safe=""), quote(path, safe="/")}:
                url = f"http://localhost:7860/lora-trainer/v1{base}{encoded}"
                answer = client.get(url, follow_redirects=False)
                # A client may normalize a path to one of our own routes, which answer with JSON about our own things.
                own = answer.status_code == 200 and "application/json" in answer.headers["content-type"]
                assert answer.status_code in (307, 400, 401, 404, 405, 422) or own, url
                assert not answer.content.startswith((b"\x89PNG", b"\xff\xd8")) and b"root:" not in answer.content
    assert client.get("/datasets/way").status_code == 400


@pytest.mark.parametrize("field", ["train_data_dir", "metadata_path", "reg_data_dir", "init_lora", "vae", "base_model",
                                   "resume", "merge_into_base"])  # fmt: skip
def test_settings_name_no_path_outside_the_roots(client, host, settings, tmp_path, field):
    inside = make_pictures(tmp_path / "allowed" / "photos")
    (tmp_path / "allowed" / "link").symlink_to("/etc")
    host.policy = AccessPolicy(roots=(tmp_path / "allowed",))
    given = {"train_data_dir": str(inside), "output_name": "x"}
    linked = str(tmp_path / "allowed" / "link" / "passwd")
    beside = str(tmp_path / "allowed-not")
    for evil in ("/etc", "/etc/passwd", linked, f"{inside}/../../photos", "../..", "~/x", beside):
        for route in ("/jobs", "/estimate"):
            answer = client.post(route, json={"settings": {**given, field: evil}})
            assert answer.status_code == 400 and answer.json()["field"] == field, (route, evil, answer.text)
    assert client.post("/jobs", json={"settings": given}).status_code == 201


def test_output_folders_are_the_servers_choice(client, manager, settings, tmp_path):
    given = {**settings, "output_dir": str(tmp_path / "elsewhere"), "cache_dir": "/etc"}
    job = client.post("/jobs", json={"settings": given}).json()
    config = manager.effective_config(manager.store.get(job["id"]))
    assert config.output_dir.startswith(str(manager.folders.jobs)) and config.cache_dir == str(manager.folders.cache)
    assert not (tmp_path / "elsewhere").exists()


def test_hidden_paths_are_neither_taken_nor_told(client, host, manager, train, settings):
    host.policy = AccessPolicy(hide_paths=True)
    assert client.post("/jobs", json={"settings": settings}).json()["field"] == "train_data_dir"
    make_pictures(manager.folders.datasets / "cats")
    (manager.folders.datasets / "cats" / "bad.png").write_bytes(b"x")
    (manager.folders.datasets / "cats" / "bad.txt").write_text("x")
    train.error = RuntimeError(f"cannot read {manager.folders.data}/x")
    manager.start_worker()
    job = client.post("/jobs", json={"settings": {"train_data_dir": "cats"}}).json()
    wait_for(lambda: client.get(f"/jobs/{job['id']}").json()["status"] == "failed")
    told = [client.get(path).text for path in (
        "/status", "/jobs", f"/jobs/{job['id']}", f"/jobs/{job['id']}/log", f"/jobs/{job['id']}/events", "/datasets",
        "/datasets/cats", "/checkpoints", f"/jobs/{job['id']}/files")]  # fmt: skip
    told.append(client.post("/estimate", json={"settings": {"train_data_dir": "cats"}}).text)
    log = client.get(f"/jobs/{job['id']}/files/job.log")
    assert "<trainer>" in log.text and 'filename="job.log"' in log.headers["content-disposition"]
    told += [log.text, client.get(f"/jobs/{job['id']}/files/config.yaml").text]
    for text in told:
        assert str(host.root) not in text
    assert "<trainer>" in told[2]


def test_the_catalog(client, monkeypatch):
    monkeypatch.setattr("lora_trainer.api.catalog.free_memory", lambda host: 8 * 2**30)
    presets = client.get("/presets", params={"pictures": 12, "family": "sdxl"}).json()["presets"]
    kinds = [one["kind"] for one in presets if one["task"] == "image"]
    assert kinds == ["style", "character", "scene", "object"]
    assert {one["task"] for one in presets} == {"image", "text", "words", "pair", "slider"}
    assert presets[0]["settings"]["batch_size"] == 1
    rows = [{"title": "tiny.safetensors [abc]", "selected": True, "loaded": True}]
    assert client.get("/checkpoints").json() == {"checkpoints": rows, "has_one": False}
    rows = client.get("/settings").json()["settings"]
    assert all(row["explanation"] for row in rows) and {"lora_rank", "base_model"} <= {row["name"] for row in rows}
    checked = client.post("/settings/check", json={"yaml": "rank: 4\nlearning_rate: 2e-4"}).json()
    assert checked["settings"]["lora_rank"] == 4 and "lora_rank: 4" in checked["yaml"]
    assert checked["given"] == ["lora_rank", "learning_rate"]
    assert checked["translation"]["tool"] == "this program (YAML)"


def test_another_trainers_settings_are_understood_where_they_are_pasted(client):
    preset = kohya_gui("base.safetensors", "discs", "out", color_aug=True)
    checked = client.post("/settings/check", json={"yaml": preset}).json()
    assert checked["settings"]["lora_rank"] == 4 and checked["settings"]["learning_rate"] == 2e-4
    told = checked["translation"]
    assert {"theirs": "network_dim", "ours": "lora_rank", "value": "4"} in told["taken"]
    assert [one["theirs"] for one in told["unmet"]] == ["color_aug"] and "xformers" in told["ignored"]
    refused = client.post("/settings/check", json={"yaml": "dataset_config = '/etc/passwd'"})
    assert refused.status_code == 400 and "only what is pasted" in refused.text


def test_the_schema_is_typed_and_can_be_read(client, app):
    schema = app.openapi()
    paths = {path: value for path, value in schema["paths"].items() if path.startswith("/lora-trainer/v1")}
    for path, operations in paths.items():
        for method, operation in operations.items():
            answers = [code for code in operation["responses"] if code.startswith("2")]
            content = operation["responses"][answers[0]].get("content", {})
            is_file = any(part in path for part in ("/files/{", "pictures/{", "thumbnails/{", "converted/{"))
            is_page = "text/html" in content
            assert is_file or is_page or content["application/json"]["schema"], (method, path)
    json.dumps(schema)


def test_a_page_that_is_closed_while_it_sends_is_no_error(app, caplog):
    """Reloading the page in the middle of an upload once left a traceback in the WebUI's console."""
    scope = {"type": "http", "method": "POST", "path": f"{PREFIX}/datasets", "raw_path": b"", "query_string": b"",
             "headers": [(b"host", b"localhost:7860"), (b"content-type", b"application/json")], "scheme": "http",
             "client": ("127.0.0.1", 1), "server": ("localhost", 7860), "root_path": "",
             "http_version": "1.1"}  # fmt: skip

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    asyncio.run(app(scope, receive, send))
    assert not caplog.records


def test_an_error_nobody_foresaw_is_still_a_sentence(client, host):
    host.checkpoints = lambda: 1 / 0
    answer = client.get("/checkpoints")
    assert answer.status_code == 500 and "ZeroDivisionError" in answer.json()["message"] and answer.json()["remedy"]


def test_five_hundred_finished_jobs_list_fast(client, manager):
    for index in range(500):
        manager.store.add(f"job {index}", "epochs: 1\n" * 100, status="finished", folder=f"{index}", step=1)
    assert len(client.get("/jobs").json()["jobs"]) == 500
    assert calls(lambda: client.get("/jobs")) < 500 * 2000, "reading the settings of one would be 30,000"


def test_data_sets_are_renamed_and_deleted(client, manager, settings):
    client.post("/datasets", json={"name": "cats"})
    client.post("/datasets/cats/pictures", json={"pictures": [{"name": "a.png", "data": picture()}]})
    (row,) = client.get("/datasets").json()["datasets"]
    assert row["cover"] == "a.png" and row["own"] and row["size"] > 5 and row["resumable"] == 0
    assert client.post("/datasets/cats/rename", json={"name": "kittens"}).json() == {"name": "kittens"}
    assert client.get("/datasets/cats").status_code == 400 and client.get("/datasets/kittens").status_code == 200
    refused = client.request("DELETE", "/datasets/kittens", json={})
    assert refused.status_code == 400 and "confirm" in refused.json()["remedy"]
    for path in EVIL_PATHS[:200]:
        if path == "~":
            continue  # can be a name, as it can be a folder's
        assert client.post("/datasets/kittens/rename", json={"name": path}).status_code in (400, 422)
        client.request("DELETE", f"/datasets/{quote(path, safe='', errors='surrogatepass')}", json={"confirm": True})
    assert client.request("DELETE", "/datasets/kittens", json={"confirm": True}).status_code == 200
    assert client.get("/datasets").json()["datasets"] == []


@pytest.mark.parametrize("place", ["library", "folder"])
def test_captions_of_links_are_neither_told_nor_written(client, manager, host, tmp_path, place):
    folder = manager.folders.datasets / "cats" if place == "library" else tmp_path / "photos"
    make_pictures(folder, 2)
    secret = host.root / "secret.txt"
    secret.write_text("a secret of mine")
    for name in ("0000.txt", "0001.txt"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
    told = [client.get("/datasets/cats").text] if place == "library" else []
    editor = client.post("/editor", json={"folder": "cats" if place == "library" else str(folder)}).json()
    address = f"/editor/{editor['id']}"
    told.append(client.post(f"{address}/pictures", json={}).text)
    client.post(f"{address}/captions", json={"captions": {"0000.png": "mine"}})
    saved = client.post(f"{address}/save", json={"force": True})
    assert saved.status_code == 400 and "leads out" in saved.json()["message"]
    assert "a secret" not in "".join(told) and secret.read_text() == "a secret of mine"
    if place == "library":
        answer = client.post("/datasets/cats/captions", json={"captions": {"0000.png": "mine"}})
        assert answer.status_code == 400 and secret.read_text() == "a secret of mine"


def test_two_jobs_are_compared(client, manager, settings):
    first = client.post("/jobs", json={"settings": settings, "held": True}).json()["id"]
    make_pictures(manager.folders.datasets / "cats")
    changes = {"lora_rank": 4, "train_data_dir": "cats", "preview_prompts": ["a", "b"], "output_name": "other"}
    second = client.post(f"/jobs/{first}/duplicate", json={"changes": changes, "held": True}).json()["id"]
    rows = client.get(f"/jobs/{first}/differences/{second}").json()["differences"]
    assert rows == [
        {"name": "train_data_dir", "one": settings["train_data_dir"], "other": "cats"},
        {"name": "lora_rank", "one": 16, "other": 4},
        {"name": "preview_prompts", "one": [], "other": ["a", "b"]},
    ]
    assert client.get(f"/jobs/{first}/differences/{first}").json() == {"differences": []}
    assert client.get(f"/jobs/{first}/differences/99").status_code == 404


def test_a_job_of_an_earlier_release_is_compared_with_defaults(client, manager):
    old = manager.store.add("old", "x: 1", status="finished", effective_config="lora_rank: 8\ngone: 3\n").id
    new = manager.store.add("new", "x: 1", status="finished", effective_config="lora_rank: 16\nflip: true\n").id
    rows = client.get(f"/jobs/{old}/differences/{new}").json()["differences"]
    assert [(row["name"], row["one"], row["other"]) for row in rows] == [
        ("flip", False, True), ("lora_rank", 8, 16), ("gone", 3, None),
    ]  # fmt: skip


def test_compared_settings_hide_what_the_server_hides(client, host, settings):
    first = client.post("/jobs", json={"settings": settings, "held": True}).json()["id"]
    changes = {"vae": str(host.root / "trainer" / "secret.safetensors"), "output_name": "b"}
    second = client.post(f"/jobs/{first}/duplicate", json={"changes": changes, "held": True}).json()["id"]
    host.policy = AccessPolicy(hide_paths=True)
    (row,) = client.get(f"/jobs/{first}/differences/{second}").json()["differences"]
    assert row["other"] == "<trainer>/secret.safetensors"


def test_many_jobs_are_deleted_and_their_loras_stay(client, manager, host, trained, settings):
    published = host.root / "Lora" / "cat.safetensors"
    held = client.post("/jobs", json={"settings": {**settings, "output_name": "dog"}, "held": True}).json()["id"]
    unconfirmed = client.post("/jobs/delete", json={"jobs": [trained, held]}).json()
    assert unconfirmed["deleted"] == [] and "confirm" in unconfirmed["refused"][0]["remedy"]
    manager.store.update(held, status="running", active=True)
    answer = client.post("/jobs/delete", json={"jobs": [trained, held, trained, 99], "confirm": True}).json()
    assert answer["deleted"] == [trained]
    assert [problem["message"] for problem in answer["refused"]] == ["dog is being trained.", "There is no run 99."]
    assert published.exists() and manager.store.ids() == [held]
    manager.store.update(held, status="stopped", active=False)


def test_runs_are_found_and_ordered(client, manager):
    for name in ("b", "a", "c"):
        manager.store.add(name, "x: 1", status="finished", base_model="m")
    answer = client.get("/jobs", params={"order": "name", "search": "m", "limit": 2}).json()
    assert [job["name"] for job in answer["jobs"]] == ["a", "b"] and answer["total"] == 3
    assert client.get("/jobs", params={"search": "c"}).json()["total"] == 1
    assert client.get("/jobs", params={"order": "id; DROP TABLE jobs"}).json()["field"] == "order"


def test_presets_of_ones_own(client, host):
    new = {"name": "mine", "kind": "style", "settings": {"lora_rank": 8, "output_name": "x"}}
    saved = client.post("/presets/own", json=new)
    assert saved.status_code == 201 and saved.json()["settings"] == {"lora_rank": 8}
    again = client.post("/presets/own", json=new)
    assert again.status_code == 400 and again.json()["field"] == "name"
    wrong = client.post("/presets/own", json={**new, "settings": {"lora_rank": "x"}, "overwrite": True})
    assert wrong.json()["field"] == "lora_rank"
    (host.root / "trainer" / "presets" / "odd.yaml").write_text("settings: 3")
    rows = client.get("/presets/own").json()["presets"]
    assert [(row["name"], bool(row["problem"])) for row in rows] == [("mine", False), ("odd", True)]
    assert client.post("/presets/own/mine/rename", json={"name": "yours"}).json() == {"name": "yours"}
    assert client.request("DELETE", "/presets/own/yours", json={}).json()["field"] == "confirm"
    assert client.request("DELETE", "/presets/own/yours", json={"confirm": True}).status_code == 200
    assert [row["name"] for row in client.get("/presets/own").json()["presets"]] == ["odd"]
