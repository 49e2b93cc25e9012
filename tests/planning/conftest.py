"""The fixtures of tests/jobs: an estimate looks into the queue."""

from __future__ import annotations

from tests.jobs.conftest import host, idle, manager, settings, train

__all__ = ["host", "idle", "manager", "settings", "train"]
