"""Encoding shared out among the processes of a run, by way of the folder in which they keep what they encode."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from lora_trainer.dataset.cache import TensorCache
from lora_trainer.training.ranks import Ranks

Item = TypeVar("Item")


def shared_out(
    items: Sequence[Item], encode: Callable[[Sequence[Item]], bool], cache: TensorCache, ranks: Ranks
) -> bool:
    """``encode(items)``, which leaves out what the cache has: each process encodes some, then what is missing still.

    Where the processes do not all see one folder, those that do share the work. Something is missing where a file
    could not be written, or has not come through the network yet. Returns False when any of them was stopped.
    """
    if ranks.size == 1:
        return encode(items)
    share = _share(cache.directory, ranks)
    for some in (items[share], items):
        with ranks.working():
            done = encode(some)
        if not all(ranks.meet(done)):
            return False
        cache.refresh()
    return True


def _share(folder: Path, ranks: Ranks) -> slice:
    """Of this process, among those that see the same folder."""
    token = ranks.first(lambda: secrets.token_hex(8))
    marks = [folder / f".{token}-{rank}" for rank in range(ranks.size)]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        marks[ranks.rank].touch()
    ranks.meet(None)
    seen = [rank for rank, mark in enumerate(marks) if rank == ranks.rank or mark.exists()]
    ranks.meet(None)
    with suppress(OSError):
        marks[ranks.rank].unlink(missing_ok=True)
    return slice(seen.index(ranks.rank), None, len(seen))
