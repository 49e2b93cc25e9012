"""A job in processes beside the server: two of them on the CPU stand for two GPUs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI

from lora_trainer.api import add_routes
from lora_trainer.captioning.base import Description, HostCaptioner, Tag
from lora_trainer.config import from_mapping
from lora_trainer.dataset.caption_files import read_captions
from lora_trainer.errors import UserError
from lora_trainer.host.base import PreviewRequest
from lora_trainer.host.standalone import StandaloneHost
from lora_trainer.jobs import execution, processes
from lora_trainer.jobs.worker import JobManager
from lora_trainer.run.lines import ProgressLines, obey
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.ui.form import advanced
from tests.api.conftest import Client
from tests.pictures import draw_dataset

beside = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

ROOT = Path(__file__).parents[2]
OVER = ("finished", "failed", "stopped", "interrupted")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture
def host(tmp_path):
    return StandaloneHost(tmp_path / "trainer", device="cpu")


@pytest.fixture(scope="module")
def settings(folder, tiny_base):
    return {
        "train_data_dir": str(draw_dataset(folder / "pictures", 4)), "base_model": str(tiny_base), "device": "cpu",
        "gpus": [0, 1], "gradient_accumulation_steps": 2, "max_train_steps": 100_000, "resolution": 64,
        "bucket_step": 32, "lora_rank": 2, "save_precision": "fp32", "tensorboard": False, "learning_rate": 1e-3,
    }  # fmt: skip


def server(folder):
    host = StandaloneHost(folder / "trainer", device="cpu")
    manager = JobManager(host)
    manager.start_worker()
    app = FastAPI()
    add_routes(app, manager, host)
    return host, manager, Client(app)


def wait(what, condition, seconds=600):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


def started_by(pid, seen=None):
    """The processes below this one, by number -> command line."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
        if parent == pid:
            found |= {number: command, **started_by(number)}
    return found


def ranks_below(pid):
    lines = started_by(pid).items()
    return [number for number, line in lines if "--progress json" in line and "distributed" not in line]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@beside
def test_it_is_trained_drawn_beside_stopped_resumed_and_one_that_dies_is_named(folder, settings):
    host, manager, client = server(folder / "one")
    job = client.post("/jobs", json={"settings": {**settings, "output_name": "disc"}}).json()["id"]

    def row():
        return client.get(f"/jobs/{job}").json()

    def ask(command):
        answer = client.post(f"/jobs/{job}/{command}", json={})
        assert answer.status_code == 200, answer.text

    def step():
        one = row()
        assert one["status"] not in OVER, one["error"]
        return one["step"]

    wait("steps", lambda: step() >= 2)
    ranks = ranks_below(os.getpid())
    assert len(ranks) == 2
    picture = host.draw(PreviewRequest("a disc", settings["base_model"], width=64, height=64, steps=2))
    assert picture.size == (64, 64) and step() >= 2
    ask("pause")
    wait("a pause", lambda: row()["status"] == "paused")
    wait("the last step before it", lambda: step() == (time.sleep(1) or step()))
    ask("resume")
    held = step()
    wait("the next step", lambda: step() > held)
    ask("save-now")
    wait("a save", lambda: list(manager.folders.output(manager.store.get(job)).glob("disc-step*.safetensors")))
    ask("stop-and-save")
    stopped = wait("the end", lambda: (one := row())["status"] in OVER and one)
    assert (stopped["status"], stopped["error"]) == ("stopped", None) and stopped["saved_step"] == stopped["step"]
    wait("the processes' end", lambda: not any(map(alive, ranks)))

    ask("resume")
    wait("the next step", lambda: (one := row())["status"] == "running" and one["step"] > stopped["step"])
    os.kill(ranks_below(os.getpid())[1], signal.SIGKILL)
    failed = wait("the end", lambda: (one := row())["status"] in OVER and one)
    assert failed["status"] == "failed" and failed["error"]["remedy"].startswith("Resume it")
    sentence = failed["error"]["message"]
    assert re.match(rf"Rank [01] on {os.uname().nodename} ", sentence) and "\n" not in sentence
    manager.close()


SERVER = """
import json, sys
from pathlib import Path
from tests.jobs.test_processes import server
host, manager, client = server(Path(sys.argv[1]))
answer = client.post("/jobs", json={"settings": json.loads(sys.argv[2])})
print(answer.json()["id"], flush=True)
manager._thread.join()
"""


@pytest.mark.slow
@beside
def test_the_processes_end_with_the_server_with_their_state_saved(folder, settings):
    settings = {**settings, "output_name": "dot"}
    command = [sys.executable, "-c", SERVER, str(folder / "two"), json.dumps(settings)]
    killed = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    try:
        assert killed.stdout is not None
        assert int(killed.stdout.readline()) == 1
        states = folder / "two/trainer/jobs"
        wait("steps", lambda: any('"step": 2' in path.read_text() for path in states.glob("*/output/logs/*.jsonl")))
        ranks = ranks_below(killed.pid)
        assert len(ranks) == 2
    finally:
        killed.kill()
        killed.wait()
    wait("the ranks' end", lambda: not any(map(alive, ranks)), 120)
    (state,) = states.glob("*/output/state/*.state")
    assert int(state.stem.rpartition("step")[2]) > 0


class Device:
    """Somebody waits for it from ``wanted`` on, until it has rested once."""

    def __init__(self, computing):
        self.wanted, self.found, self._computing = threading.Event(), [], computing

    @property
    def somebody_waits(self):
        return self.wanted.is_set()

    @contextmanager
    def rest(self):
        self.found.append(self._computing.is_set())
        self.wanted.clear()
        yield


@pytest.mark.parametrize("answers", [True, False])
def test_the_host_has_its_device_back_when_the_step_is_done_or_after_a_while(monkeypatch, answers):
    monkeypatch.setattr(processes, "_PAUSE_SECONDS", 600 if answers else 0.5)
    (words, into), (out, lines_into) = os.pipe(), os.pipe()
    computing, told, commands = threading.Event(), ProgressLines(os.fdopen(lines_into, "w")), TrainCommands()
    if answers:
        commands.on_paused = told.paused
    obey(commands, words, lambda: None)

    def run():
        while not commands.stopping:
            computing.set()
            time.sleep(1)
            computing.clear()
            commands.wait_while_paused(0.1)
        told.fail(UserError("over"))
        told._out.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    device, given = Device(computing), TrainCommands()
    relay = processes._Relay(os.fdopen(into, "wb", buffering=0), given)
    reported = os.fdopen(out, "rb")
    follower = threading.Thread(target=processes._follow, args=(reported, TrainCallbacks(), relay, device), daemon=True)
    follower.start()
    for count in (1, 2):
        wait("a step", computing.is_set)
        device.wanted.set()
        wait("a rest", lambda count=count: len(device.found) == count, 20)
    given.stop()
    follower.join(20)
    relay.end()
    assert not follower.is_alive() and device.found[0] is not answers


def test_gpus_are_numbered_among_those_that_the_server_sees():
    assert processes.visible([1, 0], None) == "0,1" and processes.visible([2, 0], "3, 5,GPU-8") == "3,GPU-8"


@pytest.mark.parametrize(
    ("gpus", "seen", "problem"),
    [([0, 2], 2, "There is no GPU 2. The last one is 1."), ([0], 0, "There is no GPU 0. Leave it empty."),
     ([1, 1], 2, "A number is below 0, or there twice."), ([-1], 2, "A number is below 0"), ([0, 1], 2, None)],
)  # fmt: skip
def test_gpus_that_are_not_there_are_refused_at_once(idle, host, settings, monkeypatch, gpus, seen, problem):
    monkeypatch.setattr("lora_trainer.devices.gpu_count", lambda: seen)
    host.device = lambda: torch.device("cuda", 0)
    wish = {**settings, "gpus": gpus, "device": "auto"}
    if problem is None:
        idle.submit(wish)
        return
    with pytest.raises(UserError, match=re.escape(problem)) as caught:
        idle.submit(wish)
    assert caught.value.field == "gpus"


@pytest.mark.parametrize("stops", [False, True])
def test_the_server_describes_pictures_without_captions_before_the_processes_start(
    host, settings, tmp_path, monkeypatch, stops
):
    pictures, commands, found = draw_dataset(tmp_path / "bare", 9, caption=lambda index: None), TrainCommands(), []

    class Words:
        def describe(self, images):
            if stops:
                commands.stop_and_save()
            return [Description(tags=(Tag("disc"),)) for _ in images]

        def close(self):
            pass

    host.captioners = lambda: {"words": HostCaptioner("Words", lambda settings: Words())}
    monkeypatch.setattr(execution, "train_in_processes", lambda *of: found.append(len(read_captions(pictures))))
    config = from_mapping({**settings, "train_data_dir": str(pictures), "task": "image"})
    result = execution._train_beside(config, host, TrainCallbacks(), commands, tmp_path / "log")
    assert found == ([] if stops else [9])
    assert not stops or (result.status, result.lora) == ("stopped", None)


def test_a_base_model_without_a_file_is_refused_in_one_sentence(idle, host, settings):
    with pytest.raises(UserError, match=r"There is no .*gone\.safetensors") as caught:
        idle.submit({**settings, "base_model": "gone.safetensors"})
    assert caught.value.field == "base_model"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_page_asks_for_gpus_where_there_are_several(monkeypatch, count):
    monkeypatch.setattr("lora_trainer.devices.gpu_count", lambda: count)
    assert ('data-setting="gpus"' in advanced()) is (count > 1)


def test_the_api_tells_how_many_there_are(idle, host, monkeypatch):
    monkeypatch.setattr("lora_trainer.devices.gpu_count", lambda: 3)
    app = FastAPI()
    add_routes(app, idle, host)
    assert Client(app).get("/settings").json()["gpus"] == 3
