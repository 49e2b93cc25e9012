"""Benchmarks are run by hand, so a name that has moved is found here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

COMMANDS = [path.stem for path in Path(__file__).parent.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {Path(__file__).stem}))
def test_it_can_be_imported(name):
    assert callable(importlib.import_module(f"tests.benchmarks.{name}").main)
