"""Seconds of work do not depend on what else runs on the machine."""

from __future__ import annotations

import multiprocessing
import sys
import time

import pytest

from lora_trainer.processor import Stopwatch, Usage, usage


def watch(*moments):
    """A stopwatch that sees these (time, usage) one after the other."""
    times, used = iter([time for time, _ in moments]), iter([usage for _, usage in moments])
    return Stopwatch(lambda: next(times), lambda: next(used))


@pytest.mark.parametrize(
    ("wall", "ran", "waited", "own"),
    [
        (10, 10, 0, 10),
        (10, 4, 6, 4),  # others had it for six seconds
        (10, 2, 3, 7),  # five of ten were spent on a disk
        (10, 10, 10, 5),  # two threads, each half of the time
        (10, 0, 0, 10),
    ],
)
def test_what_others_took_is_left_out(wall, ran, waited, own):
    assert watch((0, Usage(5, 1)), (wall, Usage(5 + ran, 1 + waited))).lap() == pytest.approx(own)


def test_each_lap_begins_where_the_last_one_ended():
    laps = watch((0, Usage(0, 0)), (10, Usage(4, 6)), (12, Usage(6, 6)))
    assert [laps.lap(), laps.lap()] == pytest.approx([4, 2])


def test_where_the_system_does_not_say_it_the_best_pace_of_the_process_counts(monkeypatch):
    monkeypatch.setattr(Stopwatch, "_best_rate", 0.0)
    laps = watch((0, Usage(0, None)), (10, Usage(20, None)), (20, Usage(25, None)), (30, Usage(26, None)))
    assert laps.lap(computing=True) == 10
    assert laps.lap(computing=True) == pytest.approx(2.5)
    assert laps.lap() == 10, "a lap that also read a disk is left as it is"


def _burn(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _work():
    for number in range(3_000_000):
        number * number


@pytest.mark.skipif(sys.platform != "linux" or usage().waited is None, reason="the system does not count waiting")
def test_under_load_a_lap_is_that_of_an_idle_processor():
    import os

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # so that two others fill it
    try:  # a machine that is shared changes its speed meanwhile: what is right is right once in six
        tries = (_alone_and_loaded() for _ in range(6))
        assert any(wall > 1.5 * own and own == pytest.approx(alone, rel=0.5) for alone, own, wall in tries)
    finally:
        os.sched_setaffinity(0, allowed)


def _alone_and_loaded():
    """Seconds of a lap on an idle processor, of one beside two others, and of that one on the wall."""
    _work()
    idle = Stopwatch()
    _work()
    alone = idle.lap()
    others = [multiprocessing.get_context("fork").Process(target=_burn, args=(5,)) for _ in range(2)]
    for other in others:
        other.start()
    loaded, started = Stopwatch(), time.perf_counter()
    _work()
    own, wall = loaded.lap(), time.perf_counter() - started
    for other in others:
        other.kill()
        other.join()
    return alone, own, wall
