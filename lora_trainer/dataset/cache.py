"""Encoded pictures and captions on disk, named by everything that changes them.

A cache never decides the result: a file that is missing, cut off or damaged is made again before training, or, where
neither its size nor its time shows it, when the run that comes upon it is started again. What cannot be written (a full
disk, a folder without permission) is kept in memory for this run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import string
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer import plugins
from lora_trainer.dataset.samples import Sample, View
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

PIXELS_VERSION = 1
"""Raised whenever ``images.load_pixels`` gives other pixels for the same picture."""

_Stamp = tuple[int, int]  # size in bytes, time of the last change in nanoseconds
FRESH = 2 * 10**9
"""Nanoseconds in which a file may change twice without its time telling: a younger one is read."""
_DIGITS = frozenset(string.hexdigits)
PICTURES = ".pictures"  # the suffix of what was found of a folder's pictures, see ``known``
_SUFFIX = ".cache"  # not .safetensors: a WebUI that scans the folder must not take it for a model
_log = logging.getLogger(__name__)


class TensorCache:
    """Tensors by key in ``<directory>/<first 2 digits>/<key>.cache``; the bytes are those of a safetensors file.

    Safe for several writers, also of several processes: files appear whole, and equal keys mean equal content.
    on_warning: called once when the cache cannot be written. user: the folder with the pictures that are encoded; what
    it uses is listed, for ``forget``.
    """

    def __init__(
        self, directory: Path, on_warning: Callable[[str], None] = _log.warning, user: Path | None = None
    ):
        self.directory = Path(directory)
        self._root = str(self.directory)
        self._on_warning = on_warning
        self._list = None if user is None else list_of(self.directory, user)
        self._listed: dict[str, _Stamp | None] = {}
        self.refresh()
        self._unwritten: dict[str, dict[str, Tensor]] = {}
        self._writable = True

    def refresh(self) -> None:
        """Read the list again: other processes may have added to it, and what is listed need not be read."""
        if self._list is not None:
            self._listed.update(_entries(self._list))

    def path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}{_SUFFIX}"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key (on the CPU), or None if there is no intact file of it."""
        if key in self._unwritten:
            return dict(self._unwritten[key])
        tensors = self._intact(key)
        if (tensors is None) == (self._listed.get(key) is not None):  # it is listed as what it is not
            self._note(key, None if tensors is None else self._stamp(key))
        return tensors

    def _intact(self, key: str) -> dict[str, Tensor] | None:
        import safetensors.torch

        try:
            data = self.path(key).read_bytes()
            header, payload = _split(data)
            if header.pop("__metadata__", None) != {"sha256": _checksum(key, header, payload)}:
                return None
            return safetensors.torch.load(data)
        # Whatever is wrong with the file, its content can be made again.
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
            return None

    def __contains__(self, key: str) -> bool:
        """Whether ``get`` would answer: a damaged file is not contained.

        A file that has the size and the time that it had when it was last written, or read as a whole, is not read
        again. Damage that changes neither is found by ``get``, after which the file does not count any more.
        """
        if key in self._unwritten:
            return True
        known = self._listed.get(key)
        if known is None:
            return self.get(key) is not None
        stamp = self._stamp(key)
        if stamp is None:
            return False
        if stamp == known and time.time_ns() - stamp[1] > FRESH:
            return True
        found = self.get(key) is not None
        if found and stamp != known:
            self._note(key, stamp)
        return found

    contains = __contains__

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` under ``key``; on disk if it can be written, else in memory."""
        import safetensors.torch

        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        if self._writable:
            header, payload = _split(safetensors.torch.save(copies))
            header.pop("__metadata__", None)
            header["__metadata__"] = {"sha256": _checksum(key, header, payload)}
            try:
                # What a power cut spoils has another size or checksum, and is made again.
                atomic_write(self.path(key), _join(header, payload), durable=False)
                self._note(key, self._stamp(key))
                return
            except UserError as error:
                self._writable = False
                self._on_warning(f"The cache is kept in memory from now on: {error}")
        self._unwritten[key] = copies

    def _stamp(self, key: str) -> _Stamp | None:
        """Of a key's file as it is now; None where there is none."""
        try:
            found = os.stat(f"{self._root}/{key[:2]}/{key}{_SUFFIX}")
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    def _note(self, key: str, stamp: _Stamp | None) -> None:
        """List a key with the stamp of its intact file, or as one whose file is not known to be intact."""
        if self._list is None:
            return
        self._listed[key] = stamp
        with suppress(OSError):  # of a full disk: what is not listed stays
            self._list.parent.mkdir(parents=True, exist_ok=True)
            with self._list.open("a", encoding="ascii") as file:
                file.write(f"{key}\n" if stamp is None else f"{key} {stamp[0]} {stamp[1]}\n")


def forget(directory: Path, user: Path) -> None:
    """Delete what the pictures of a folder alone have used."""
    own = list_of(directory, user)
    others = set().union(*(_entries(one) for one in own.parent.glob("*.keys") if one != own))
    cache = TensorCache(directory)
    for key in _entries(own).keys() - others:
        with suppress(OSError):
            cache.path(key).unlink()
    for one in (own, own.with_suffix(PICTURES)):
        one.unlink(missing_ok=True)


def rename_user(directory: Path, old: Path, new: Path) -> None:
    """A folder with pictures has another name now."""
    of_old, of_new = list_of(directory, old), list_of(directory, new)
    for suffix in (of_old.suffix, PICTURES):
        with suppress(FileNotFoundError):
            of_old.with_suffix(suffix).replace(of_new.with_suffix(suffix))


def list_of(directory: Path, user: Path) -> Path:
    """The file that lists what the pictures of a folder use."""
    mark = hashlib.sha256(str(Path(user).absolute()).encode("utf-8", "surrogateescape")).hexdigest()
    return Path(directory) / "users" / f"{mark[:32]}.keys"


def _entries(listed: Path) -> dict[str, _Stamp | None]:
    """The keys of a list, each with what its last line says of it."""
    try:
        lines = listed.read_text("ascii").split("\n")
    except (OSError, ValueError):
        return {}
    entries: dict[str, _Stamp | None] = {}
    for line in lines:
        key, *numbers = line.split(" ")
        if len(key) == 64 and set(key) <= _DIGITS:
            whole = len(numbers) == 2 and all(number.isdigit() for number in numbers)
            entries[key] = (int(numbers[0]), int(numbers[1])) if whole else None
    return entries


def cache_key(**parts: Any) -> str:
    """SHA-256 (64 hexadecimal digits) of the canonical JSON of ``parts``: name everything that changes the result.

    Raises:
        TypeError: a part is nothing that JSON can write; ValueError: a part is not finite.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def latent_key(sample: Sample, view: View, vae_key: str, augmentations: Sequence[str] = ()) -> str:
    """The key of a picture's latents in one view: its content, size, crop, mirroring, and the VAE that encodes it.

    augmentations: the names in use; their code and the view's seed are part of the key.
    """
    augmented = {}
    if augmentations:
        used = [(name, plugins.fingerprint("augmentation", name)) for name in augmentations]
        augmented = {"augmentations": used, "seed": view.augmentation}
    placed = {} if view.place is None else {"place": view.place}
    return cache_key(
        kind="latents",
        version=PIXELS_VERSION,
        image=sample.digest,
        scaled=view.scaled,
        bucket=view.bucket,
        crop=view.crop,
        flip=view.flip,
        vae=vae_key,
        **augmented,
        **placed,
    )


def prompt_key(text: str, text_key: str, max_tokens: int, weighted: bool) -> str:
    """The key of an encoded caption: its text, the text encoders (and clip_skip), and how it is read."""
    return cache_key(kind="prompt", text=text, text_encoders=text_key, max_tokens=max_tokens, weighted=weighted)


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Safetensors bytes -> (header, tensor data). Raises ValueError or TypeError when they are none."""
    if len(data) < 8:
        raise ValueError("shorter than a header")
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise TypeError("the header is not an object")
    return header, data[8 + length :]


def _join(header: Mapping[str, Any], payload: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # tensor data start at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text + payload


def _checksum(key: str, header: Mapping[str, Any], payload: bytes) -> str:
    digest = hashlib.sha256(f"{key}\n{json.dumps(header, sort_keys=True)}\n".encode("ascii"))
    digest.update(payload)
    return digest.hexdigest()
