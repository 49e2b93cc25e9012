"""The server dies and comes back: no job is lost, and the one in hand goes on exactly."""

from __future__ import annotations

import signal

import pytest

from tests.webui.server import Server
from tests.webui.test_borrowing import same


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("restarts")) as server:
        yield server


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "os._exit by the WebUI"])
def test_a_job_cut_off_is_offered_for_resuming_and_resumes_exactly(webui, settings, how):
    settings |= {"max_train_steps": 14, "save_steps": 4}
    twin = webui.submit(**settings, output_name=f"twin-{how.name}")
    assert webui.wait(twin)["status"] == "finished"
    job = webui.submit(**settings, output_name=f"cut-{how.name}")
    queued = webui.submit(**settings, output_name=f"queued-{how.name}")
    held = webui.post("/lora-trainer/v1/jobs", {"settings": settings | {"output_name": f"held-{how.name}"},
                                                "held": True})["id"]  # fmt: skip
    webui.until(job, lambda job: job["step"] >= 6)
    first_steps = webui.get(f"/lora-trainer/v1/jobs/{job}/metrics")["points"][:4]
    webui.kill(how)
    webui.start()
    assert webui.until(job, lambda job: job["status"] != "running")["status"] == "interrupted"
    assert webui.wait(queued)["status"] == "finished", "the queue goes on by itself"
    assert webui.job(held)["status"] == "paused"
    assert webui.job(job)["status"] == "interrupted", "and what was cut off waits for a person"
    offered = {one["id"]: one["saved_step"] for one in webui.get("/lora-trainer/v1/status")["interrupted"]}
    assert offered[job] >= 4
    webui.post(f"/lora-trainer/v1/jobs/{job}/resume")
    done = webui.wait(job)
    assert (done["status"], done["attempt"]) == ("finished", 2)
    points = webui.get(f"/lora-trainer/v1/jobs/{job}/metrics")["points"]
    assert [point["step"] for point in points] == list(range(1, 15))
    assert points[:4] == first_steps, "with the seconds that each took: they were not taken again"
    assert same(webui.lora(twin), webui.lora(job))
    assert same(webui.lora(twin), webui.lora(queued))
