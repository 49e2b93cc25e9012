"""What a run has left in its output folder."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_trainer.config import TrainConfig, load
from lora_trainer.errors import UserError
from lora_trainer.run_files import CONFIGURATION, configurations_in


def find_run(path: Path) -> tuple[Path, TrainConfig]:
    """The output folder of a run, and its settings. path: that folder, one that holds it as ``output``, or the file
    of settings in it.

    Raises:
        UserError: there is no run, or there are several.
    """
    path = Path(path)
    if path.name.endswith(CONFIGURATION) and path.is_file():
        return path.parent, load(path)
    if not path.is_dir():
        raise UserError(f"There is no folder {path}.", field="run", remedy="Name the output folder of a run.")
    found = configurations_in(path)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise UserError(f"There are several runs in {path}.", field="run", remedy=f"Name one of {names}.")
    if not found:
        remedy = f"Name a folder in which a run has left a *{CONFIGURATION}."
        raise UserError(f"There is no run in {path}.", field="run", remedy=remedy)
    return found[0].parent, load(found[0])


def saved_loras(folder: Path, name: str) -> dict[int, Path]:
    """The LoRAs in a run's output folder by their steps, in order: those of the way, the best and the last one.

    Of two of one step the one that stays longer counts: the last before the best, the best before those of the way.
    """
    prefix, found = f"{name}-step", {}
    for path in Path(folder).glob("*.safetensors"):
        digits = path.stem[len(prefix) :]
        if path.stem.startswith(prefix) and digits.isdecimal():
            found[int(digits)] = path
    for path in (Path(folder) / f"{stem}.safetensors" for stem in (f"{name}-best", name)):
        if (step := _step_of(path)) is not None:
            found[step] = path
    return dict(sorted(found.items()))


def _step_of(path: Path) -> int | None:
    """The step that a LoRA says it was saved at; None without such an entry, or without such a file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return int((file.metadata() or {})["ss_steps"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
