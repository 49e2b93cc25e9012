"""Writing files so that nobody ever sees half of one, and naming them safely."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_trainer.errors import UserError

_WINDOWS_RESERVED = re.compile(r"(?i)^(con|prn|aux|nul|com\d|lpt\d)(\.|$)")
_WINDOWS = sys.platform == "win32"
_TRIES, _PAUSE = 10, 0.05  # seconds
_SYSTEM = (
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr/bin",
    "/usr/include", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/sbin", "/var/log", "/var/mail",
    "/var/spool", "/System", "/Library", "/private/etc",
)  # fmt: skip
_NOT_SYSTEM = ("/dev/shm", "/run/media", "/run/user", "/System/Volumes")  # where disks and shares are mounted
_WHOLE = ("/home", "/private", "/private/var", "/root", "/usr", "/var", "/Users", "/Volumes", "C:\\Users")
_KEYS = (
    ".aws", ".azure", ".config", ".docker", ".git-credentials", ".gnupg", ".kube", ".mozilla", ".netrc", ".npmrc",
    ".password-store", ".pki", ".pypirc", ".ssh", ".thunderbird", ".local/share/keyrings", ".local/share/kwalletd",
    "library/keychains",
)  # fmt: skip
_NOT_KEYS = (".config/stabilitymatrix",)  # which keeps WebUIs and pictures there
_UNSAFE = re.compile(r'[\x00-\x1f<>:"/\\|?*]')


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Lend a temporary path in the folder of ``path``; on success it replaces ``path``, on error it is removed.

    The data is flushed to the disk before the rename, so that a power cut leaves either the old file or the new one;
    not where ``durable`` is False, as for what is made again when it is needed.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.tmp")
        # Made with the user's umask, so that a WebUI that runs as another user can read the file.
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary = unfinished
        yield temporary
        if durable:
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
        _replace(temporary, path)
        temporary = None
    except OSError as error:
        in_use = _WINDOWS and isinstance(error, PermissionError)
        raise UserError(
            f"{path.name} could not be written: {error.strerror or error}.",
            remedy="Close what has it open." if in_use else "Free some space or choose another folder.",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    """``os.replace``, also where Windows refuses it because somebody has ``target`` open.

    Who reads it, or looks for viruses, is done in a moment. A LoRA that a WebUI has mapped into memory stays so, but
    can be renamed: it goes out of the way, and is deleted when something is next written under its name.
    """
    if not _WINDOWS:
        return os.replace(source, target)
    for left in target.parent.glob(f".{glob.escape(target.name[:40])}.*.old"):
        with suppress(OSError):
            left.unlink()
    for attempt in range(_TRIES):
        try:
            return os.replace(source, target)
        except PermissionError:
            if attempt == _TRIES - 1 and not target.is_file():
                raise
            time.sleep(_PAUSE)
    aside = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.old")
    os.rename(target, aside)
    try:
        os.replace(source, target)
    except OSError:
        os.rename(aside, target)
        raise
    with suppress(OSError):
        aside.unlink()


def atomic_write(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Replace ``path`` with ``data`` (text as UTF-8) in one step. Raises ``UserError`` as ``atomic_path`` does."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of the system, of SQLite or of safetensors means that there is no room left."""
    return getattr(error, "errno", None) == errno.ENOSPC or any(
        words in str(error) for words in ("database or disk is full", "No space left on device")
    )


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _shares_config(path: Path) -> bool:
    """Whether a path lies in the folder of ~/.config in which this program itself was installed, with its WebUI."""
    own = Path(__file__).resolve()
    config = next((folder for folder in own.parents if folder.parent.name == ".config"), None)
    return config is not None and config in (path, *path.parents)


def is_of_the_system(path: Path) -> bool:
    """Whether a resolved path is a whole disk, a folder in which other people's files lie, or one of the operating
    system or of keys: nobody keeps pictures or models there, and nothing of it is to be read or shown."""
    whole = "/".join(part.lower() for part in (*path.parts, ""))
    kept = any(f"/{folder}/" in whole for folder in _NOT_KEYS) or _shares_config(path)
    if path.parent == path or any(f"/{key}/" in whole for key in _KEYS if not (kept and key == ".config")):
        return True
    folders = [os.environ[name] for name in ("SystemRoot", "ProgramData") if name in os.environ] if _WINDOWS else ()
    inside = [Path(folder) for folder in (*_SYSTEM, *folders)]
    lent = any(Path(folder) in (path, *path.parents) for folder in _NOT_SYSTEM)
    return str(path) in _WHOLE or (not lent and any(folder in (path, *path.parents) for folder in inside))


def safe_name_problem(name: str) -> str | None:
    """Why ``name`` cannot be a file's stem on every system, or None when it can. Any script is welcome."""
    if not name.strip():
        return "it is empty"
    if bad := _UNSAFE.search(name):
        return f"it contains {bad.group()!r}, which file names cannot"
    if name != name.strip() or name.endswith(".") or name.startswith("."):
        return "it starts or ends with a dot or a space"
    if _WINDOWS_RESERVED.match(name):
        return "Windows reserves it"
    if len(name.encode("utf-8")) > 180:
        return "it is longer than 180 bytes"
    return None
