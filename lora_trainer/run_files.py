"""Names of what a run leaves in its output folder, for those who write it and for those who look for it."""

from __future__ import annotations

from pathlib import Path

CONFIGURATION = ".config.yaml"
"""What follows the LoRA's name in the name of the file of settings."""
COMPARISONS, GRID = "compare", "grid.png"
"""The folder of the comparisons, each in a numbered folder, and the whole of one as a picture."""


def environment_file(folder: Path, name: str) -> Path:
    """Where the releases and the device of a run are written down. name: of its LoRA."""
    return folder / "logs" / f"{name}.environment.json"


def configurations_in(folder: Path) -> list[Path]:
    """The files of settings of the runs in ``folder``, or, where there is none, of those in its ``output``."""
    return sorted(folder.glob(f"*{CONFIGURATION}")) or sorted(folder.glob(f"output/*{CONFIGURATION}"))
