"""Who may do what with the real WebUI: nobody without the credentials that it asks for, nothing outside its folders."""

from __future__ import annotations

import http.cookiejar
import json
import os
import random
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from tests.webui.server import Server
from tests.workspace.evil import EVIL_PATHS

PREFIX = "/lora-trainer/v1"
SECRET = "the secret of this computer"
JSON = {"Content_Type": "application/json"}


def routes(webui: Server) -> list[tuple[str, str]]:
    """(method, path with its parameters open) of every route of ours, as the running WebUI knows them."""
    paths = webui.get("/openapi.json")["paths"]
    return [(method.upper(), path) for path, methods in paths.items() if path.startswith(PREFIX) for method in methods]


def filled(path: str, **values: str) -> str:
    for name, value in {"job_id": "1", "name": "cats", "file": "a.png", "session": "0" * 16, **values}.items():
        path = path.replace(f"{{{name}}}", value).replace(f"{{{name}:path}}", value)
    return path


def test_every_route_is_refused_without_the_apis_credentials(tmp_path, settings):
    with Server(tmp_path / "data", "--api-auth", "me:secret,you:other", credentials=("me", "secret")) as webui:
        found = routes(webui)
        assert len(found) > 50
        wrong = [{}, {"Authorization": "Basic bWU6d3Jvbmc="}, {"Authorization": "Bearer secret"},
                 {"Cookie": "access-token=secret"}]  # fmt: skip
        for method, path in found:
            for headers in wrong:
                assert webui.raw(method, filled(path), b"{}", **JSON, **headers)[0] == 401, (method, path, headers)
            assert webui.raw(method, filled(path), b"{}", **JSON, **webui.headers)[0] != 401, (method, path)
        assert webui.wait(webui.submit(**settings, output_name="let-in"))["status"] == "finished"
    print(f"\n{len(found)} routes refused")


def test_every_route_is_refused_without_a_login(tmp_path):
    with Server(tmp_path / "data", "--gradio-auth", "me:secret") as webui:
        found = routes(webui)
        for method, path in found:
            for headers in ({}, {"Cookie": "access-token=guess"}, {"Authorization": "Basic bWU6c2VjcmV0"}):
                assert webui.raw(method, filled(path), b"{}", **JSON, **headers)[0] == 401, (method, path, headers)
        jar = http.cookiejar.CookieJar()
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
        form = urllib.parse.urlencode({"username": "me", "password": "secret"}).encode()
        browser.open(webui.url("/login"), form)
        cookie = "; ".join(f"{one.name}={one.value}" for one in jar)
        for method, path in found:
            assert webui.raw(method, filled(path), b"{}", **JSON, Cookie=cookie)[0] != 401, (method, path)
    print(f"\n{len(found)} routes refused")


@pytest.fixture(scope="module")
def reachable(tmp_path_factory):
    """A WebUI that others can reach, with a secret beside its folders and links that lead to it."""
    folder = tmp_path_factory.mktemp("reachable")
    with Server(folder / "data", "--server-name", "127.0.0.1") as webui:
        (folder / "secret").mkdir()
        (folder / "secret" / "secret.txt").write_text(SECRET)
        webui.folder = folder
        yield webui


def test_traversal_and_links_lead_nowhere(reachable, settings):
    webui = reachable
    own = webui.data / "lora_trainer" / "datasets" / "cats"
    own.mkdir(parents=True)
    for picture in Path(settings["train_data_dir"]).iterdir():
        (own / picture.name).write_bytes(picture.read_bytes())
    job = webui.submit(**settings | {"train_data_dir": "cats", "max_train_steps": 1}, output_name="one")
    assert webui.wait(job)["status"] == "finished"
    (job_folder,) = (webui.data / "lora_trainer" / "jobs").glob(f"{job:05d}-*")
    for root in (own, job_folder):
        (root / "link.txt").symlink_to(webui.folder / "secret" / "secret.txt")
        (root / "link.png").symlink_to(webui.folder / "secret" / "secret.txt")
        (root / "linked").symlink_to(webui.folder / "secret", target_is_directory=True)
    session = webui.post(f"{PREFIX}/editor", {"folder": "cats"})["id"]
    evil = [*EVIL_PATHS, "link.txt", "link.png", "linked/secret.txt", str(webui.folder / "secret" / "secret.txt")]
    # Deep enough to reach the secret, and no deeper, in each spelling of a traversal.
    evil += [
        f"{up * n}secret/secret.txt" for n in range(1, 8) for up in ("../", "..%2f", "%2e%2e/", "..%5c", "..%252f")
    ]
    asked = 0
    for method, path in routes(webui):
        if method == "GET" and "{" in path:
            for name in ("file", "name", "session"):
                if f"{{{name}}}" not in path:
                    continue
                for text in evil:
                    for spelled in {text, urllib.parse.quote(text, safe="", errors="replace")}:
                        if any(character in spelled for character in " \r\n") or len(spelled) > 8000:
                            continue
                        given = {"job_id": str(job), "session": session, name: spelled}
                        status, body = webui.raw(method, filled(path, **given))
                        asked += 1
                        assert SECRET.encode() not in body, (path, text)
                        assert b"root:x:" not in body, (path, text)
                        assert status < 500, (status, path, text, body[:300])
    print(f"\n{asked} requests that lead nowhere")
    assert asked > 1000
    assert webui.get(f"{PREFIX}/status")["counts"] == {"finished": 1}


def test_settings_that_name_paths_outside_are_refused(reachable, tmp_path):
    webui, before = reachable, len(reachable.get(f"{PREFIX}/jobs")["jobs"])
    fields = ("train_data_dir", "metadata_path", "caption_mapping", "reg_data_dir", "init_lora", "vae", "base_model",
              "resume", "merge_into_base")  # fmt: skip
    outside = [str(webui.folder / "secret"), "/etc/passwd", "../../secret", "/", "~/x", "/proc/self/environ"]
    good = {"train_data_dir": "cats", "output_name": "refused"}
    for path in ("jobs", "estimate"):
        for field in fields:
            for text in outside:
                body = json.dumps({"settings": good | {field: text}}).encode()
                status, answer = webui.raw("POST", f"{PREFIX}/{path}", body, **JSON)
                assert 400 <= status < 500, (path, field, text, status, answer[:300])
                assert SECRET.encode() not in answer
    for folder in outside:
        body = json.dumps({"folder": folder}).encode()
        assert 400 <= webui.raw("POST", f"{PREFIX}/editor", body, **JSON)[0] < 500, folder
    assert len(webui.get(f"{PREFIX}/jobs")["jobs"]) == before


def test_oversized_and_foreign_requests_are_refused(reachable):
    webui = reachable
    for path, megabytes in (("/jobs", 5), ("/estimate", 5), ("/datasets/cats/pictures", 97)):
        headers = {**JSON, "Content_Length": str(megabytes << 20)}
        assert webui.raw("POST", PREFIX + path, b"", **headers)[0] == 413, path
    assert webui.raw("POST", f"{PREFIX}/jobs", b" " * (5 << 20), **JSON)[0] in (0, 413)
    assert webui.raw("POST", f"{PREFIX}/jobs", b"{}", Content_Type="text/plain")[0] == 415
    assert webui.raw("POST", f"{PREFIX}/jobs", b"{}", **JSON, Origin="http://evil.example")[0] == 403


def test_nothing_that_is_sent_breaks_it(reachable):
    """Random bodies of the wrong kinds to every route: a sentence each, never an error of the server."""
    webui, chance = reachable, random.Random(int(os.environ.get("LORA_TRAINER_FUZZ_SEED", "1")))
    values = [None, True, 0, -1, 2**63, 1e308, "", "x", "../..", "/etc/passwd", "\u0000", "\u202e", "9" * 400, [], {},
              [[]], ["x"] * 50, {"x": {"y": []}}]  # fmt: skip
    schemas = webui.get("/openapi.json")["components"]["schemas"]
    names = sorted({name for schema in schemas.values() for name in schema.get("properties", {})})
    count = 0
    for method, path in routes(webui):
        for _ in range(25):
            body = {chance.choice(names): chance.choice(values) for _ in range(chance.randint(0, 5))}
            body = chance.choice([body, {"settings": body}, {"yaml": json.dumps(body)}, chance.choice(values)])
            text = json.dumps(body).encode()
            if chance.random() < 0.1:
                text = bytes(chance.randrange(256) for _ in range(chance.randrange(200)))
            given = {name: chance.choice(["1", "0", "-1", "x", "cats", "%00", "9" * 30]) for name in
                     ("job_id", "name", "session", "file")}  # fmt: skip
            status, answer = webui.raw(method, filled(path, **given), b"" if method == "GET" else text, **JSON)
            count += 1
            assert 200 <= status < 500, (method, path, given, body, answer[:500])
    print(f"\n{count} random requests")
    assert webui.get(f"{PREFIX}/status")
