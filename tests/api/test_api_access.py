from __future__ import annotations

import json

import pytest
from fastapi import FastAPI

from lora_trainer.api import PREFIX
from lora_trainer.host.base import AccessPolicy
from tests.api.conftest import Client, basic


def every_route(app: FastAPI):
    """(method, path with parameters filled in) of each route of ours."""
    found = []
    for path, operations in app.openapi()["paths"].items():
        if path.startswith(PREFIX):
            plain = path[len(PREFIX) :].replace("{job_id}", "1").replace("{name}", "cats").replace("{file}", "a.png")
            found += [(method.upper(), plain) for method in operations]
    return found


def send(client, method, path, **options):
    if method in ("POST", "DELETE"):
        options.setdefault("json", {})
    return client.request(method, path, **options)


def test_there_are_many_routes_and_all_are_guarded(app):
    assert len(every_route(app)) >= 30


def test_every_route_is_refused_without_the_apis_credentials(app, client, host, manager):
    host.policy = AccessPolicy(api_credentials={"me": "secret", "you": "pässwörd"})
    before = manager.store.revision()
    for method, path in every_route(app):
        for headers in ({}, basic("me", "wrong"), basic("me", ""), basic("you", "secret"), basic("", "secret"),
                        {"Authorization": "Basic"}, {"Authorization": "Basic !!!"}, {"Authorization": "Bearer secret"},
                        {"Authorization": "Basic bWU="}):  # fmt: skip
            answer = send(client, method, path, headers=headers)
            assert answer.status_code == 401, (method, path, headers)
            assert answer.headers["www-authenticate"] == "Basic" and answer.json()["remedy"]
    assert manager.store.revision() == before
    for user in (basic("me", "secret"), basic("you", "pässwörd")):
        for method, path in every_route(app):
            assert send(client, method, path, headers=user).status_code != 401


@pytest.mark.parametrize("version", [3, 4])
def test_every_route_is_refused_without_a_gradio_login(app, client, version):
    app.auth = {"me": "secret"}
    app.tokens = {"good": "me", "old": None}
    suffix = ""
    if version == 4:
        app.cookie_id = "XYZ"
        suffix = "-XYZ"
    for method, path in every_route(app):
        wrong = [{}, {f"access-token{suffix}": "bad"}, {f"access-token{suffix}": "old"}, {"token": "good"}]
        wrong += [{"access-token-OTHER": "good"}, *([{"access-token": "good"}] if version == 4 else [])]
        for cookies in wrong:
            assert send(Client(app), method, path, headers=cookie(cookies)).status_code == 401
        assert send(client, method, path, headers=basic("me", "secret")).status_code == 401
        for name in ("access-token", "access-token-unsecure"):
            answer = send(Client(app), method, path, headers=cookie({name + suffix: "good"}))
            assert answer.status_code != 401, (method, path)


def cookie(cookies):
    return {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())} if cookies else {}


def test_with_both_logins_either_suffices(app, client, host):
    host.policy = AccessPolicy(api_credentials={"api": "secret"})
    app.auth, app.tokens = {"me": "x"}, {"good": "me"}
    assert client.get("/status").status_code == 401
    assert client.get("/status", headers=basic("api", "secret")).status_code == 200
    assert client.get("/status", headers=cookie({"access-token": "good"})).status_code == 200


def test_an_auth_dependency_decides(app, client):
    app.auth_dependency = lambda request: request.headers.get("x-user")
    assert client.get("/status").status_code == 401
    assert client.get("/status", headers={"x-user": "me"}).status_code == 200


def test_credentials_set_later_count_at_once(client, host):
    assert client.get("/status").status_code == 200
    host.policy = AccessPolicy(api_credentials={"me": "secret"})
    assert client.get("/status").status_code == 401


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonx"],
)
def test_nothing_but_json_changes_anything(app, client, manager, content_type):
    before = manager.store.revision()
    for method, path in every_route(app):
        if method != "GET":
            answer = client.request(method, path, content=b"{}", headers={"Content-Type": content_type})
            assert answer.status_code == 415, (method, path)
    assert manager.store.revision() == before


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_is_json_however_it_is_written(client, content_type):
    body = json.dumps({"name": "cats"})
    assert client.post("/datasets", content=body, headers={"Content-Type": content_type}).status_code == 201


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:7861"},
        {"Origin": "http://localhost"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://[broken"},
        {"Origin": "http://localhost:7860.evil.example"},
        {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://localhost:7860", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_pages_change_nothing(app, client, manager, headers):
    before = manager.store.revision()
    for method, path in every_route(app):
        if method != "GET":
            assert send(client, method, path, headers=headers).status_code == 403, (method, path)
    assert manager.store.revision() == before


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://localhost:7860"},
        {"Origin": "HTTPS://LOCALHOST:7860"},
        {"Origin": "https://public.example", "X-Forwarded-Host": "public.example"},
        {"Origin": "https://public.example", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_our_own_pages_and_scripts_are_served(client, headers):
    assert client.post("/datasets", json={"name": "cats"}, headers=headers).status_code == 201


@pytest.mark.parametrize("declared", [True, False])
def test_oversized_bodies_are_refused(app, client, declared):
    block = b" " * (1 << 20)

    def chunks(count):
        for _ in range(count):
            yield block

    headers = {"Content-Type": "application/json"}
    for path, megabytes in (("/jobs", 5), ("/datasets/cats/pictures", 97), ("/estimate", 5)):
        body = block * megabytes if declared else chunks(megabytes)
        answer = client.post(path, content=body, headers=headers)
        assert answer.status_code == 413 and "MB" in answer.json()["message"]
    assert client.post("/jobs", content=b"{}", headers={**headers, "Content-Length": "9" * 30}).status_code == 413


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"name": {}}'])
def test_broken_json_is_a_sentence(client, body):
    answer = client.post("/datasets", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["message"]


def test_halves_of_characters_are_a_sentence(client):
    for body in (b'{"name": "\\ud800"}', b'{"settings": {"output_name": "\\ud800", "train_data_dir": "x"}}',
                 b'{"yaml": "output_name: \\ud800"}'):  # fmt: skip
        for path in ("/datasets", "/jobs", "/estimate", "/settings/check"):
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in (400, 422) and answer.json()["message"]
