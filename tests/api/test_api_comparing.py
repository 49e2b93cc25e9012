"""Grids that are asked for through the API: drawn by the worker, never while it trains."""

from __future__ import annotations

import threading

import pytest

from tests.jobs.fakes import wait_for, wait_status


@pytest.fixture
def job(client, manager, train, settings):
    train.checkpoints = (2,)
    manager.start_worker()
    submitted = client.post("/jobs", json={"settings": {**settings, "preview_prompts": ["a cat"]}}).json()
    return wait_status(manager, manager.store.get(submitted["id"]), "finished")


def ended(client, job):
    active = ("", "waiting", "running")
    return wait_for(lambda: (one := client.get(f"/jobs/{job.id}/compare").json())["status"] not in active and one)


def test_one_request_draws_every_saved_step_at_the_usual_weights(client, host, job):
    before = client.get(f"/jobs/{job.id}/compare").json()
    assert (before["status"], before["steps"], before["weights"], before["prompts"]) == (
        "", [2, 4], [0.5, 0.8, 1.0], ["a cat"])  # fmt: skip
    answer = client.post(f"/jobs/{job.id}/compare", json={})
    assert answer.status_code == 202 and answer.json()["total"] == 7
    done = ended(client, job)
    assert (done["status"], done["done"]) == ("finished", 7)
    (made,) = done["comparisons"]
    drawn = [(request.lora and request.lora.name, request.lora_weight) for request in host.requests[-7:]]
    names = ["cat-step2.safetensors"] * 3 + ["cat.safetensors"] * 3
    assert drawn == [(None, 1.0), *zip(names, [0.5, 0.8, 1.0] * 2)]
    assert {request.seed for request in host.requests[-7:]} == {made["prompts"][0]["seed"]}
    for file in (made["grid"], made["cells"][-1]["file"]):
        picture = client.get(f"/jobs/{job.id}/files/{made['folder']}/{file}")
        assert picture.headers["content-type"] == "image/png" and picture.content


def test_a_cell_is_published_at_its_weight(client, host, job):
    answer = client.post(f"/jobs/{job.id}/publish", json={"step": 2, "weight": 0.5}).json()
    assert (answer["published_step"], answer["chosen_weight"]) == (2, 0.5)
    assert host.published[-1][1].preferred_weight == 0.5


def test_it_comes_after_the_training_in_hand_and_before_the_next(client, manager, train, host, job, settings):
    train.free = False
    running = client.post("/jobs", json={"settings": {**settings, "output_name": "second"}}).json()
    wait_for(lambda: manager.store.get(running["id"]).active)
    client.post("/jobs", json={"settings": {**settings, "output_name": "third"}})
    drawn = len(host.requests)
    client.post(f"/jobs/{job.id}/compare", json={"weights": [1]})
    now = client.get(f"/jobs/{job.id}/compare").json()
    assert (now["status"], now["waits_for"], len(host.requests)) == ("waiting", "second", drawn)
    again = client.post(f"/jobs/{job.id}/compare", json={})
    assert again.status_code == 400 and "being drawn" in again.json()["message"]
    refused = client.request("DELETE", f"/jobs/{job.id}", json={"confirm": True})
    assert refused.status_code == 400 and "being drawn" in refused.json()["message"]
    train.allow(4)  # of the second; the third has none yet
    assert ended(client, job)["status"] == "finished" and len(host.requests) == drawn + 3
    train.free = True


def test_it_is_stopped_after_the_picture_in_hand_or_before_the_first(client, manager, host, job, monkeypatch):
    drawing, go_on, draw = threading.Event(), threading.Event(), host.draw

    def slow(request):
        drawing.set()
        assert go_on.wait(20)
        return draw(request)

    monkeypatch.setattr(host, "draw", slow)
    client.post(f"/jobs/{job.id}/compare", json={})
    assert drawing.wait(20)
    client.post(f"/jobs/{job.id}/compare/stop", json={})
    go_on.set()
    done = ended(client, job)
    assert (done["status"], done["done"]) == ("cancelled", 1) and not done["comparisons"][0]["complete"]
    assert client.post(f"/jobs/{job.id}/compare/stop", json={}).status_code == 400


@pytest.mark.parametrize(
    ("wish", "field"),
    [({"steps": [3]}, "steps"), ({"steps": "all"}, "steps"), ({"weights": [0]}, "weights"),
     ({"weights": []}, "weights"), ({"prompts": [" "]}, "prompts"), ({"prompts": ["a --zz 1"]}, "prompts")],
)  # fmt: skip
def test_bad_input_is_refused_with_its_field(client, host, job, wish, field):
    answer = client.post(f"/jobs/{job.id}/compare", json=wish)
    assert answer.status_code in (400, 422) and answer.json()["field"] == field and answer.json()["remedy"]
    assert client.get(f"/jobs/{job.id}/compare").json()["status"] == ""


def test_what_goes_wrong_is_said_and_the_queue_goes_on(client, host, job, monkeypatch, manager, settings):
    monkeypatch.setattr(host, "draw", lambda request: 1 / 0)
    client.post(f"/jobs/{job.id}/compare", json={})
    done = ended(client, job)
    assert done["status"] == "failed" and "division by zero" in done["error"]["message"] and not done["comparisons"]
    next_one = client.post("/jobs", json={"settings": {**settings, "output_name": "next"}}).json()
    wait_status(manager, manager.store.get(next_one["id"]), "finished")
