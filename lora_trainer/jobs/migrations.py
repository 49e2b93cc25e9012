"""The shape of the queue's database, as the steps that led to it. Never edit a step that was released: append one."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from lora_trainer.errors import UserError

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE jobs (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL,
            status TEXT NOT NULL,
            active INTEGER NOT NULL DEFAULT 0,
            attempt INTEGER NOT NULL DEFAULT 0,
            position REAL NOT NULL DEFAULT 0,
            config TEXT NOT NULL,
            effective_config TEXT NOT NULL DEFAULT '',
            folder TEXT NOT NULL DEFAULT '',
            dataset TEXT NOT NULL DEFAULT '',
            base_model TEXT NOT NULL DEFAULT '',
            family TEXT NOT NULL DEFAULT '',
            host TEXT NOT NULL DEFAULT '',
            created REAL NOT NULL,
            started REAL,
            finished REAL,
            step INTEGER NOT NULL DEFAULT 0,
            total_steps INTEGER NOT NULL DEFAULT 0,
            epoch INTEGER NOT NULL DEFAULT 0,
            phase TEXT NOT NULL DEFAULT '',
            phase_done INTEGER NOT NULL DEFAULT 0,
            phase_total INTEGER NOT NULL DEFAULT 0,
            loss REAL,
            speed REAL,
            seconds_left REAL,
            memory INTEGER,
            seconds REAL NOT NULL DEFAULT 0,
            error TEXT,
            warnings TEXT NOT NULL DEFAULT '[]',
            result TEXT NOT NULL DEFAULT '{}',
            revision INTEGER NOT NULL DEFAULT 0
        )
        """,
        "CREATE INDEX jobs_status ON jobs (status, position)",
        "CREATE INDEX jobs_revision ON jobs (revision)",
        """
        CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
            time REAL NOT NULL,
            kind TEXT NOT NULL,
            text TEXT NOT NULL,
            data TEXT NOT NULL DEFAULT '{}'
        )
        """,
        "CREATE INDEX events_job ON events (job_id, id)",
        "CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
        "INSERT INTO counters VALUES ('revision', 0)",
    ),
    (
        "ALTER TABLE jobs ADD COLUMN architecture TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE jobs ADD COLUMN pictures_per_second REAL",
    ),
    ("ALTER TABLE jobs ADD COLUMN timings TEXT NOT NULL DEFAULT '{}'",),
    ("ALTER TABLE jobs ADD COLUMN task TEXT NOT NULL DEFAULT ''",),
)


def migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[Sequence[str]]) -> None:
    """Bring the database to the newest shape, all or nothing; a copy of an older one is kept beside it.

    Raises:
        UserError: the database was written by a newer version. It is left as it is.
    """
    connection.execute("BEGIN IMMEDIATE")  # two servers that start together: the second finds the work done
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(migrations):
            raise UserError(
                f"{path.name} was written by a newer version of the LoRA trainer"
                f" (format {version}; this one knows {len(migrations)}).",
                remedy="Update the extension, or start it with another --lora-trainer-dir.",
            )
        if 0 < version < len(migrations):
            _keep_copy(path, version)
        for step in migrations[version:]:
            for statement in step:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _keep_copy(path: Path, version: int) -> None:
    copy = path.with_name(f"{path.name}.format{version}.bak")
    if copy.exists():
        return
    temporary = copy.with_name(f"{copy.name}.tmp")
    source, target = sqlite3.connect(path), sqlite3.connect(temporary)
    try:
        source.backup(target)  # what is committed in the WAL is part of it, unlike with a copy of the file
    finally:
        source.close()
        target.close()
    os.replace(temporary, copy)
