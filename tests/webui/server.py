"""A real WebUI under test: started in a data folder of its own, with this extension and a probe beside it.

LORA_TRAINER_WEBUI          the WebUI's folder (with launch.py); AUTOMATIC1111's or Forge's
LORA_TRAINER_WEBUI_PYTHON   its Python, with this extension's packages installed
LORA_TRAINER_WEBUI_MODELS   folder of base models (and their .yaml), the first by name of which is trained
LORA_TRAINER_WEBUI_FLAGS    its command line; by default one that runs on a CPU
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
CPU_FLAGS = "--use-cpu all --no-half --precision full --do-not-download-clip --skip-torch-cuda-test"
FORGE_FLAGS = "--always-cpu --skip-torch-cuda-test --gradio-allowed-path ."
FORGE = (Path(os.environ.get("LORA_TRAINER_WEBUI", "")) / "modules_forge").is_dir()
a1111_only = pytest.mark.skipif(FORGE, reason="a way of running models that Forge does not have")
forge_only = pytest.mark.skipif(not FORGE, reason="a trap that only Forge has")
START_SECONDS = 300
OVER = ("finished", "stopped", "failed", "interrupted")
# Forge loads no model that is really small.
PICTURE = {"steps": 2, "width": 64, "height": 64} if FORGE else {"steps": 6, "width": 128, "height": 128}

# Runs code of the tests inside the WebUI, to look at what no route of the product shows.
PROBE = '''
import hashlib, threading, traceback
import torch
from fastapi import Body
from modules import script_callbacks, shared

def parts():
    model = shared.sd_model
    objects = getattr(model, "forge_objects_original", None)
    if objects is None:
        return [model]
    return [objects.unet.model, objects.vae.first_stage_model, objects.clip.cond_stage_model]

def tensors():
    return [(name, tensor) for part in parts() for name, tensor in sorted(part.state_dict().items())]

def sha():
    """SHA-256 over every tensor of the loaded model: names, formats, shapes, devices, bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

def add_routes(demo, app):
    @app.post("/probe")
    def probe(body: dict = Body(...)):
        space = {"sha": sha, "parts": parts, "tensors": tensors, "shared": shared, "torch": torch}
        try:
            exec(body["code"], space)
        except Exception:
            return {"error": traceback.format_exc()}
        return {"result": space.get("result")}

script_callbacks.on_app_started(add_routes)
'''


class Server:
    """One running WebUI. ``with Server(folder) as webui: …``"""

    def __init__(
        self, data: Path, *flags: str, extra_path: Path | None = None, credentials: tuple[str, str] | None = None
    ):
        """credentials: user and password of the API, sent with every request."""
        self.webui = Path(os.environ["LORA_TRAINER_WEBUI"])
        self.python = os.environ["LORA_TRAINER_WEBUI_PYTHON"]
        self.data, self.flags = Path(data), flags
        self.extra_path = extra_path  # modules here are found before the environment's
        self.headers: dict[str, str] = {}
        if credentials is not None:
            self.headers["Authorization"] = "Basic " + base64.b64encode(":".join(credentials).encode()).decode()
        self.log = self.data / "webui.log"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        self.prepare()
        self.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.kill()

    def prepare(self) -> None:
        checkpoints = self.data / "models" / "Stable-diffusion"
        for folder in (checkpoints, self.data / "models" / "Lora", self.data / "extensions" / "probe" / "scripts"):
            folder.mkdir(parents=True, exist_ok=True)
        for source in sorted(Path(os.environ["LORA_TRAINER_WEBUI_MODELS"]).iterdir()):
            if source.is_file() and not (checkpoints / source.name).exists():
                try:
                    os.link(source, checkpoints / source.name)  # nobody writes into a checkpoint
                except OSError:
                    shutil.copyfile(source, checkpoints / source.name)
        # Text encoders that a .yaml names relative to the WebUI's folder: the command line looks above the checkpoint.
        for config in (self.webui / "models").glob("*/config.json"):
            if not (link := self.data / "models" / config.parent.name).exists():
                link.symlink_to(config.parent, target_is_directory=True)
        (self.data / "extensions" / "probe" / "scripts" / "probe.py").write_text(PROBE, encoding="utf-8")
        extension = self.data / "extensions" / "sd-webui-lora-trainer"
        if not extension.exists():
            extension.symlink_to(ROOT, target_is_directory=True)
        config = self.data / "config.json"
        if not config.exists():
            # Live previews of SDXL would download their decoder.
            config.write_text(json.dumps({"live_previews_enable": False}), encoding="utf-8")

    def start(self) -> None:
        self.port = free_port()
        default = FORGE_FLAGS if FORGE else CPU_FLAGS
        flags = shlex.split(os.environ.get("LORA_TRAINER_WEBUI_FLAGS", default))
        # An installer of ours would be run; the packages are there already, and a test must not install any.
        flags += ["--skip-prepare-environment", "--no-download-sd-model", "--skip-version-check"]
        flags += ["--disable-console-progressbars", "--api", "--port", str(self.port), "--data-dir", str(self.data)]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}
        environment = {**os.environ, **offline, **threads}
        environment.pop("PYTHONPATH", None)
        if self.extra_path is not None:
            environment["PYTHONPATH"] = str(self.extra_path)
        begin = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            command = [self.python, "launch.py", *flags, *self.flags]
            self.process = subprocess.Popen(
                command, cwd=self.webui, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._wait_for_start(begin)

    def _wait_for_start(self, begin: int) -> None:
        """Its page answers before all routes are there, so the log is asked."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the WebUI ended:\n{self.tail()}")
            if b"Startup time" in self.log.read_bytes()[begin:] and self._answers():
                return
            time.sleep(0.25)
        raise RuntimeError(f"the WebUI did not start:\n{self.tail()}")

    def _answers(self) -> bool:
        """Without its page the WebUI says that it has started before it listens."""
        try:
            self.get("/sdapi/v1/options")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    def kill(self, how: int = signal.SIGKILL) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, how)
            self.process.wait(30)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    # Requests -----------------------------------------------------------------------------------------------------

    def get(self, path: str, timeout: float = 120) -> Any:
        return self._send(urllib.request.Request(self.url(path), headers=self.headers), timeout)

    def post(self, path: str, body: Any = None, timeout: float = 600) -> Any:
        data = json.dumps({} if body is None else body).encode()
        headers = {"Content-Type": "application/json", **self.headers}
        return self._send(urllib.request.Request(self.url(path), data=data, headers=headers), timeout)

    def raw(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Status and body of a request that is sent as it is, without credentials; (0, …) when it was cut off."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.putrequest(method, "/", skip_accept_encoding=True)
            # What http.client itself would refuse to send goes out as well.
            connection._buffer[0] = f"{method} {path} HTTP/1.1".encode("utf-8", "surrogatepass")
            for name, value in {"Content_Length": str(len(body)), **headers}.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (http.client.HTTPException, ConnectionError) as error:
            return 0, str(error).encode()
        finally:
            connection.close()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _send(self, request: urllib.request.Request, timeout: float) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{error.code} {request.full_url}: {error.read().decode()[:2000]}") from error

    def probe(self, code: str) -> Any:
        """Run ``code`` inside the WebUI and return what it leaves in ``result``."""
        answer = self.post("/probe", {"code": code})
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def sha(self) -> str:
        return self.probe("result = sha()")

    def reload_ui(self) -> None:
        """What the button of that name does; returns when the new page answers."""
        begin = self.log.stat().st_size
        self.probe("shared.state.request_restart()\nresult = None")
        self._wait_for_start(begin)

    # What a user does -----------------------------------------------------------------------------------------------

    def generate(self, prompt: str, seed: int = 1, **settings: Any) -> np.ndarray:
        body = {"prompt": prompt, "seed": seed, "cfg_scale": 5} | PICTURE | settings
        picture = self.post("/sdapi/v1/txt2img", body)["images"][0]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"))

    def checkpoints(self) -> list[str]:
        return [model["title"] for model in self.get("/sdapi/v1/sd-models")]

    def select(self, title: str) -> None:
        self.post("/sdapi/v1/options", {"sd_model_checkpoint": title})

    def submit(self, **settings: Any) -> int:
        return self.post("/lora-trainer/v1/jobs", {"settings": settings})["id"]

    def command(self, job_id: int, command: str) -> None:
        """Tell a job something; one that is over cannot be told any more, which is no error here."""
        try:
            self.post(f"/lora-trainer/v1/jobs/{job_id}/{command}")
        except RuntimeError as error:
            if self.job(job_id)["status"] not in OVER and command != "resume":
                raise AssertionError(f"{command} of a job that is not over") from error

    def job(self, job_id: int) -> dict[str, Any]:
        return self.get(f"/lora-trainer/v1/jobs/{job_id}")

    def wait(self, job_id: int, statuses: tuple[str, ...] = OVER, timeout: float = 300) -> dict[str, Any]:
        return self.until(job_id, lambda job: job["status"] in statuses, timeout)

    def until(self, job_id: int, condition: Any, timeout: float = 300) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if condition(job):
                return job
            time.sleep(0.05)
        raise TimeoutError(f"job {job_id} is {job['status']} at step {job['step']}: {job.get('error')}\n{self.tail()}")

    def lora(self, job_id: int) -> Path:
        """The finished file in the job's folder."""
        (folder,) = (self.data / "lora_trainer" / "jobs").glob(f"{job_id:05d}-*")
        job = self.job(job_id)
        return folder / job["lora"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
