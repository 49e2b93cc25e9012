"""The training state: everything a run needs to go on as if nothing had happened, in one file.

A state is one safetensors file: tensors as tensors, all else as JSON in its metadata. (torch.save is no choice here:
the WebUIs replace torch.load with one that refuses files it does not know.) It is written in one step, so a run killed
at any moment leaves the old state or the new one; the one before is kept as well, in case a disk damages the newest.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_trainer.errors import UserError
from lora_trainer.files import atomic_path

FORMAT = 1
KEPT_STATES = 2


class DamagedState(Exception):
    """The file is not a whole training state; ``str`` says why."""


@dataclass(frozen=True)
class TrainingState:
    """step: optimizer steps done; epoch and position (steps done in it) follow from it and are there for readers.

    run_key: the settings and facts that determine the result; a state fits a run with the same key.
    parts: name -> what that part's ``state_dict`` gave (nested dicts, lists, tensors, numbers, texts).
    finished: the LoRA of this step was exported and the run ended.
    """

    step: int
    epoch: int
    position: int
    run_key: Mapping[str, Any]
    parts: Mapping[str, Any]
    finished: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)


def run_digest(run_key: Mapping[str, Any]) -> str:
    """8 hexadecimal digits of the SHA-256 of the canonical JSON of ``run_key``."""
    return hashlib.sha256(_canonical(run_key).encode("utf-8")).hexdigest()[:8]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, sorted."""
    missing = object()
    names = sorted({*old, *new})
    return [n for n in names if _canonical(old.get(n, str(missing))) != _canonical(new.get(n, str(missing)))]


# ---- one file -----------------------------------------------------------------------------------------------------


def write_state(path: Path, state: TrainingState) -> None:
    """Write ``state`` in one step. Raises ``UserError`` when the folder cannot be written."""
    tensors: dict[str, Tensor] = {"format": torch.tensor(FORMAT)}  # safetensors 0.4 reads no file without a tensor
    content = {
        "format": FORMAT,
        "step": state.step,
        "epoch": state.epoch,
        "position": state.position,
        "identity": state.run_key,  # its name in files of this format
        "finished": state.finished,
        "versions": state.versions,
        "parts": _pack(dict(state.parts), "", tensors),
    }
    metadata = {"state": json.dumps(content), "crc32": str(_checksum(tensors))}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata=metadata)


def read_state(path: Path) -> TrainingState:
    """Read a state; its tensors are on the CPU. Raises ``DamagedState``."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        content = json.loads(metadata["state"])
        if content["format"] != FORMAT:
            raise DamagedState(f"it has format {content['format']}, which this version does not read")
        if metadata["crc32"] != str(_checksum(tensors)):
            raise DamagedState("its checksum is wrong")
        parts = _unpack(content["parts"], tensors)
        names = ("step", "epoch", "position", "finished", "versions")
        return TrainingState(run_key=content["identity"], parts=parts, **{name: content[name] for name in names})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedState(f"it is no whole training state ({error})") from error


def named_state(resume: str) -> TrainingState:
    """The state that the setting ``resume`` names by its path. Raises UserError when there is no whole one."""
    if not Path(resume).is_file():
        message = f"There is no training state {resume}."
        raise UserError(message, field="resume", remedy="Use auto, never, or the path of a .state file.")
    try:
        return read_state(Path(resume))
    except DamagedState as error:
        message = f"{Path(resume).name} cannot be continued: {error}."
        raise UserError(message, field="resume", remedy="Use auto, never or another file.") from error


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode("utf-8"), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), value)
    return value


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of ``value``; its tensors go to ``tensors``, ``name`` in their names. Tuples and keys keep their types."""
    if isinstance(value, Tensor):
        # A copy of its own: safetensors refuses tensors that share memory, as 8-bit optimizers' tables do.
        unique = f"{len(tensors)}:{name}"  # different keys can read alike: 1 and "1", "a.b" and a's b
        tensors[unique] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": unique}
    if isinstance(value, Mapping):
        items = [[key, _pack(item, f"{name}.{key}" if name else str(key), tensors)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, list):
        return [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} holds a {type(value).__name__}, which a training state cannot keep.")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(_unpack(item, tensors) for item in value["tuple"])
        return {key: _unpack(item, tensors) for key, item in value["dict"]}
    return value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


# ---- a run's files ------------------------------------------------------------------------------------------------


LENGTHS = {"epochs", "max_train_steps"}
"""Settings that say how long a run is."""


class StateStore:
    """The states of one output name: ``<directory>/<name>-<run digest>-step00000100.state``.

    The digest keeps runs of the same name with other settings apart: none ever replaces another's states.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        run_key: Mapping[str, Any],
        on_warning: Callable[[str], None] = lambda text: None,
        keep: int = KEPT_STATES,
    ):
        self.directory = Path(directory)
        self.name = name
        self.run_key = run_key
        self._on_warning = on_warning
        self._keep = keep

    def path(self, step: int) -> Path:
        return self.directory / f"{self.name}-{run_digest(self.run_key)}-step{step:08d}.state"

    def save(self, state: TrainingState) -> Path:
        """Write the state; only when it is in place are older ones of the same run removed, all but ``keep`` - 1."""
        path = self.path(state.step)
        write_state(path, state)
        ours = run_digest(self.run_key)
        older = [old for mark, step, old in self._listing() if mark == ours and step < state.step]
        for old in older[self._keep - 1 :]:
            old.unlink(missing_ok=True)
        return path

    def has_one(self, resume: str) -> bool:
        """Whether ``find`` will look into a state of this very run, or into the file that ``resume`` names."""
        if resume in ("auto", "never"):
            ours = run_digest(self.run_key)
            return resume == "auto" and any(mark == ours for mark, _, _ in self._listing())
        return True

    def newest(self) -> TrainingState | None:
        """The newest whole state of a run with this key. Damaged ones are passed over with a warning."""
        ours = run_digest(self.run_key)
        for mark, _, path in self._listing():
            if mark == ours:
                try:
                    return read_state(path)
                except DamagedState as error:
                    self._on_warning(f"{path.name} is damaged: {error}. The state before it is used.")
        return None

    def other_settings(self) -> list[str]:
        """What the newest state of this name with another run key had different; empty when there is none."""
        ours = run_digest(self.run_key)
        for mark, _, path in self._listing():
            if mark != ours:
                try:
                    return differences(read_state(path).run_key, self.run_key)
                except DamagedState:
                    continue
        return []

    def other_length(self) -> tuple[Path, int] | None:
        """(path, step) of the newest state of a run that differs from this one in its length only."""
        for _, step, path in self._listing():
            try:
                names = differences(read_state(path).run_key, self.run_key)
            except DamagedState:
                continue
            if names and set(names) <= LENGTHS:
                return path, step
        return None

    def find(self, resume: str) -> TrainingState | None:
        """The state to go on from, as the setting ``resume`` says: auto, never, or a file; None starts anew.

        Raises:
            UserError: the file that ``resume`` names cannot be read.
        """
        if resume == "never":
            return None
        if resume == "auto":
            state = self.newest()
            if state is None and (names := self.other_settings()):
                self._on_warning(
                    f"There is a training state of {self.name}, but with other settings ({', '.join(names)}): "
                    "this run starts anew."
                )
            return state
        state = named_state(resume)
        if names := differences(state.run_key, self.run_key):
            self._on_warning(
                f"{Path(resume).name} was trained with other settings: {', '.join(names)}. The new ones count."
            )
        return state

    def _listing(self) -> list[tuple[str, int, Path]]:
        """(run digest, step, path) of this name's states; the highest step first."""
        pattern = re.compile(re.escape(self.name) + r"-([0-9a-f]{8})-step(\d+)\.state")
        paths = self.directory.iterdir() if self.directory.is_dir() else ()
        found = [(match[1], int(match[2]), path) for path in paths if (match := pattern.fullmatch(path.name))]
        return sorted(found, key=lambda entry: (-entry[1], entry[0]))
