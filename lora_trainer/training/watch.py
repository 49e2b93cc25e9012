"""Who of a run's processes still lives, and whether it gets on.

Each process has a thread that says "I am here" in the store that the launcher keeps, and reads what the others say. A
collective that waits for a process that is gone can wait for half an hour, and nothing in Python can interrupt it; so
where the run itself does not end in time, this thread ends the process.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lora_trainer.errors import RankFailedError

BEAT_SECONDS = 1.0
_NOTHING = "-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """In seconds. silence: without a sign of life a process counts as dead. progress: inside a turn a process makes
    some at least so often, or in five times the longest time that it has needed before. leaving: for the run to end by
    itself, before it is ended."""

    silence: float = 15.0
    progress: float = 45.0
    leaving: float = 8.0

    @classmethod
    def from_environment(cls) -> Limits:
        """``LORA_TRAINER_PATIENCE``: other seconds without progress, where a device or a disk is slow."""
        patience = float(os.environ.get("LORA_TRAINER_PATIENCE") or cls.progress)
        return cls(min(cls.silence, patience / 3), patience, min(cls.leaving, patience / 3))


class Watch:
    """Of one process. names: "rank 1 on HOST" of each. connect: opens a connection to the store of its own, as one
    that waits for an answer is not to be shared between threads.

    problem: why the run cannot go on, and the exit code that says so; None while it can.
    """

    def __init__(self, rank: int, names: list[str], connect: Callable[[], Any], limits: Limits):
        self.problem: RankFailedError | None = None
        self.on_stop: Callable[[], None] = lambda: None
        self._rank, self._names, self._limits = rank, names, limits
        self._store = connect()
        self._stop_wanted, self._over = threading.Event(), threading.Event()
        self._found = threading.Event()  # a problem
        self._guarded = False  # progress is expected
        self._turn_since: float | None = None  # of the last progress inside the turn in hand
        self._longest = 0.0  # between two signs of progress inside a turn
        self._extra: float | None = 0.0  # seconds more; None: as long as it likes
        self._waiting = 0  # for the others
        now = time.monotonic()
        self._round_at = now
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._store.set(_beat(rank), "0")
        self._thread = threading.Thread(target=self._look, name="lora-trainer-watch", daemon=True)
        self._last_resort = threading.Thread(target=self._end_in_time, name="lora-trainer-end", daemon=True)

    def start(self) -> None:
        """To be called when all processes have made theirs."""
        self._thread.start()
        self._last_resort.start()

    # -- said by the run

    def ask_to_stop(self) -> None:
        """All processes' runs are to stop; safe in a signal handler."""
        self._stop_wanted.set()

    def fail(self, sentence: str, code: int = 1) -> None:
        """A process fails, and the others are to know why, unless another one has failed before."""
        told = self._store.compare_set("failed", "", f"{code} {sentence}")
        self._hear(told)

    def leave(self) -> None:
        """The run is over: silence is no longer a sign of death."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(2 * BEAT_SECONDS)

    def guard(self) -> None:
        self._guarded = True

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        before, self._turn_since = self._turn_since, time.monotonic()
        try:
            yield
        finally:
            self.progress()
            self._turn_since = before and time.monotonic()

    def progress(self) -> None:
        now = time.monotonic()
        if self._turn_since is not None:
            if self._extra == 0:
                self._longest = max(self._longest, now - self._turn_since)
            self._turn_since = now

    @contextmanager
    def unhurried(self, seconds: float | None) -> Iterator[None]:
        before, self._extra = self._extra, seconds
        try:
            yield
        finally:
            self.progress()
            self._extra = before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this process waits for others, and whether they get on is their affair."""
        self.progress()
        self._waiting += 1
        try:
            yield
        finally:
            if self._turn_since is not None:
                self._turn_since = time.monotonic()
            self._waiting -= 1

    def verdict(self) -> RankFailedError | None:
        """What is wrong, when something is: it may take as long as a silence does to be seen."""
        self._found.wait(self._limits.silence + 4 * BEAT_SECONDS)
        return self.problem

    # -- the threads

    def _look(self) -> None:
        beat, asked = 0, False
        while not self._over.is_set():
            try:
                beat += 1
                self._store.set(_beat(self._rank), str(beat))
                if self._stop_wanted.is_set() and not asked:
                    asked = True
                    self._store.set("stop", "1")
                if peek(self._store, "stop") is not None:
                    self.on_stop()
                if (told := peek(self._store, "failed")) is not None:
                    self._hear(told)
                    return
                self._judge_others()
                self._judge_myself()
                self._round_at = time.monotonic()
            except RuntimeError as error:  # of the connection: how long it lasts decides
                log.debug("The store does not answer: %s", error)
            self._over.wait(BEAT_SECONDS)
        with suppress(RuntimeError):  # whoever keeps the store has left before
            self._store.set(_beat(self._rank), "left")

    def _judge_others(self) -> None:
        now = time.monotonic()
        for rank, name in enumerate(self._names):
            if rank == self._rank:
                continue
            beat = self._store.get(_beat(rank))
            before, since = self._seen.get(rank, (b"", now))
            if beat != before or beat == b"left":
                self._seen[rank] = beat, now
            elif now - since > self._limits.silence:
                self.fail(f"{name} has given no sign of life for {now - since:.0f} seconds.")

    def _judge_myself(self) -> None:
        since, extra = self._turn_since, self._extra
        if not self._guarded or self._waiting or since is None or extra is None:
            return
        stuck = time.monotonic() - since
        if stuck > max(self._limits.progress, 5 * self._longest) + extra:
            self.fail(
                f"{self._names[self._rank]} has made no progress for {stuck:.0f} seconds. If it is only slow, raise "
                f"LORA_TRAINER_PATIENCE (now {self._limits.progress:g})."
            )

    def _hear(self, told: bytes) -> None:
        code, _, sentence = told.decode("utf-8", "replace").partition(" ")
        self.problem = RankFailedError(sentence, int(code))
        self._found.set()

    def _end_in_time(self) -> None:
        """Ends the process where the run does not, and where the store is out of reach."""
        while not self._over.wait(BEAT_SECONDS / 2):
            if self.problem is not None:
                if self._over.wait(self._limits.leaving):
                    return
                break
            if time.monotonic() - self._round_at > self._limits.silence + 2 * BEAT_SECONDS:
                me, leader = self._names[self._rank], self._names[0]
                self.problem = RankFailedError(f"{me} has lost the connection to {leader} and to the launcher there.")
                self._found.set()
                break
        if self.problem is None:
            return
        print(f"error: {self.problem}", file=sys.stderr, flush=True)
        os._exit(self.problem.code)


def peek(store: Any, key: str) -> bytes | None:
    """What is there under a key, without waiting for it. Not every torch has ``Store.check``."""
    found = store.compare_set(key, _NOTHING, _NOTHING)
    return None if found == _NOTHING.encode() else found


def _beat(rank: int) -> str:
    return f"beat/{rank}"
