"""Streams for the pretended GPU: a copy on a side stream happens as late as it may, so a wait that lacks is seen.

It is done when the stream that computes waits for it; if that never waits, it computes with what was there before. A
copy that was not made to wait for what computes fails at once: it could overwrite what is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from tests import devices


class Stream:
    def __init__(self, device: Any = None):
        self.pending: list[Callable[[], Any]] = []
        self.done = 0
        self.after_computing = False

    def wait_stream(self, other: Stream) -> None:
        other.run(other.done + len(other.pending))
        self.after_computing = True

    def wait_event(self, event: Event) -> None:
        if event.stream is not None:
            event.stream.run(event.at)

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.pending.pop(0)()


class Event:
    stream: Stream | None = None
    at = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.at = stream, stream.done + len(stream.pending)


@contextmanager
def pretended_streams() -> Iterator[None]:
    """Inside ``pretended_gpu``."""
    computing = Stream()
    current = [computing]
    copied = devices._copied

    def copy(func: Any, target: Any, source: Any, non_blocking: bool = False) -> Any:
        stream = current[-1]
        if stream is computing:
            return copied(func, target, source, non_blocking)
        assert stream.after_computing, "what is overwritten may still be in use"
        assert non_blocking and getattr(source, "is_pinned_here", False), "the CPU would wait for this copy"
        stream.after_computing = False
        stream.pending.append(lambda: func(target.held, source))
        return target

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(devices, "_copied", copy))
        for name, value in {"Stream": Stream, "Event": Event, "stream": on}.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", lambda device=None: current[-1]))
        yield
