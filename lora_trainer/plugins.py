"""Optimizers, schedulers, losses, augmentations, regularisers, captioners and families from outside of the package.

A plug-in is a Python file (or folder with ``__init__.py``), or an installed package with an entry point in the group
``lora_trainer.plugins``. When it is imported it calls ``register``. Its code runs with the trainer's rights, so that
files are loaded only where the person who runs the trainer names them: in a YAML file on the command line, or in the
environment variable LORA_TRAINER_PLUGINS. What comes over HTTP is never loaded.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError

GROUP = "lora_trainer.plugins"
"""Of entry points."""
VARIABLE = "LORA_TRAINER_PLUGINS"
"""Environment variable with paths of plug-ins, separated as PATH is."""

KINDS = {
    "optimizer": "(param_groups, lr, **optimizer_args) -> torch.optim.Optimizer",
    "scheduler": "(step, total_steps, config) -> factor of the learning rate",
    "loss": "(difference (B, C, h, w), c (B, 1, 1, 1)) -> (B, C, h, w)",
    "augmentation": "(PIL image, random.Random) -> PIL image of the same size",
    "regulariser": "(AdapterSet) -> scalar tensor, added to the loss of each step",
    "captioner": "a captioning.base.Kind",
    "family": "a models.family.Family",
}
"""What a plug-in can register, and what is called or used."""


@dataclass(frozen=True)
class Plugin:
    """One registered name. source: the file or package that registered it. fingerprint: changes when its code does."""

    kind: str
    name: str
    value: Any
    source: str
    fingerprint: str


_registered: dict[tuple[str, str], Plugin] = {}
_loaded: dict[str, str] = {}  # source -> fingerprint
_loading: ContextVar[tuple[str, str] | None] = ContextVar("loading", default=None)
_configured = False
_lock = threading.RLock()


def register(kind: str, name: str, value: Any = None) -> Any:
    """Register ``value`` under ``name``; without a value, a decorator for a function or class.

    Raises:
        ValueError: an unknown kind, or a name that another plug-in has.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind of plug-in {kind!r}; known are {', '.join(KINDS)}.")
    if value is None:
        return lambda decorated: register(kind, name, decorated)
    source, fingerprint = _loading.get() or _caller(value)
    with _lock:
        other = _registered.get((kind, name))
        if other is not None and other.source != source:
            raise ValueError(f"{other.source} has registered a {kind} named {name!r} already.")
        _registered[kind, name] = Plugin(kind, name, value, source, fingerprint)
    return value


def names(kind: str) -> list[str]:
    """Registered names of a kind, those of the configured plug-ins included. Raises UserError when one is broken."""
    load_configured()
    return [name for known, name in _registered if known == kind]


def get(kind: str, name: str) -> Any:
    """What is registered under a name, None when nothing is."""
    plugin = _find(kind, name)
    return None if plugin is None else plugin.value


def need(kind: str, name: str, field: str, known: Iterable[str] = ()) -> Any:
    """What is registered under a name.

    Raises:
        UserError: nothing is. known: the names that exist without plug-ins, for the message.
    """
    value = get(kind, name)
    if value is None:
        known = [*known, *names(kind)]
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}." if known else None
        raise UserError(
            f"There is no {kind} {name!r}.", field=field, remedy=remedy or "Name its file in plugins, or install it."
        )
    return value


def fingerprint(kind: str, name: str) -> str | None:
    """Of the code that registered a name; None for what is part of the package."""
    plugin = _find(kind, name)
    return None if plugin is None else plugin.fingerprint


def marked(key: str, kind: str, name: str) -> str:
    """``key`` with the fingerprint of the plug-in that has the name; unchanged for what is part of the package."""
    mark = fingerprint(kind, name)
    return key if mark is None else f"{key}:{mark}"


def load(paths: Iterable[str | Path]) -> None:
    """Import these files or folders; one that changed since it was imported is imported again.

    Raises:
        UserError: naming the first that cannot be imported, and why.
    """
    load_configured()
    for path in paths:
        _load_path(Path(path).expanduser())


def load_configured() -> None:
    """Import installed plug-ins and those of LORA_TRAINER_PLUGINS, once. Raises UserError as ``load`` does."""
    global _configured
    with _lock:
        if _configured:
            return
        for point in _entry_points():
            _load_entry_point(point)
        for text in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
            _load_path(Path(text).expanduser())
        _configured = True


def is_loaded(path: str | Path) -> bool:
    """Whether a file or folder was loaded by whoever runs the trainer."""
    load_configured()
    try:
        return str(Path(path).expanduser().resolve()) in _loaded
    except (OSError, RuntimeError):  # the home of nobody, or links in a circle
        return False


def _find(kind: str, name: str) -> Plugin | None:
    load_configured()
    return _registered.get((kind, name))


def _load_path(path: Path) -> None:
    path = path.resolve()
    start = path / "__init__.py" if path.is_dir() else path
    if not start.is_file():
        remedy = "Give the path of a Python file, or of a folder with __init__.py."
        raise UserError(f"There is no plug-in {path}.", field="plugins", remedy=remedy)
    mark, source = _digest(path), str(path)
    with _lock:
        if _loaded.get(source) == mark:
            return
        name = f"lora_trainer_plugin_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
        locations = [str(path)] if path.is_dir() else None
        spec = importlib.util.spec_from_file_location(name, start, submodule_search_locations=locations)
        if spec is None or spec.loader is None:
            raise UserError(f"{path.name} is not a Python file.", field="plugins", remedy="Its name must end in .py.")
        module = importlib.util.module_from_spec(spec)
        with _importing(source, mark):
            for loaded in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
                del sys.modules[loaded]
            sys.modules[name] = module
            spec.loader.exec_module(module)


def _load_entry_point(point: metadata.EntryPoint) -> None:
    distribution = getattr(point, "dist", None)
    version = f"{distribution.name} {distribution.version}" if distribution else point.value
    source = f"the installed package {version}"
    with _importing(source, hashlib.sha256(f"{version} {point.value}".encode() + _code_of(point)).hexdigest()):
        loaded = point.load()
        if callable(loaded):  # a function that registers; a module has done so when it was imported
            loaded()


def _code_of(point: metadata.EntryPoint) -> bytes:
    """All modules of the package that the entry point names: one that is edited where it lies keeps its version."""
    try:
        name, spec = "", None
        for part in point.value.partition(":")[0].strip().split("."):
            name = f"{name}.{part}".lstrip(".")
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin:  # a folder without __init__.py is shared by several packages
                break
        if spec is None or not spec.origin:
            return b""
        start = Path(spec.origin)
        return _digest(start.parent if spec.submodule_search_locations else start).encode()
    except (ImportError, OSError, ValueError):
        return b""  # loading says what is wrong


def _digest(path: Path) -> str:
    """Of a Python file, or of all Python files in a folder, with their names."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        digest.update(file.relative_to(path.parent).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _entry_points() -> Iterable[metadata.EntryPoint]:
    return metadata.entry_points(group=GROUP)


@contextmanager
def _importing(source: str, mark: str) -> Iterator[None]:
    """What registers inside belongs to ``source``; after an error nothing of it stays registered."""
    before = {key: plugin for key, plugin in _registered.items() if plugin.source != source}
    former = dict(_registered)
    _registered.clear()
    _registered.update(before)
    token = _loading.set((source, mark))
    try:
        yield
    except Exception as error:
        _registered.clear()
        _registered.update(former)
        raise UserError(
            f"The plug-in {source} cannot be loaded: {_where(error, source)}{type(error).__name__}: {error}",
            field="plugins",
            remedy="Correct it, or remove it.",
        ) from error
    finally:
        _loading.reset(token)
    _loaded[source] = mark


def _where(error: BaseException, source: str) -> str:
    """ "line 3: " of the plug-in's file, where the error says it."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"line {error.lineno}: "
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(source):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"line {line}: " if line else ""


def _caller(value: Any) -> tuple[str, str]:
    """Source and fingerprint of what is registered by a program that imports the package."""
    name = getattr(value, "__module__", None) or type(value).__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or not Path(file).is_file():
        return name, hashlib.sha256(name.encode()).hexdigest()
    return str(Path(file).resolve()), hashlib.sha256(Path(file).read_bytes()).hexdigest()
