"""The captioners by name. A newer vision-language model joins by adding its ``Kind`` here, or as a plug-in."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_trainer import plugins
from lora_trainer.captioning import blip, clip, tagger
from lora_trainer.captioning.base import (
    Captioner,
    Combined,
    HostCaptioner,
    Kind,
    Settings,
    UnavailableError,
)
from lora_trainer.captioning.weights import download, find
from lora_trainer.errors import UserError

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("blip", "BLIP, a sentence", blip.WEIGHTS, blip.Blip, ("transformers",)),
        Kind("tagger", "WD14 tagger, tags", tagger.WEIGHTS, tagger.Tagger, ("onnxruntime",)),
        Kind("clip", "CLIP, phrases on medium, light and place", clip.WEIGHTS, clip.ClipRanking, ("transformers",)),
    )
}
AUTO = "auto"
"""The first captioner of ``KINDS`` whose weights are here."""


def kinds() -> dict[str, Kind]:
    """Every captioner by name, plug-ins included."""
    return KINDS | {name: plugins.get("captioner", name) for name in plugins.names("captioner")}


@dataclass(frozen=True)
class Sources:
    """Where captioners come from. folders: each with ``<name>/`` inside. given: the folder of the weights, for one
    captioner. download: fetch what is missing. host: the host's own captioners, which need no weights of ours."""

    folders: Sequence[Path] = ()
    given: Path | None = None
    download: bool = False
    host: Mapping[str, HostCaptioner] | None = None


@dataclass(frozen=True)
class Availability:
    name: str
    title: str
    problem: str | None = None
    remedy: str | None = None


def available(sources: Sources) -> list[Availability]:
    """Every captioner, and why those that cannot run here cannot."""
    rows = [Availability(name, one.title, one.problem, one.remedy) for name, one in (sources.host or {}).items()]
    for kind in kinds().values():
        try:
            _check_packages(kind)
            find(kind, sources.folders)
            rows.append(Availability(kind.name, kind.title))
        except UnavailableError as error:
            rows.append(Availability(kind.name, kind.title, error.message, error.remedy))
    return rows


def choose(name: str, sources: Sources) -> str:
    """The name of the captioner to use; ``auto`` is the first that can run here.

    Raises:
        UserError: no such captioner, or none can run here.
    """
    if name == AUTO:
        usable = [row.name for row in available(sources) if row.problem is None]
        if usable:
            return usable[0]
        lines = [f"{row.name}: {row.problem} {row.remedy}" for row in available(sources)]
        raise UnavailableError("No captioner can run here.\n" + "\n".join(lines), field="captioner")
    for part in name.split("+"):
        if part not in kinds() and part not in (sources.host or {}):
            known = ", ".join([*kinds(), *(sources.host or {})])
            raise UserError(f"There is no captioner {part!r}.", field="captioner",
                            remedy=f"One of {known}; several with +, such as blip+clip.")  # fmt: skip
    return name


def check_available(name: str, sources: Sources) -> None:
    """Raises UnavailableError when a captioner (a name that ``choose`` gave) lacks weights or a package."""
    for part in name.split("+"):
        if sources.host and part in sources.host:
            _check_host(sources.host[part])
            continue
        _check_packages(kinds()[part])
        find(kinds()[part], sources.folders, sources.given)


def open_captioner(name: str, settings: Settings, sources: Sources) -> Captioner:
    """Load a captioner, or several with ``+`` between their names; on a WebUI call it inside a turn.

    Raises:
        UnavailableError: weights or a package are missing; says what to do.
    """
    opened: list[Captioner] = []
    try:
        for part in choose(name, sources).split("+"):
            if sources.host and part in sources.host:
                _check_host(sources.host[part])
                opened.append(sources.host[part].open(settings))
                continue
            kind = kinds()[part]
            _check_packages(kind)
            opened.append(kind.load(_folder(kind, sources), settings))
    except BaseException:
        for captioner in opened:
            captioner.close()
        raise
    return opened[0] if len(opened) == 1 else Combined(opened)


def _folder(kind: Kind, sources: Sources) -> Path:
    try:
        return find(kind, sources.folders, sources.given)
    except UnavailableError:
        if not sources.download or sources.given is not None:
            raise
        return download(kind)


def _check_host(captioner: HostCaptioner) -> None:
    if captioner.problem is not None:
        raise UnavailableError(captioner.problem, field="captioner", remedy=captioner.remedy)


def _check_packages(kind: Kind) -> None:
    for package in kind.packages:
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(
                f"The captioner {kind.name} needs the package {package}, which is not installed.", field="captioner",
                remedy=f"Install it with: pip install {package}",
            )  # fmt: skip
