"""A host and a training that do nothing but what a test tells them to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

from lora_trainer.errors import UserError
from lora_trainer.host.base import AccessPolicy, Card, Checkpoint, Folders, Host, LenderOptions
from lora_trainer.models.base import Lender, ModelInfo
from lora_trainer.training.callbacks import StepReport

TIMEOUT = 20.0


def wait_for(condition: Callable[[], Any], what: str = "it") -> Any:
    """Poll until ``condition()`` is true; fails the test after a while."""
    end = time.monotonic() + TIMEOUT
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.005)
    return value


def weights_at(step: int) -> bytes:
    """The LoRA file that a run saves at ``step``."""
    layer = {"lora_unet_a.lora_up.weight": torch.ones(1, 1), "lora_unet_a.lora_down.weight": torch.full((1, 1), step)}
    return save({name: weight.float() for name, weight in layer.items()}, {"ss_steps": str(step)})


def make_pictures(folder: Path, count: int = 3, caption: str = "**red hat**, a cat") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (64, 64), (index * 20 % 256, 30, 90)).save(folder / f"{index:04d}.png")
        (folder / f"{index:04d}.txt").write_text(caption, encoding="utf-8")
    return folder


class FakeLender(Lender):
    def __init__(self, family: str = "sd1"):
        self.info = ModelInfo(family, "epsilon", "tiny-model")

    def describe(self) -> ModelInfo:
        return self.info

    def borrow(self) -> Any:
        return nullcontext()

    def turn(self) -> Any:
        return nullcontext()

    def model_hash(self) -> str | None:
        return None


@dataclass
class FakeHost(Host):
    root: Path
    name: str = "standalone"
    policy: AccessPolicy = field(default_factory=AccessPolicy)
    published: list[tuple[str, Card]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    lender_options: list[LenderOptions] = field(default_factory=list)
    publish_error: Exception | None = None
    verdict: str | Exception | None = None
    requests: list[Any] = field(default_factory=list)
    refused: UserError | None = None  # every base model, for this reason
    models: dict[str, tuple[bool, bool]] = field(default_factory=dict)  # title -> (selected, loaded)

    def __post_init__(self) -> None:
        self.models = self.models or {"tiny.safetensors [abc]": (True, True)}
        (self.root / "Lora").mkdir(parents=True, exist_ok=True)

    def folders(self) -> Folders:
        return Folders(self.root / "trainer", self.root / "Lora", (self.root / "LLM",))

    def access(self) -> AccessPolicy:
        return self.policy

    def option(self, key: str, default: object) -> object:
        return self.options.get(key, default)

    def checkpoints(self) -> list[Checkpoint]:
        return [Checkpoint(title, self.root / title.split(" ")[0], *there) for title, there in self.models.items()]

    def device(self) -> torch.device:
        return torch.device("cpu")

    def spare_turn(self) -> Any:
        return nullcontext(True)

    def lender(self, checkpoint: str, options: LenderOptions) -> FakeLender:
        if self.refused is not None:
            raise self.refused
        if checkpoint == "missing":
            raise UserError("There is no such model.", field="base_model", remedy="Choose another.")
        self.lender_options.append(options)
        return FakeLender()

    def draw(self, request: Any) -> Image.Image:
        self.requests.append(request)
        return Image.new("RGB", (request.width, request.height))

    def publish(self, lora: Path, name: str, card: Card, *, overwrite: bool = False) -> Path:
        if self.publish_error is not None:
            raise self.publish_error
        path = self.root / "Lora" / f"{name}.safetensors"
        if path.exists() and not overwrite and name not in [earlier for earlier, _ in self.published]:
            message = f"There is a LoRA {name} already."  # as the real hosts say it
            raise UserError(message, field="output_name", remedy="Choose another name.")
        path.write_bytes(Path(lora).read_bytes())
        self.published.append((name, card))
        return path

    def verify(self, lora: Path, prompt: str) -> str | None:
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


@dataclass(frozen=True)
class FakeResult:
    status: str
    lora: Path | None
    diffusers: Path | None
    step: int
    total_steps: int
    loss: float | None
    best: Path | None = None
    verdict: str = ""
    recommended: int | None = None


class FakeTrain:
    """Stands for ``run.train``: ``allow(n)`` lets it take n steps, ``error`` is raised at the next one."""

    def __init__(self, total_steps: int = 4, *, free: bool = False):
        self.total_steps = total_steps
        self.free = free
        self.error: BaseException | None = None
        self.away: str | None = None
        self.returns = False  # switching back ends it
        self.configs: list[Any] = []
        self.saves = 0
        self.measured: dict[int, tuple[float, float]] = {}  # step -> validation and training loss
        self.checkpoints: tuple[int, ...] = ()  # steps at which a LoRA is saved on the way, with a preview
        self.best: int | None = None  # step of which a LoRA is kept as the best one, and recommended
        self.state_every = 1
        self.phases: tuple[tuple[str, int, int], ...] = ()  # told before the first step
        self._permits = threading.Semaphore(0)

    def allow(self, steps: int = 1) -> None:
        for _ in range(steps):
            self._permits.release()

    def config(self, number: int = 0) -> Any:
        """What the training of that number was begun with; waits until it has begun."""
        return wait_for(lambda: self.configs[number : number + 1], f"training {number}")[0]

    def __call__(
        self, config: Any, lender: Any, *, callbacks: Any, commands: Any, previewer: Any, captioners: Any
    ) -> FakeResult:
        self.configs.append(config)
        output = Path(config.output_dir)
        (output / "logs").mkdir(parents=True, exist_ok=True)
        states = output / "state"
        saved = states.glob("*.state") if config.resume == "auto" else ()
        step = max((int(path.stem[-8:]) for path in saved), default=0)
        metrics = output / "logs" / "metrics.jsonl"
        lines = metrics.read_text().splitlines(True) if step and metrics.exists() else []
        old = [line for line in lines if json.loads(line)["step"] <= step]
        metrics.write_text("".join(old))
        callbacks.on_phase("latents", 0, 2)
        callbacks.on_phase("latents", 2, 2)
        for phase in self.phases:
            callbacks.on_phase(*phase)
        while step < self.total_steps:
            if not self._may_step(callbacks, commands):
                return self._end(output, config, step, callbacks, commands)
            if self.error is not None:
                raise self.error
            step += 1
            with metrics.open("a") as handle:
                handle.write(json.dumps({"step": step, "epoch": 1, "loss": 1 / step, "lr": 1e-4}) + "\n")
                if step in self.measured:
                    validation, training = self.measured[step]
                    measured = {"kind": "validation", "step": step, "validation": validation, "training": training}
                    handle.write(json.dumps(measured) + "\n")
            callbacks.on_step(StepReport(step, self.total_steps, 1, 1, 1 / step, 1e-4, 0.01, 1))
            if commands.take_save():
                self.saves += 1
            if commands.take_preview() or step in self.checkpoints:
                self._preview(output, config, step, callbacks)
            if step in self.checkpoints:
                self._save(output / f"{config.output_name}-step{step}.safetensors", step, callbacks)
            if step == self.best:
                self._save(output / f"{config.output_name}-best.safetensors", step, callbacks)
            if step % self.state_every == 0:
                states.mkdir(exist_ok=True)
                path = states / f"{config.output_name}-00000000-step{step:08d}.state"
                path.touch()
                callbacks.on_saved(path, step, "state")
        return self._end(output, config, step, callbacks, commands)

    def _may_step(self, callbacks: Any, commands: Any) -> bool:
        told = None
        while not commands.stopping:
            if self.away is not None:
                if told != self.away:
                    told = self.away
                    callbacks.on_waiting(told, self.returns)
                if commands.take_switch_back():
                    self.away = None
            elif not commands.paused and (self.free or self._permits.acquire(blocking=False)):
                return True
            time.sleep(0.005)
        return False

    def _end(self, output: Path, config: Any, step: int, callbacks: Any, commands: Any) -> FakeResult:
        finished = step >= self.total_steps
        lora = None
        if finished or commands.saves_before_stop:
            lora = output / f"{config.output_name}.safetensors"
            self._save(lora, step, callbacks)
        ending = "finished" if finished else "stopped", lora, None, step, self.total_steps, 0.5
        if self.best is None or self.best >= step:
            return FakeResult(*ending)
        best = output / f"{config.output_name}-best.safetensors"
        return FakeResult(*ending, best, f"It memorises. Step {self.best} is recommended.", self.best)

    def _save(self, lora: Path, step: int, callbacks: Any) -> None:
        lora.write_bytes(weights_at(step))
        callbacks.on_saved(lora, step, "lora")

    def _preview(self, output: Path, config: Any, step: int, callbacks: Any) -> None:
        path = output / "previews" / f"{step}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (200, 0, 0)).save(path)
        callbacks.on_preview(path, step, "a prompt")


def status_of(manager, job):
    return manager.store.get(job.id).status


def wait_status(manager, job, status):
    wait_for(lambda: status_of(manager, job) == status, status)
    return manager.store.get(job.id)


def wait_step(manager, job, step):
    wait_for(lambda: lines_of(manager, job) >= step, f"step {step}")


def lines_of(manager, job):
    path = manager.folders.metrics(manager.store.get(job.id))
    return len(path.read_text().splitlines()) if path.exists() else 0
