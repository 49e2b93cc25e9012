"""Which packages the trainer needs, and what is wrong with those that are here. Standard library only: install.py
and a tab whose packages are missing use it too."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.errors import UserError


@dataclass(frozen=True)
class Requirement:
    """A distribution and the half-open range of versions that works: ``minimum <= version < below``."""

    name: str
    minimum: str
    below: str | None = None

    def __str__(self) -> str:
        return f"{self.name}>={self.minimum}" + (f",<{self.below}" if self.below else "")

    def accepts(self, version: str) -> bool:
        number = release(version)
        return number >= release(self.minimum) and (self.below is None or number < release(self.below))


def requirements() -> list[Requirement]:
    """What must be there. diffusers from 0.36 on needs ``torch.xpu``, which came with torch 2.3."""
    torch = installed_version("torch")
    old_torch = torch is not None and release(torch) < (2, 3)
    return [
        Requirement("diffusers", "0.29.2", "0.36" if old_torch else None),
        Requirement("transformers", "4.30.2"),
        Requirement("safetensors", "0.3.1"),
        Requirement("numpy", "1.24"),
        Requirement("pillow", "9.4"),
        Requirement("pandas", "1.5"),
        Requirement("pyyaml", "6.0"),
        Requirement("regex", "2022.1"),
        *([Requirement("tomli", "2.0")] if sys.version_info < (3, 11) else []),
    ]


OPTIONAL = (Requirement("tensorboard", "2.15"),)
"""Nice to have: curves for TensorBoard. Installed only when asked for."""


def absent(wanted: Sequence[Requirement]) -> list[Requirement]:
    """Those of ``wanted`` that are not installed at all."""
    return [requirement for requirement in wanted if installed_version(requirement.name) is None]


def unfit(wanted: Sequence[Requirement]) -> list[tuple[Requirement, str]]:
    """Those of ``wanted`` that are installed in a version that does not work, with that version."""
    versions = [(requirement, installed_version(requirement.name)) for requirement in wanted]
    return [(wish, version) for wish, version in versions if version is not None and not wish.accepts(version)]


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: "0.31.0.dev1+cpu" -> (0, 31, 0). Enough to compare with our ranges."""
    match = re.match(r"\d+(?:\.\d+)*", version or "")
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def problem() -> str | None:
    """What keeps the trainer from working, and the remedy, as a sentence; None when nothing does."""
    wanted = requirements()
    if lacking := absent(wanted):
        return f"Training needs packages that are not installed: {', '.join(map(str, lacking))}. {remedy()}"
    if wrong := unfit(wanted):
        names = ", ".join(f"{wish} (installed: {version})" for wish, version in wrong)
        return (
            f"Training needs other versions of some packages: {names}. Another extension may have asked for the "
            f'installed ones; to change them, run "{sys.executable}" -m pip install '
            + " ".join(f'"{wish}"' for wish, _ in wrong)
        )
    return _import_problem()


@functools.cache
def _import_problem() -> str | None:
    """Imported once, in the thread that asks first: the main one, as a rule.

    Never in the background: a package that puts a lazy stand-in for itself into ``sys.modules``, as diffusers and
    transformers do, fails in every thread that imports it at the same time, which may be another extension's.
    """
    try:
        import_networks()
        from transformers import CLIPTokenizer  # noqa: F401
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything while it is imported
        reason = " ".join(str(error).split())[:300]
        return f"diffusers is installed but cannot be imported ({type(error).__name__}: {reason}). {remedy()}"
    return None


def import_networks() -> None:
    """Import what the models are built of, which takes seconds, at a moment of the caller's choice."""
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModelWithProjection  # noqa: F401


def problem_after(error: Exception) -> str:
    """Why something of ours failed, as a sentence: packages first, because they are the usual reason."""
    if (known := problem()) is not None:
        return known
    if isinstance(error, UserError):
        return str(error)
    return f"The LoRA trainer could not start ({type(error).__name__}: {error}). The console has the details."


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Which package the command line lacks, and how to get it; None when it is a module of our own, which is a bug."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "lora_trainer"):
        return None
    project = Path(__file__).resolve().parents[1]
    return f'{package} is not installed. Install what the trainer needs: "{sys.executable}" -m pip install "{project}"'


def remedy() -> str:
    return (
        "Stop the WebUI and run install.py of this extension with the WebUI's own Python "
        f'("{sys.executable}" install.py), which changes no other package; then start the WebUI again.'
    )
