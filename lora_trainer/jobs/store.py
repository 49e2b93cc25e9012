"""The queue on disk: jobs and what happened to them, in one SQLite file that several threads and servers may open."""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_trainer.errors import Problem, UserError
from lora_trainer.jobs.job import Event, Job, UnknownJobError
from lora_trainer.jobs.migrations import MIGRATIONS, migrate

_COLUMNS = tuple(field.name for field in fields(Job))
_EVENT_COLUMNS = tuple(field.name for field in fields(Event))
_JSON = {"error", "warnings", "result", "timings"}
ORDERS = {
    "newest": "id DESC",
    "oldest": "id",
    "name": "casefold(name), id DESC",
    "model": "casefold(base_model), id DESC",
    "longest": "seconds DESC, id DESC",
}
"""Orders of the list, for the jobs that are over; what runs or waits comes before them."""

_SEARCHED = "casefold(name || char(10) || base_model || char(10) || last_part(dataset))"
_LIST_COLUMNS = ", ".join("''" if name in ("config", "effective_config") else name for name in _COLUMNS)


class JobStore:
    """Reads and writes the queue. Every thread has a connection of its own; writes are small transactions.

    Raises ``UserError`` on opening when the file was written by a newer version or cannot be a database.
    """

    def __init__(self, path: Path, migrations: Sequence[Sequence[str]] = MIGRATIONS):
        self.path = Path(path)
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            migrate(self._connection(), self.path, migrations)
            # Another server may be doing the same at this moment; the mode stays in the file, whoever sets it.
            with suppress(sqlite3.OperationalError):
                self._connection().execute("PRAGMA journal_mode = WAL")
        except UserError:
            self.close()
            raise
        except sqlite3.DatabaseError as error:
            self.close()
            raise UserError(
                f"The list of runs {self.path} cannot be opened: {error}.",
                remedy="Rename the file to start with an empty list; the jobs' folders beside it stay.",
            ) from error

    def close(self) -> None:
        """Close every thread's connection."""
        with self._lock:
            connections, self._connections = self._connections, []
            self._local = threading.local()
        for connection in connections:
            connection.close()

    # -- reading

    def get(self, job_id: int) -> Job:
        """The job with its configuration. Raises UnknownJobError."""
        row = self._connection().execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise UnknownJobError(job_id)
        return _job(row)

    def jobs(
        self,
        statuses: Iterable[str] | None = None,
        *,
        since: int = 0,
        limit: int = 1000,
        offset: int = 0,
        search: str = "",
        order: str = "newest",
    ) -> list[Job]:
        """Jobs without their configurations: what runs, then the queue in its order, then what is paused before it has
        begun, then the others in ``order``, one of ``ORDERS``.

        since: only those that changed after that revision. search: words that all stand in a job's name, base model or
        data set.
        """
        where, values = _conditions(statuses, since, search)
        rows = self._connection().execute(
            f"""SELECT {_LIST_COLUMNS} FROM jobs WHERE {where}
            ORDER BY active DESC, status = 'queued' DESC, status = 'paused' DESC,
            CASE status WHEN 'queued' THEN position ELSE 0 END, {ORDERS[order]}
            LIMIT ? OFFSET ?""",
            (*values, limit, offset),
        )
        return [_job(row) for row in rows]

    def count(self, statuses: Iterable[str] | None = None, *, search: str = "") -> int:
        """How many jobs ``jobs`` finds."""
        where, values = _conditions(statuses, 0, search)
        return self._connection().execute(f"SELECT COUNT(*) FROM jobs WHERE {where}", values).fetchone()[0]

    def counts(self) -> dict[str, int]:
        """How many jobs have each status."""
        return dict(self._connection().execute("SELECT status, COUNT(*) FROM jobs GROUP BY status"))

    def ids(self) -> list[int]:
        return [row[0] for row in self._connection().execute("SELECT id FROM jobs ORDER BY id")]

    def next_queued(self) -> Job | None:
        row = (
            self._connection()
            .execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE status = 'queued' ORDER BY position, id LIMIT 1")
            .fetchone()
        )
        return _job(row) if row else None

    def last_in_hand(self) -> Job | None:
        """The job that was started last."""
        row = (
            self._connection()
            .execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE started IS NOT NULL ORDER BY started DESC LIMIT 1")
            .fetchone()
        )
        return _job(row) if row else None

    def revision(self) -> int:
        """Grows with every change; equal revisions mean that nothing changed."""
        return self._connection().execute("SELECT value FROM counters WHERE name = 'revision'").fetchone()[0]

    def events(self, job_id: int | None = None, *, since: int = 0, limit: int = 500) -> list[Event]:
        """What happened after event ``since``, oldest first; the newest ``limit`` when there are more."""
        condition, values = ("job_id = ? AND ", (job_id,)) if job_id is not None else ("", ())
        rows = self._connection().execute(
            f"SELECT {', '.join(_EVENT_COLUMNS)} FROM events WHERE {condition} id > ? ORDER BY id DESC LIMIT ?",
            (*values, since, limit),
        )
        return [_event(row) for row in reversed(rows.fetchall())]

    # -- writing

    def add(
        self, name: str, config: str, prepare: Callable[[int], dict[str, Any]] | None = None, **values: Any
    ) -> Job:
        """Append a job to the queue. ``prepare`` is given its number and returns further columns; nobody sees the job
        before it returns, and there is none when it raises."""
        with self._transaction() as connection:
            last = connection.execute("SELECT COALESCE(MAX(position), 0) FROM jobs").fetchone()[0]
            row = {"status": "queued", "position": last + 1, **values, "name": name, "config": config,
                   "created": time.time(), "revision": self._next_revision(connection)}  # fmt: skip
            cursor = connection.execute(
                f"INSERT INTO jobs ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
                [_encode(key, value) for key, value in row.items()],
            )
            job_id = int(cursor.lastrowid or 0)
            if prepare is not None:
                self._update(connection, job_id, prepare(job_id))
        return self.get(job_id)

    def update(self, job_id: int, **values: Any) -> None:
        """Set columns of a job. Raises UnknownJobError."""
        with self._transaction() as connection:
            self._update(connection, job_id, values)

    def add_warning(self, job_id: int, problem: Problem) -> None:
        """Append a warning (the same one only once) and the event."""
        with self._transaction() as connection:
            row = connection.execute("SELECT warnings FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is None:
                raise UnknownJobError(job_id)
            warnings = json.loads(row[0])
            if problem.to_dict() not in warnings:
                self._update(connection, job_id, {"warnings": [*warnings, problem.to_dict()]})
                _insert_event(connection, job_id, "warning", problem.message, problem.to_dict())

    def set_status(self, job_id: int, status: str, *, unless: Iterable[str] = (), **values: Any) -> bool:
        """Change the status and note the event; False when the job has one of the statuses in ``unless``."""
        with self._transaction() as connection:
            row = connection.execute("SELECT status FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is None:
                raise UnknownJobError(job_id)
            if row[0] in set(unless):
                return False
            self._update(connection, job_id, {**values, "status": status})
            if row[0] != status:
                _insert_event(connection, job_id, "status", status, {"from": row[0]})
        return True

    def claim(self, job_id: int) -> Job | None:
        """Take a queued job into hand: running, active, one more attempt. None when it is not queued any more."""
        with self._transaction() as connection:
            row = connection.execute("SELECT status, attempt FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is None or row[0] != "queued":
                return None
            self._update(
                connection,
                job_id,
                {"status": "running", "active": True, "attempt": row[1] + 1, "started": time.time(), "finished": None,
                 "error": None, "phase": "starting", "speed": None, "pictures_per_second": None, "timings": {},
                 "seconds_left": None},
            )  # fmt: skip
            _insert_event(connection, job_id, "status", "running", {"from": "queued"})
        return self.get(job_id)

    def mark_interrupted(self) -> list[int]:
        """Every job that was in hand when its server vanished becomes ``interrupted``; returns their ids."""
        with self._transaction() as connection:
            rows = connection.execute("SELECT id, status FROM jobs WHERE active = 1 ORDER BY id").fetchall()
            for job_id, before in rows:
                values = {"status": "interrupted", "active": False, "finished": time.time(), "seconds_left": None,
                          "phase": ""}  # fmt: skip
                self._update(connection, job_id, values)
                _insert_event(connection, job_id, "status", "interrupted", {"from": before})
        return [job_id for job_id, _ in rows]

    def reorder(self, job_ids: Sequence[int]) -> None:
        """Put these queued jobs first, in this order. Raises UnknownJobError, UserError for one not queued."""
        with self._transaction() as connection:
            rows = connection.execute("SELECT id FROM jobs WHERE status = 'queued' ORDER BY position, id")
            queued = [row[0] for row in rows]
            for job_id in job_ids:
                if job_id not in queued:
                    raise UserError(f"Job {job_id} does not wait in the queue.", remedy="Reload the list.")
            order = [*dict.fromkeys(job_ids), *(job_id for job_id in queued if job_id not in job_ids)]
            for position, job_id in enumerate(order, start=1):
                self._update(connection, job_id, {"position": position})

    def update_together(self, work: Callable[[list[Job]], Mapping[int, dict[str, Any]]]) -> None:
        """Set the columns, by job, that ``work`` returns for all jobs with their configurations. Nobody else can take
        or change one meanwhile; when it raises, nothing is changed."""
        with self._transaction() as connection:
            rows = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs ORDER BY id").fetchall()
            for job_id, values in work([_job(row) for row in rows]).items():
                self._update(connection, job_id, values)

    def delete(self, job_id: int) -> None:
        with self._transaction() as connection:
            if not connection.execute("DELETE FROM jobs WHERE id = ?", (job_id,)).rowcount:
                raise UnknownJobError(job_id)
            self._next_revision(connection)

    def add_event(self, job_id: int, kind: str, text: str, data: dict[str, Any] | None = None) -> None:
        with self._transaction() as connection:
            _insert_event(connection, job_id, kind, text, data or {})
            self._update(connection, job_id, {})

    # -- inside

    def _connection(self) -> sqlite3.Connection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            # Each thread uses its own; only close() reaches across, when the server ends.
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            # SQLite's own functions know the letters of English alone.
            connection.create_function("casefold", 1, str.casefold, deterministic=True)
            connection.create_function("last_part", 1, lambda path: Path(path).name, deterministic=True)
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = NORMAL")
            self._local.connection = connection
            with self._lock:
                self._connections.append(connection)
        return connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def _next_revision(self, connection: sqlite3.Connection) -> int:
        connection.execute("UPDATE counters SET value = value + 1 WHERE name = 'revision'")
        return connection.execute("SELECT value FROM counters WHERE name = 'revision'").fetchone()[0]

    def _update(self, connection: sqlite3.Connection, job_id: int, values: dict[str, Any]) -> None:
        values = {**values, "revision": self._next_revision(connection)}
        changed = connection.execute(
            f"UPDATE jobs SET {', '.join(f'{key} = ?' for key in values)} WHERE id = ?",
            (*(_encode(key, value) for key, value in values.items()), job_id),
        ).rowcount
        if not changed:
            raise UnknownJobError(job_id)


def _conditions(statuses: Iterable[str] | None, since: int, search: str) -> tuple[str, list[Any]]:
    words = search.casefold().split()
    conditions = ["revision > ?", *[f"instr({_SEARCHED}, ?) > 0"] * len(words)]
    values: list[Any] = [since, *words]
    if statuses is not None:
        chosen = list(statuses)
        conditions.append(f"status IN ({', '.join('?' * len(chosen))})")
        values += chosen
    return " AND ".join(conditions), values


def _insert_event(connection: sqlite3.Connection, job_id: int, kind: str, text: str, data: dict[str, Any]) -> None:
    connection.execute(
        "INSERT INTO events (job_id, time, kind, text, data) VALUES (?, ?, ?, ?, ?)",
        (job_id, time.time(), kind, text, json.dumps(data)),
    )


def _encode(key: str, value: Any) -> Any:
    if key not in _COLUMNS:
        raise TypeError(f"a job has no {key}")
    if key in _JSON:
        if isinstance(value, Problem):
            value = value.to_dict()
        return None if value is None else json.dumps(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # a loss that is not a number is shown as missing
    return value


def _job(row: Sequence[Any]) -> Job:
    values = dict(zip(_COLUMNS, row))
    values["active"] = bool(values["active"])
    values["error"] = Problem(**json.loads(values["error"])) if values["error"] else None
    values["warnings"] = tuple(Problem(**warning) for warning in json.loads(values["warnings"]))
    values["result"] = json.loads(values["result"])
    values["timings"] = json.loads(values["timings"])
    return Job(**values)


def _event(row: Sequence[Any]) -> Event:
    values = dict(zip(_EVENT_COLUMNS, row))
    return Event(**{**values, "data": json.loads(values["data"])})
