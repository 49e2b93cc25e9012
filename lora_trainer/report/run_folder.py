"""Finding what a run left behind. Everything but its settings may be missing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_trainer.adapters.peft_folder import WEIGHTS
from lora_trainer.config import FACTS, TrainConfig, from_mapping, parse_yaml
from lora_trainer.config.yaml_text import file_text
from lora_trainer.errors import UserError
from lora_trainer.files import sha256_file
from lora_trainer.run_files import COMPARISONS, CONFIGURATION, GRID, configurations_in, environment_file
from lora_trainer.training.metrics import METRICS_FILE, VALIDATION, read_metrics
from lora_trainer.training.validation import Measurement, Verdict, verdict

_ON_THE_WAY = re.compile(r"-(best|step\d+)$")


@dataclass(frozen=True)
class SavedLora:
    """name: of its file or folder. step: None where it is not said. digest: SHA-256, hexadecimal."""

    name: str
    step: int | None
    size: int
    digest: str


class RunFolder:
    """A run's output folder, and the name of its LoRA in it.

    path: of the folder, of a job's folder around it, of the run's .config.yaml or of its LoRA.

    Raises:
        UserError: there is no run, or there are several.
    """

    def __init__(self, path: Path):
        path = Path(path)
        self.configuration = _find_configuration(path)
        self.directory = self.configuration.parent
        self.name = self.configuration.name.removesuffix(CONFIGURATION)
        text = file_text(self.configuration)
        self.started = (re.match(r"# .*, started (\S+)", text) or ["", ""])[1]
        self.config: TrainConfig = from_mapping(parse_yaml(text, self.configuration.name))

    def settings(self) -> dict[str, Any]:
        """Those that a person gave or a preset set, by name; of a path the last part alone."""
        return {name: plain(name, getattr(self.config, name)) for name in FACTS if FACTS[name].given_by != "job"}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One entry for each step, and one for each measurement; see ``training.metrics``."""
        return read_metrics(self.directory / "logs" / METRICS_FILE)

    def previews(self) -> dict[int, dict[int, Path]]:
        """The pictures that were drawn on the way, by step and number of the prompt."""
        found: dict[int, dict[int, Path]] = {}
        named = re.compile(re.escape(self.name) + r"-step(\d+)-(\d+)\.png")
        folder = self.directory / "previews"
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if match := named.fullmatch(path.name):
                found.setdefault(int(match[1]), {})[int(match[2])] = path
        return found

    def comparison(self) -> Path | None:
        """The newest picture of checkpoints beside each other."""
        return max((self.directory / COMPARISONS).glob(f"[0-9]*/{GRID}"), default=None)

    def environment(self) -> dict[str, str]:
        """Versions and device of the run, as it wrote them down."""
        try:
            found = json.loads(environment_file(self.directory, self.name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}

    def loras(self) -> list[SavedLora]:
        """The finished one, the best one, and those of the way."""
        saved = []
        for path in self._lora_files():
            name = path.parent.name if path.name == WEIGHTS else path.name
            step = re.search(r"-step(\d+)", name)
            known = int(step[1]) if step else None
            if known is None and (said := metadata_of(path).get("ss_steps", "")).isdecimal():
                known = int(said)
            saved.append(SavedLora(name, known, path.stat().st_size, sha256_file(path)))
        return saved

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What the LoRA's file says of the data and the base; of the newest file that says anything."""
        return next((found for path in self._lora_files() if (found := metadata_of(path))), {})

    def _lora_files(self) -> list[Path]:
        files = [path for path in self.directory.glob("*.safetensors") if _run_name(path.stem) == self.name]
        files += [path for path in self.directory.glob(f"*/{WEIGHTS}") if _run_name(path.parent.name) == self.name]
        # The finished one is the name alone, which sorts before what has something behind it.
        return sorted(files, key=lambda path: path.parent.name if path.name == WEIGHTS else path.stem)

    @cached_property
    def verdict(self) -> Verdict | None:
        """What the measurements on held-out pictures say."""
        names = ("step", "epoch", "validation", "training", "drift")
        lines = [line for line in self.metrics if line.get("kind") == VALIDATION and all(n in line for n in names)]
        measured = [Measurement(**{name: line[name] for name in names}) for line in lines]
        return verdict(measured, self.config.early_stopping_patience)


def plain(name: str, value: Any) -> Any:
    """A setting's value without the places of this machine: of a path, the last part."""
    if FACTS[name].path is None:
        return value
    if isinstance(value, list):
        return [_last_part(one) for one in value]
    return _last_part(value) if isinstance(value, str) and value not in FACTS[name].words else value


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty where it cannot be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _last_part(path: str) -> str:
    try:
        if Path(path).expanduser() == Path.home():
            return "~"  # whose last part is somebody's name
    except RuntimeError:
        pass  # a user without a home, as in some containers
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _run_name(stem: str) -> str:
    return _ON_THE_WAY.sub("", stem)


def _find_configuration(path: Path) -> Path:
    if path.is_file():
        folder, name = path.parent, path.name.removesuffix(CONFIGURATION)
        if not path.name.endswith(CONFIGURATION):
            folder = folder.parent if path.name == WEIGHTS else folder
            name = _run_name(path.parent.name if path.name == WEIGHTS else path.stem)
        found = [folder / f"{name}{CONFIGURATION}"]
    else:
        found = configurations_in(path)
    found = [one for one in found if one.is_file()]
    if not found:
        remedy = "Give a run's output folder, with NAME.config.yaml in it."
        raise UserError(f"There is no run in {path}.", remedy=remedy)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise UserError(f"There are several runs in {path}.", remedy=f"Give one of its files: {names}.")
    return found[0]
