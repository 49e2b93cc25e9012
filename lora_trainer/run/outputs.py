"""Where a run keeps what it makes, and how it avoids writing over what it did not make."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from lora_trainer.adapters.export import DIFFUSERS_FILE_NAME
from lora_trainer.adapters.peft_folder import SETTINGS, WEIGHTS
from lora_trainer.config import TrainConfig
from lora_trainer.errors import UserError
from lora_trainer.files import safe_name_problem
from lora_trainer.run_files import CONFIGURATION, environment_file

RUN_ENTRY = "lora_trainer.run"
"""Metadata entry of the files we write: the run digest of the run that wrote them."""

OutputsT = TypeVar("OutputsT", bound="Outputs")


@dataclass(frozen=True)
class Outputs:
    """The paths of one run. ``run_digest`` names everything that decides on its result."""

    directory: Path
    name: str
    run_digest: str
    overwrite: bool = False

    @classmethod
    def of(cls: type[OutputsT], config: TrainConfig, run_digest: str) -> OutputsT:
        return cls(Path(config.output_dir), config.output_name, run_digest, config.overwrite)

    @property
    def lora(self) -> Path:
        return self.directory / f"{self.name}.safetensors"

    @property
    def diffusers(self) -> Path:
        """The name that diffusers looks for; where another run's file has it already, one with our name in it."""
        usual = self.directory / DIFFUSERS_FILE_NAME
        if not usual.exists() or self._is_ours(usual) or (self.overwrite and self._has_our_name(usual)):
            return usual
        return usual.with_stem(f"{usual.stem}-{self.name}")

    @property
    def configuration(self) -> Path:
        return self.directory / f"{self.name}{CONFIGURATION}"

    @property
    def environment(self) -> Path:
        return environment_file(self.directory, self.name)

    def path(self, kind: str, step: int) -> Path:
        """Where a ``Saver`` writes: see there for ``kind``."""
        if kind == "step":
            return self.checkpoint(step)
        return self.best if kind == "best" else self.lora

    def checkpoint(self, step: int) -> Path:
        return self.directory / f"{self.name}-step{step:08d}.safetensors"

    @property
    def best(self) -> Path:
        """The LoRA that the measurements on held-out data recommend; ``keep_checkpoints`` does not count it."""
        return self.directory / f"{self.name}-best.safetensors"

    @property
    def exported(self) -> Path | None:
        """The LoRA in diffusers' layout as well, if it is there."""
        return self.diffusers if self.diffusers.exists() else None

    def forget_old_checkpoints(self, keep: int | None) -> None:
        """Delete the LoRAs that this run saved on its way, all but the last ``keep``; None keeps all."""
        for path in self.checkpoints()[:-keep] if keep else ():
            self._delete(path)

    def checkpoints(self) -> list[Path]:
        """The LoRAs that this run saved on its way, oldest first."""
        return [path for path in self._named_as_checkpoints() if self._is_ours(path)]

    def refuse_to_overwrite(self, continued: str | None = None) -> None:
        """Raises UserError when a LoRA of this name is there, finished or saved on the way, that another run made.

        continued: run digest of the run that is gone on with; its LoRAs may be replaced.
        """
        for path in () if self.overwrite else (self.lora, self.best, *self._named_as_checkpoints()):
            if path.exists() and not self._is_ours(path) and (continued is None or run_of(path) != continued):
                raise UserError(
                    f"{path.name} exists and was not made by this run.",
                    field="output_name",
                    remedy="Choose another output_name or output_dir, or set overwrite: true.",
                )

    def _named_as_checkpoints(self) -> list[Path]:
        files = sorted(self.directory.glob("*.safetensors"))
        return [path for path in files if self._is_checkpoint(path.stem)]

    def _is_checkpoint(self, name: str) -> bool:
        prefix = f"{self.name}-step"
        return name.startswith(prefix) and name[len(prefix) :].isdigit()

    def _delete(self, checkpoint: Path) -> None:
        checkpoint.unlink(missing_ok=True)

    def _is_ours(self, path: Path) -> bool:
        return run_of(path) == self.run_digest

    def _has_our_name(self, path: Path) -> bool:
        return run_of(path) is not None and _metadata(path).get("ss_output_name") == self.name


class AdapterFolders(Outputs):
    """The same for LoRAs that are folders, as PEFT reads them; a path is that of the weights in it."""

    @property
    def lora(self) -> Path:
        return self.directory / self.name / WEIGHTS

    @property
    def best(self) -> Path:
        return self.directory / f"{self.name}-best" / WEIGHTS

    @property
    def exported(self) -> None:
        return None

    def checkpoint(self, step: int) -> Path:
        return self.directory / f"{self.name}-step{step:08d}" / WEIGHTS

    def _named_as_checkpoints(self) -> list[Path]:
        files = sorted(self.directory.glob(f"*/{WEIGHTS}"))
        return [path for path in files if self._is_checkpoint(path.parent.name)]

    def _delete(self, checkpoint: Path) -> None:
        for name in (WEIGHTS, SETTINGS):
            (checkpoint.parent / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody has put something else into it
            checkpoint.parent.rmdir()


def run_of(path: Path) -> str | None:
    """The run digest of the run that wrote a LoRA; None when no run of ours did."""
    return _metadata(path).get(RUN_ENTRY)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def output_name(config: TrainConfig) -> str:
    """The LoRA's name; where none is given, that of its folder. Raises UserError when that cannot be a file's name."""
    name = config.output_name or Path(config.output_dir).resolve().name
    if problem := safe_name_problem(name):
        raise UserError(f"{name!r} cannot be a file name: {problem}.", field="output_name", remedy="Set output_name.")
    return name
