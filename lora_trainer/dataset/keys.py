"""Keys of files: posix paths relative to a data folder, taken apart and compared."""

from __future__ import annotations

import unicodedata

CAPTION_ENDINGS = (".txt", ".caption")
"""Of text files beside pictures that hold their captions, without being asked for."""


def stem_of(key: str) -> str:
    """A key without the ending of its file."""
    dot = key.rfind(".")
    return key[:dot] if key.rfind("/") + 1 < dot < len(key) - 1 else key


def folder_of(key: str) -> str:
    """The part of a key that names its folder; "" for the data folder itself."""
    return key[: max(key.rfind("/"), 0)]


def name_of(key: str) -> str:
    """The part of a key that names its file."""
    return key[key.rfind("/") + 1 :]


def fold(key: str) -> str:
    """A key for comparing: in any case and any Unicode form."""
    return key.lower() if key.isascii() else unicodedata.normalize("NFC", key).casefold()
