"""Seconds of work as they would be if no other program used the processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_TASKS = Path("/proc/self/task")
_SHORT = 0.05  # seconds; over less, the processor's own clock is too coarse to compare with


@dataclass(frozen=True)
class Usage:
    """Of this process since its start, in seconds over all threads.

    ran: on a processor. waited: ready to run while others had it; None where the system does not say.
    """

    ran: float
    waited: float | None


def usage() -> Usage:
    counts = list(_schedstats())
    if not counts:
        return Usage(time.process_time(), None)
    return Usage(sum(ran for ran, _ in counts) / 1e9, sum(waited for _, waited in counts) / 1e9)


def _schedstats() -> Iterator[tuple[int, int]]:
    """Nanoseconds that each thread ran and waited, as Linux counts them; nothing elsewhere."""
    try:
        for task in _TASKS.iterdir():
            ran, waited, _ = (task / "schedstat").read_text(encoding="ascii").split()
            yield int(ran), int(waited)
    except (OSError, ValueError):  # another system, or a thread that has just ended
        return


class Stopwatch:
    """Measures laps. A lap under load is shortened by what other programs took meanwhile."""

    _best_rate = 0.0  # processors that this process used at its best while it computed

    def __init__(self, clock: Callable[[], float] = time.perf_counter, used: Callable[[], Usage] = usage):
        self._clock, self._used = clock, used
        self._time, self._usage = clock(), used()

    def lap(self, *, computing: bool = False) -> float:
        """Seconds since the last lap. computing: in this lap the process did nothing but compute, which tells of other
        programs where the system does not say how long they had the processor."""
        now, used = self._clock(), self._used()
        wall, ran = now - self._time, max(0.0, used.ran - self._usage.ran)
        before, self._time, self._usage = self._usage, now, used
        if used.waited is None or before.waited is None:
            return self._by_rate(wall, ran) if computing else wall
        waited = max(0.0, used.waited - before.waited)
        ready = ran + waited
        return wall - min(wall, ready) * waited / ready if ready else wall

    @staticmethod
    def _by_rate(wall: float, ran: float) -> float:
        if wall < _SHORT:
            return wall
        Stopwatch._best_rate = max(Stopwatch._best_rate, ran / wall)
        return wall * min(1.0, ran / wall / Stopwatch._best_rate) if ran else wall
