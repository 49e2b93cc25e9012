"""Taking turns with a host that has one lock for all work on its model."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

ROOM_SECONDS = 0.01
"""Left free after every turn. A waiter that is woken needs a moment to take the lock: without the gap one was seen
to starve for 60 turns, with 10 ms never."""
PATIENCE_SECONDS = 0.1
"""How long somebody who was seen waiting may need to take the lock before we ask again."""


class Lock(Protocol):
    """What the hosts call ``queue_lock``: not re-entrant, without owner and timeout."""

    def acquire(self, blocking: bool = True) -> Any: ...

    def release(self) -> Any: ...


class Turns:
    """The trainer's side of a host's lock. One object per lock, whoever asks.

    waiting: whether somebody is in the queue for the lock, as far as the host tells.
    taken: whether somebody has it right now, as far as it tells.
    """

    def __init__(self, lock: Lock, waiting: Callable[[], bool], taken: Callable[[], bool]):
        self.lock, self._waiting, self._taken = lock, waiting, taken
        self._owner: int | None = None  # thread that has the lock through us
        self._open_at = 0.0

    @property
    def somebody_waits(self) -> bool:
        """Whether the host has work queued: then memory is worth freeing before the turn ends."""
        return self._waiting()

    @contextmanager
    def take(self) -> Iterator[None]:
        """The host is ours inside; random number generators are afterwards as they were before.

        Re-entrant in its own thread: within ``hold``, or another turn, it costs nothing.
        """
        if self._owner == threading.get_ident():
            yield
            return
        self._acquire()
        with self._ours():
            yield

    hold = take
    """The same, by the name for a whole run: turns taken inside it are then free."""

    @contextmanager
    def spare(self) -> Iterator[bool]:
        """A turn if it is to be had at once, else False: nobody is waited for, and nobody waits for long."""
        if self._waiting() or not self.lock.acquire(blocking=False):
            yield False
            return
        with self._ours():
            yield True

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Within ``hold`` and between two turns: the host is its own inside. Elsewhere it is anyway."""
        if self._owner != threading.get_ident():
            yield
            return
        self._release()
        try:
            yield
        finally:
            self._acquire()

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """Inside a lock that was just taken, and released at the end."""
        self._owner = threading.get_ident()
        try:
            with rng_kept():
                yield
        finally:
            self._release()

    def _acquire(self) -> None:
        self._leave_room()
        self.lock.acquire()
        self._owner = threading.get_ident()

    def _release(self) -> None:
        self._owner = None
        somebody_waits = self._waiting()
        self.lock.release()
        if somebody_waits:
            self._let_in()
        self._open_at = time.monotonic() + ROOM_SECONDS

    def _let_in(self) -> None:
        """Wait until whoever was waiting has the lock; woken threads can be slow on a busy machine."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and not self._taken():
            time.sleep(0.001)

    def _leave_room(self) -> None:
        remaining = self._open_at - time.monotonic()
        if remaining > 0:
            time.sleep(remaining)


@contextmanager
def rng_kept() -> Iterator[None]:
    """The process-wide random number generators are after the block as they were before it."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Only where CUDA is in use already: asking would initialize it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
