"""Whatever is sent, the answer is a sentence, comes soon, and later requests are served."""

from __future__ import annotations

import dataclasses
import http.client
import itertools
import json
import math
import os
import socket
import time

import pytest
from fastapi import FastAPI

from lora_trainer import requirements
from lora_trainer.api import PREFIX, add_routes
from lora_trainer.config import TrainConfig
from lora_trainer.errors import shown
from lora_trainer.host.base import AccessPolicy
from lora_trainer.jobs.worker import JobManager
from lora_trainer.patterns import SECONDS
from tests.api.conftest import Client, basic
from tests.api.test_api_access import cookie, every_route
from tests.jobs.fakes import FakeHost, FakeTrain, make_pictures, wait_for
from tests.ui.browser import served

HALVES = ["x\ud800", "\udfffx", "\ud83d", "\ude00\ud83d"]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def imported():
    """What the first request would import is not in the times below."""
    assert requirements.problem() is None
    import lora_trainer.dataset.editing
    import lora_trainer.planning.estimate
    import lora_trainer.run  # noqa: F401


@pytest.fixture(scope="module")
def shared_app(tmp_path_factory):
    """One app for the tests that leave nothing behind: making its routes takes A1111's release of FastAPI seconds."""
    host = FakeHost(tmp_path_factory.mktemp("shared"))
    manager = JobManager(host, train=FakeTrain(free=True))
    app = FastAPI()
    add_routes(app, manager, host)
    yield app
    manager.close()


@pytest.fixture(scope="module")
def shared_client(shared_app):
    return Client(shared_app)


def open_editor(client, folder):
    answer = client.post("/editor", json={"folder": str(folder)})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


# -- text that cannot be encoded


@pytest.mark.parametrize("encoding", ["escaped", "bytes", "utf-16"])
def test_halves_of_characters_are_refused_in_every_route(shared_app, shared_client, encoding):
    """At whatever place of the JSON, in names and in values; the answer is the same sentence."""
    bodies = [
        body
        for half in HALVES
        for body in (half, {half: 1}, {"settings": {"more": [{"deep": half}]}}, {"captions": {"a.png": half}})
    ]
    routes = [(method, path) for method, path in every_route(shared_app) if method != "GET"]
    # every body with one route, and every route with one body
    for number, body in enumerate(itertools.chain(bodies, itertools.islice(itertools.cycle(bodies), len(routes)))):
        method, path = routes[max(0, number - len(bodies))]
        text = json.dumps(body, ensure_ascii=encoding == "escaped")
        raw = text.encode("utf-16" if encoding == "utf-16" else "utf-8", "surrogatepass")
        answer = shared_client.request(method, path, content=raw, headers=JSON)
        assert answer.status_code == 400, (method, path, answer.text)
        assert answer.json()["message"] == "The text holds halves of characters.", (method, path)


def test_characters_of_two_halves_are_text(client):
    for text in ("x\U0001f600", "猫\U00020000", "\\ud800", "é"):
        answer = client.post("/captions/preview", json={"caption": text})
        assert answer.status_code == 200 and answer.json()["train"], text


def test_a_half_in_an_edit_harms_no_later_request(client, tmp_path):
    session = open_editor(client, make_pictures(tmp_path / "photos"))
    for path, body in (
        ("edit", {"kind": "set", "value": "x\ud800", "filter": {}}),
        ("edit", {"kind": "add", "value": "x\ud800", "filter": {}}),
        ("edit", {"kind": "regex", "pattern": "red", "value": "\\ud800", "filter": {}}),
        ("edit", {"kind": "regex", "pattern": "\ud800|red", "value": "x", "filter": {}}),
        ("captions", {"captions": {"0000.png": "x\ud800"}}),
        ("pictures", {"text": "x\ud800"}),
    ):
        answer = client.post(f"/editor/{session}/{path}", content=json.dumps(body), headers=JSON)
        assert answer.status_code == 400 and answer.json()["message"], (path, body)
    for path in ("", "/tags"):
        assert client.get(f"/editor/{session}{path}").status_code == 200
    page = client.post(f"/editor/{session}/pictures", json={}).json()
    assert {row["caption"] for row in page["rows"]} == {"**red hat**, a cat"} and page["state"]["undo"] is None


def test_settings_as_text_may_hide_a_half_in_an_escape(client, settings):
    for line in ('trigger_word: "x\\ud800"', 'optimizer_args: {a: "\\ud800"}', 'preview_prompts: ["\\udfff"]'):
        for route in ("/settings/check", "/jobs", "/estimate"):
            text = f"train_data_dir: {settings['train_data_dir']}\n{line}"
            answer = client.post(route, json={"yaml": text})
            assert answer.status_code == 400, (route, line, answer.text)
            assert "Unicode" in answer.json()["message"] and answer.json()["field"] == line.partition(":")[0]


# -- what takes long, or much memory

SLOW = "(.*), (.*), (.*), (.*), (.*), (.*), (.*), (.*) photo"


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "regex", "pattern": SLOW, "value": "x"},
        {"kind": "regex", "pattern": "(a|aa)+[!?]", "value": "x"},
        {"kind": "regex", "pattern": "(?R)", "value": "x"},
        {"kind": "regex", "pattern": "x*", "value": "y" * 15_000},
        {"kind": "regex", "pattern": ".", "value": r"\g<0>" * 3000},
        {"kind": "add", "value": "word, " * 200_000},
        {"kind": "set", "value": "w" * 3_000_000},
        {"kind": "replace", "tags": ["tag"], "value": "(" * 1_000_000},
        {"kind": "remove", "tags": ["t"] * 400_000},
        {"kind": "mark", "tags": ["[a:" + "1" * 900_000], "value": "core"},
    ],
    ids=lambda change: f"{change['kind']} {change.get('pattern', '')[:12]}",
)
def test_an_edit_ends_soon(shared_client, tmp_path, change):
    caption = ", ".join(f"tag number {index}" for index in range(50)) + "a" * 80
    session = open_editor(shared_client, make_pictures(tmp_path / "photos", 30, caption))
    begun = time.monotonic()
    answer = shared_client.post(f"/editor/{session}/edit", json={**change, "filter": {}})
    assert time.monotonic() - begun < 2 * SECONDS + 4
    assert answer.status_code in (200, 400) and len(answer.content) < 1 << 20, answer.text[:300]
    rows = shared_client.post(f"/editor/{session}/pictures", json={}).json()["rows"]
    assert all(len(row["caption"]) <= 20_000 for row in rows)


TEXTS = {
    "digits": "[a:" + "1" * 19_900,
    "brackets": "([{" * 6600,
    "stars": "*a" * 9900,
    "choices": "{" + "|" * 19_900,
    "separators": "," * 19_900,
    "blanks": "[a:1" + " " * 19_900,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_pasted_caption_is_read_soon(shared_client, tmp_path, name):
    text = TEXTS[name]
    session = open_editor(shared_client, make_pictures(tmp_path / "photos"))
    begun = time.monotonic()
    assert shared_client.post("/captions/preview", json={"caption": text}).status_code == 200
    assert shared_client.post(f"/editor/{session}/captions", json={"captions": {"0000.png": text}}).status_code == 200
    assert shared_client.get(f"/editor/{session}/tags").status_code == 200
    assert shared_client.post(f"/editor/{session}/pictures", json={"tags": ["a"], "text": "a"}).status_code == 200
    assert time.monotonic() - begun < 10


def test_a_caption_that_is_no_caption_is_refused(client, tmp_path):
    session = open_editor(client, make_pictures(tmp_path / "photos"))
    for text in ("x" * 20_001, "x" * 3_000_000, "a\0b"):
        answer = client.post(f"/editor/{session}/captions", json={"captions": {"0000.png": text}})
        assert answer.status_code == 400 and answer.json()["remedy"]
    assert client.get(f"/editor/{session}").json()["unsaved"] == 0


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi")
)
LONG = {
    "aliases": BOMB,
    "aliases in quotes": f"optimizer_args: '{{{', '.join(BOMB.splitlines())}}}'",
    "aliases in a list in quotes": f"target_modules: '[{', '.join(f'{{{line}}}' for line in BOMB.splitlines())}]'",
    "nested": "optimizer_args: " + "[" * 50_000,
    "nested json": '{"optimizer_args": ' + "[" * 50_000,
    "nested toml": "optimizer_args = " + "[" * 50_000,
    "nested in quotes": "optimizer_args: '" + "[" * 50_000 + "'",
    "digits": "epochs: " + "9" * 100_000,
    "digits json": '{"epochs": ' + "9" * 100_000 + "}",
    "digits toml": "epochs = " + "9" * 100_000,
    "hexadecimal": "epochs: 0x" + "f" * 100_000,
    "size": "resolution: " + "9" * 100_000,
    "no number": "learning_rate: " + "1" * 150_000 + "x",
    "many lines": "\n".join(f"name{index}: {index}" for index in range(100_000)),
    "one line": "trigger_word: " + "x" * 3_000_000,
    "many patterns": "target_modules: [" + ", ".join(f"'/(_|__|.)+{index}!/'" for index in range(3000)) + "]",
    "quotes": 'base_model: "' + "\\\\x" * 60_000,
}


@pytest.mark.parametrize("name", LONG)
def test_pasted_settings_are_read_soon(client, settings, name):
    for route in ("/settings/check", "/estimate", "/jobs"):
        begun = time.monotonic()
        answer = client.post(route, json={"yaml": LONG[name]})
        assert time.monotonic() - begun < 10, route
        assert answer.status_code in (200, 400), (route, answer.text[:300])
        assert answer.json().get("message", "x") and len(answer.content) < 2 << 20


WILD = [1e308, -1e308, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400), -1, 0, "1e400", "9" * 5000, "-" + "9" * 5000,
        "0x" + "f" * 5000, True, [], {}, [[[]]], {"a": {"b": []}}, [10**400], "", "\u0000", "x" * 100_000, "٣",
        "½"]  # fmt: skip
FIELDS: dict[str, list[str]] = {}
for _field in dataclasses.fields(TrainConfig):
    FIELDS.setdefault("choice" if "Literal" in str(_field.type) else str(_field.type), []).append(_field.name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FIELDS))
def test_wild_values_of_every_setting_are_answered(shared_client, settings, kind):
    """Every value with every kind of setting, and every setting with some of the values."""
    each = max(3, math.ceil(len(WILD) / len(FIELDS[kind])))
    values = itertools.cycle(WILD)
    for name, value in ((name, next(values)) for name in FIELDS[kind] for _ in range(each)):
        content = json.dumps({"settings": {**settings, name: value}})
        for route in ("/settings/check", "/estimate"):
            begun = time.monotonic()
            answer = shared_client.post(route, content=content, headers=JSON)
            assert answer.status_code in (200, 400, 422), (route, name, shown(value, 40), answer.text[:300])
            assert time.monotonic() - begun < 10, (route, name, shown(value, 40))


def test_what_is_no_number_for_json_is_refused(client, settings):
    for word in ("NaN", "Infinity", "-Infinity", "1e999"):
        for name in ("learning_rate", "epochs", "lora_rank", "alpha"):
            body = json.dumps({"settings": settings})[:-2] + f', "{name}": {word}}}}}'
            answer = client.post("/settings/check", content=body, headers=JSON)
            assert answer.status_code in (400, 422) and answer.json()["message"], (name, word)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "large"])
def test_a_mapping_that_never_ends_is_not_read(client, settings, tmp_path, kind):
    path = tmp_path / "mapping.yaml"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("a: b\n" * 400_000)
    begun = time.monotonic()
    answer = client.post("/estimate", json={"settings": {**settings, "caption_mapping": str(path)}})
    assert answer.status_code == 400 and answer.json()["field"] == "caption_mapping"
    assert time.monotonic() - begun < 5


def test_templates_are_no_way_to_fill_the_memory(client, tmp_path):
    session = open_editor(client, make_pictures(tmp_path / "photos"))
    for wish in ({"template": "{caption}" * 400_000}, {"trigger_word": "x" * 3_000_000},
                 {"replacements": {str(index): "x" * 100 for index in range(20_000)}},
                 {"blacklist": ["*a" * 20] * 100_000}):  # fmt: skip
        answer = client.post(f"/editor/{session}/caption", json=wish)
        assert answer.status_code in (400, 413) and answer.json()["remedy"], wish.keys()


# -- folders of the system


@pytest.mark.parametrize("folder", ["/", "/etc", "/etc/ssl", "/proc/self", "/sys", "/dev", "/usr", "/usr/lib",
                                    "/var/log", "/home", "~/.ssh", "/etc/../etc", "/boot", "~/.config/x", "~/.docker",
                                    "~/.mozilla", "~/.kube", "~/.local/share/keyrings"])  # fmt: skip
def test_folders_of_the_system_are_refused_when_they_are_posted(client, settings, folder, tmp_path):
    for name in ("train_data_dir", "reg_data_dir", "mask_dir"):
        for route in ("/jobs", "/estimate"):
            begun = time.monotonic()
            answer = client.post(route, json={"settings": {**settings, name: folder}})
            assert answer.status_code == 400 and answer.json()["field"] == name, (route, name, answer.text)
            assert time.monotonic() - begun < 5
    assert client.post("/jobs", json={"settings": {**settings, "more_folders": [f"2_x={folder}"]}}).status_code == 400
    assert client.post("/editor", json={"folder": folder}).status_code == 400
    (tmp_path / "way").symlink_to(os.path.expanduser(folder))
    linked = {**settings, "train_data_dir": str(tmp_path / "way")}
    assert client.post("/jobs", json={"settings": linked}).status_code == 400
    assert client.get("/jobs").json()["jobs"] == []


# -- who asks

FOREIGN = ["evil.example", "evil.example:7860", "localhost.evil.example:7860", "127.0.0.1.evil.example",
           "1.2.3.4.nip.io", "evil", "", "localhost@evil.example", "[::1", "127.0.0.1:7860.evil.example"]  # fmt: skip
OWN = ["localhost", "localhost:7860", "LOCALHOST:7860", "webui.localhost:7860", "127.0.0.1:7860", "192.168.1.4:7860",
       "[::1]:7860", "localhost."]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_that_somebody_gave_our_address_is_refused(app, client, name):
    for method, path in every_route(app):
        headers = {"Host": name, "Origin": f"http://{name}", "Sec-Fetch-Site": "same-origin"}
        answer = client.request(method, path, headers=headers, **({} if method == "GET" else {"json": {}}))
        assert answer.status_code == 403 and answer.json()["remedy"], (method, path)


@pytest.mark.parametrize("name", OWN)
def test_own_names_and_addresses_are_served(client, name):
    assert client.get("/status", headers={"Host": name}).status_code == 200


def test_a_proxys_name_is_served_where_it_is_known(client, host):
    headers = {"Host": "paint.example"}
    assert client.get("/status", headers=headers).status_code == 403
    host.policy = AccessPolicy(names=("paint.example",))
    assert client.get("/status", headers=headers).status_code == 200
    assert client.get("/status", headers={"Host": "evil.example"}).status_code == 403


def test_any_name_is_served_to_others_and_with_a_login(app, client, host):
    headers = {"Host": "paint.example"}
    host.policy = AccessPolicy(roots=())
    assert client.get("/status", headers=headers).status_code == 200
    host.policy = AccessPolicy({"me": "secret"})
    assert client.get("/status", headers={**headers, **basic("me", "secret")}).status_code == 200
    host.policy = AccessPolicy()
    app.auth, app.tokens = {"me": "x"}, {"good": "me"}
    assert client.get("/status", headers={**headers, **cookie({"access-token": "good"})}).status_code == 200
    assert client.get("/status", headers=headers).status_code == 401


# -- a real server: what is refused is answered, also while it is still being sent


@pytest.fixture
def address(app):
    with served(app) as address:
        yield address.removeprefix("http://").rstrip("/")


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 413), ({"Transfer-Encoding": "chunked"}, 413), ({"Host": "evil.example"}, 403),
     ({"Origin": "http://evil.example"}, 403), ({"Content-Type": "text/plain"}, 415)],
)  # fmt: skip
def test_a_large_body_gets_a_sentence_and_no_reset(address, headers, status):
    for _ in range(3):
        connection = http.client.HTTPConnection(address, timeout=30)
        connection.putrequest("POST", f"{PREFIX}/jobs", skip_host="Host" in headers)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            connection.putheader(name, value)
        block, chunked = b" " * (1 << 20), "Transfer-Encoding" in headers
        if not chunked:
            connection.putheader("Content-Length", str(24 << 20))
        connection.endheaders()
        for _ in range(24):
            connection.send(b"%x\r\n%s\r\n" % (len(block), block) if chunked else block)
        if chunked:
            connection.send(b"0\r\n\r\n")
        answer = connection.getresponse()
        assert answer.status == status
        assert json.loads(answer.read())["message"]
        connection.close()


def test_who_asks_before_sending_is_told_at_once(address):
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"POST {PREFIX}/jobs HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
                           f"Content-Length: {64 << 20}\r\nExpect: 100-continue\r\n\r\n".encode())  # fmt: skip
        assert b" 413 " in connection.recv(200).split(b"\r\n", 1)[0]


def test_a_large_folder_is_looked_at_only_as_long_as_somebody_waits(address, tmp_path, monkeypatch):
    looked = []

    def slowly(path):
        looked.append(path)
        time.sleep(0.2)
        return (64, 64), path.name

    large, small = make_pictures(tmp_path / "large", 400), make_pictures(tmp_path / "small", 2)
    monkeypatch.setattr("lora_trainer.planning.measured.measure", slowly)

    def ask(folder):
        body = json.dumps({"settings": {"train_data_dir": str(folder), "output_name": "x"}})
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("POST", f"{PREFIX}/estimate", body, JSON)
        return connection

    first = ask(large)
    wait_for(lambda: looked)
    first.close()
    begun = time.monotonic()
    answer = ask(small).getresponse()
    assert answer.status == 200 and json.loads(answer.read())["pictures"] == 2
    assert time.monotonic() - begun < 8 and len(looked) < 200
