"""Everything that a page needs to know, in one cheap look: only what changed since the last one."""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass

from lora_trainer.errors import Problem
from lora_trainer.host.base import Checkpoint
from lora_trainer.jobs.job import Event, Job, UnknownJobError
from lora_trainer.jobs.metrics import Points, has_grown, read_points
from lora_trainer.jobs.store import JobStore
from lora_trainer.jobs.worker import JobManager

_CURSOR = re.compile(r"([0-9a-z]{1,20})-(\d{1,18})-(\d{1,18})-(\d{1,18})-(\d{1,18})-(\d{1,18})-(\d{1,18})")
_RECENT_CHANGES = 100
_EVENTS = 100
_OFFERS = 5


@dataclass(frozen=True)
class Cursor:
    """Where a page is: the server's process, revision of the queue, last event, place in the running job's curve, and
    the base model that it knows to be selected.

    A page shows it again with the next request and never looks inside.
    """

    server: str = ""
    revision: int = 0
    event: int = 0
    job: int = 0
    attempt: int = 0
    offset: int = 0
    base: int = 0

    def __str__(self) -> str:
        places = (self.revision, self.event, self.job, self.attempt, self.offset, self.base)
        return "-".join([self.server, *map(str, places)])

    @classmethod
    def parse(cls, text: str | None) -> Cursor:
        """A cursor as it was given out; anything else is the beginning."""
        match = _CURSOR.fullmatch(text or "")
        return cls(match[1], *(int(part) for part in match.groups()[1:])) if match else cls()


@dataclass(frozen=True)
class Snapshot:
    """cursor: to be shown with the next request. unchanged: nothing below differs from the last answer (all empty).
    running: the job in hand, if any; queue: those that wait, in order; changed: jobs over that changed since.
    interrupted: jobs that were cut off as a server ended, newest first; they wait for a person.
    base: the host's selected base model. metrics: new points of ``metrics_job``'s curve. events: since the last look.
    trouble: why nothing trains here.
    """

    cursor: str
    unchanged: bool
    running: Job | None = None
    queue: tuple[Job, ...] = ()
    changed: tuple[Job, ...] = ()
    interrupted: tuple[Job, ...] = ()
    base: Checkpoint | None = None
    metrics: Points | None = None
    metrics_job: int | None = None
    events: tuple[Event, ...] = ()
    counts: dict[str, int] | None = None
    trouble: Problem | None = None


def look(manager: JobManager, since: str | None = None) -> Snapshot:
    """What changed since the cursor ``since``. When nothing did, one row of the database and one file size are read."""
    store = manager.store
    server = _server(manager.trouble)
    last = Cursor.parse(since)
    if last.server != server:
        last = Cursor(server)
    revision = store.revision()
    curve = manager.results.curve(last.job) if last.job else None
    base = manager.host.selected()
    base_mark = zlib.crc32(repr(base).encode())
    same = (revision, base_mark) == (last.revision, last.base)
    if since and same and (curve is None or not has_grown(curve, last.offset)):
        return Snapshot(str(last), True)
    known = last.revision if last.revision <= revision else 0  # the database was replaced
    here = store.jobs(("running", "paused", "waiting", "stopping", "queued"))
    running = next((job for job in here if job.active), None)
    changed = store.jobs(("finished", "stopped", "failed", "interrupted"), since=known, limit=_RECENT_CHANGES)
    shown = running or _over(store, last.job, changed)
    points = None
    offset = 0
    if shown is not None:
        followed = (shown.id, shown.attempt) == (last.job, last.attempt)
        points = read_points(manager.folders.metrics(shown), last.offset if followed else 0)
        if not followed:
            points = Points(points.points, points.offset, False)
        offset = points.offset
    events = store.events(since=last.event if known else 0, limit=_EVENTS)
    cursor = Cursor(
        server,
        revision,
        events[-1].id if events else last.event,
        shown.id if shown else 0,
        shown.attempt if shown else 0,
        offset,
        base_mark,
    )
    return Snapshot(
        str(cursor),
        False,
        running,
        tuple(job for job in here if not job.active),
        tuple(changed),
        tuple(store.jobs(("interrupted",), limit=_OFFERS)),
        base,
        points,
        shown.id if shown else None,
        tuple(events),
        store.counts(),
        manager.trouble,
    )


def _server(trouble: Problem | None) -> str:
    # A restarted server, or one that has become the owner of the queue, reports everything again.
    return f"{os.getpid():x}{'x' if trouble else ''}"


def _over(store: JobStore, job_id: int, changed: list[Job]) -> Job | None:
    """The job that the curve belongs to while none runs: the last one shown, or one that ended after it did, as a job
    that begins and fails between two looks. The first look shows the newest, so that a page opened late has its curve.
    """
    if not job_id:
        return next(iter(changed), None)
    try:
        before = store.get(job_id)
    except UnknownJobError:
        return None
    return max([before, *changed], key=lambda job: job.finished or job.started or 0)
