from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import torch

from lora_trainer.host.turns import Turns, rng_kept
from tests.host.a1111.fake import QueueLock


@pytest.fixture
def lock() -> QueueLock:
    return QueueLock()


@pytest.fixture
def turns(lock) -> Turns:
    return Turns(lock, waiting=lambda: bool(lock._pending_threads), taken=lambda: lock._lock.locked())


def test_a_waiting_generation_goes_first_every_time(turns, lock):
    """While turns follow each other without a pause, nobody waits for more than the turn under way."""
    over, turns_taken = threading.Event(), [0]

    def train() -> None:
        while not over.is_set():
            with turns.take():
                time.sleep(0.004)
                turns_taken[0] += 1

    trainer = threading.Thread(target=train)
    trainer.start()
    passed = []
    for _ in range(30):
        before = turns_taken[0]
        with lock:
            passed.append(turns_taken[0] - before)
            time.sleep(0.005)
        time.sleep(0.03)
    over.set()
    trainer.join(10)
    assert not trainer.is_alive()
    assert max(passed) <= 2, f"turns taken while somebody waited: {passed}"
    assert turns_taken[0] >= 15, "training goes on"


def test_several_waiting_generations_all_get_their_turn(turns, lock):
    served = []

    at_the_door = [threading.Event() for _ in range(4)]

    def generate(number: int) -> None:
        at_the_door[number].set()
        with lock:
            served.append(number)
            time.sleep(0.005)

    with turns.take():
        threads = [threading.Thread(target=generate, args=(number,)) for number in range(4)]
        for number, thread in enumerate(threads):
            thread.start()
            assert at_the_door[number].wait(10)
            time.sleep(0.02)
        assert turns.somebody_waits
    for _ in range(8):
        with turns.take():
            pass
    for thread in threads:
        thread.join(10)
    assert sorted(served) == [0, 1, 2, 3]


def test_a_turn_within_a_turn_of_the_same_thread_is_free(turns, lock):
    with turns.hold():
        with turns.take():
            assert lock._lock.locked()
        assert lock._lock.locked()
    assert not lock._lock.locked()


def test_what_is_held_can_be_lent_out_for_a_while(turns, lock):
    with turns.rest():
        assert not lock._lock.locked()
    with turns.hold():
        with pytest.raises(ZeroDivisionError), turns.rest():
            assert not lock._lock.locked()
            with lock:
                pass
            raise ZeroDivisionError
        assert lock._lock.locked()
        with turns.take():
            assert lock._lock.locked()
    assert not lock._lock.locked()


def test_another_thread_waits_for_the_turn(turns):
    entered = threading.Event()

    def other() -> None:
        with turns.take():
            entered.set()

    with turns.take():
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(5)
    thread.join(5)


def test_an_error_frees_the_lock(turns, lock):
    with pytest.raises(ZeroDivisionError), turns.take():
        raise ZeroDivisionError
    assert not lock._lock.locked()


def test_random_numbers_go_on_as_if_nothing_had_been():
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), rng_kept():
        draw()
        raise ZeroDivisionError
    assert draw() == expected
