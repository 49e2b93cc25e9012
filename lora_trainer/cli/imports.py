"""How a command imports torch and what comes with it."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Imports without Python's garbage collector, which looks through everything again and again while three thousand
    modules come in, and once more as the process ends: a third of the time of a run of one step.

    What is imported stays until the end, so it is never looked through again. Where torch is there already, somebody
    else's process decides about that, and nothing changes.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)
