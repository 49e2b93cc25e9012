"""install.py: additions only, quick, and never in the way of the WebUI's start."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_trainer import requirements
from lora_trainer.requirements import Requirement

INSTALL = Path(__file__).parents[1] / "install.py"

FAKE_PIP = """
import json, os, sys
arguments = sys.argv[1:]
constraints = open(arguments[arguments.index("--constraint") + 1]).read()
json.dump({"arguments": arguments, "constraints": constraints}, open(os.environ["FAKE_PIP"], "w"))
print("No matching distribution found")
sys.exit(int(os.environ["FAKE_PIP_CODE"]))
"""
WITHOUT = """
import sys, runpy
from lora_trainer import requirements
real = requirements.installed_version
requirements.installed_version = lambda name: {versions!r}.get(name, real(name))
sys.argv = ["install.py"]
runpy.run_path({install!r}, run_name="__main__")
"""


def run(tmp_path, versions, code=0, **environment):
    """install.py with these versions pretended, and a pip that notes what it was asked."""
    (tmp_path / "pip").mkdir(exist_ok=True)
    (tmp_path / "pip" / "__main__.py").write_text(FAKE_PIP)
    (tmp_path / "pip" / "__init__.py").write_text("")
    variables = {"FAKE_PIP": str(tmp_path / "asked.json"), "FAKE_PIP_CODE": str(code), "PYTHONPATH": str(tmp_path)}
    program = WITHOUT.format(versions=versions, install=str(INSTALL))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=INSTALL.parent, capture_output=True, text=True, timeout=120,
        env={**os.environ, **variables, **environment},
    )  # fmt: skip
    asked = tmp_path / "asked.json"

    return done, json.loads(asked.read_text()) if asked.exists() else None


def test_it_takes_less_than_a_second_when_nothing_is_missing():
    resource = pytest.importorskip("resource")  # seconds of the processor, whatever else it does: not on Windows
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, INSTALL], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_everything_installed_is_held_fast(tmp_path):
    done, asked = run(tmp_path, {"diffusers": None})
    assert done.returncode == 0
    wanted = str(next(need for need in requirements.requirements() if need.name == "diffusers"))
    assert asked["arguments"][0] == "install" and wanted in asked["arguments"], "one argument, no shell, no quotes"
    assert "--upgrade" not in asked["arguments"]
    held = {line.partition("==")[0].lower() for line in asked["constraints"].splitlines()}
    for name in ("torch", "transformers", "numpy", "diffusers"):
        assert name in held
        assert f"{name}=={importlib.metadata.version(name)}" in asked["constraints"]


def test_no_package_is_held_at_two_versions(tmp_path):
    """Windows leaves "~umpy…" behind where a file was in use; a second folder on the path may have another version."""
    for folder, name, version in (
        ("~umpy-1.0.dist-info", "numpy", "1.0"),
        ("Twice_there-2.0.dist-info", "Twice.there", "2.0"),
        ("later/twice_there-1.0.dist-info", "twice-there", "1.0"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    _, asked = run(tmp_path, {"diffusers": None}, PYTHONPATH=f"{tmp_path}{os.pathsep}{tmp_path / 'later'}")
    held = asked["constraints"].lower().splitlines()
    assert "numpy==1.0" not in held and "twice.there==2.0" in held and "twice-there==1.0" not in held


def test_when_pip_fails_the_webui_starts_all_the_same(tmp_path):
    done, asked = run(tmp_path, {"diffusers": None}, code=1)
    assert done.returncode == 0 and asked
    assert "No matching distribution found" in done.stdout and "without training" in done.stdout


def test_a_version_that_does_not_fit_is_left_alone(tmp_path):
    done, asked = run(tmp_path, {"diffusers": "0.20.0"})
    assert done.returncode == 0 and asked is None
    assert "0.20.0" in done.stdout


def test_skip_install_is_respected(tmp_path):
    done, asked = run(tmp_path, {"diffusers": None}, COMMANDLINE_ARGS="--api --skip-install")
    assert (done.returncode, done.stdout, asked) == (0, "", None)


def test_an_index_of_the_users_is_used(tmp_path):
    _, asked = run(tmp_path, {"diffusers": None}, INDEX_URL="https://example.org/simple")
    assert asked["arguments"][-2:] == ["--index-url", "https://example.org/simple"]


@pytest.mark.parametrize("torch, version, fits", [
    ("2.1.2+cpu", "0.29.2", True), ("2.1.2", "0.35.2", True), ("2.1.2", "0.36.0", False), ("2.1.2", "0.29.1", False),
    ("2.3.1", "0.36.0", True), ("2.13.0", "0.42.0.dev0", True), ("2.13.0", "0.9", False),
])  # fmt: skip
def test_diffusers_has_to_fit_torch(monkeypatch, torch, version, fits):
    monkeypatch.setattr(requirements, "installed_version", {"torch": torch}.get)
    diffusers = next(need for need in requirements.requirements() if need.name == "diffusers")
    assert diffusers.accepts(version) is fits


def test_the_tab_says_what_is_missing_and_what_to_do(monkeypatch):
    real = requirements.installed_version
    monkeypatch.setattr(requirements, "installed_version", lambda name: None if name == "diffusers" else real(name))
    assert "diffusers>=0.29.2" in requirements.problem() and "install.py" in requirements.problem()
    monkeypatch.setattr(requirements, "installed_version", lambda name: "0.1" if name == "diffusers" else real(name))
    assert "installed: 0.1" in requirements.problem()


def test_a_package_that_cannot_be_imported_is_said_in_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "diffusers.py").write_text("raise AttributeError('module torch has no attribute xpu')")
    program = "from lora_trainer import requirements; print(requirements.problem())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=INSTALL.parent, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert "cannot be imported" in done.stdout and "no attribute xpu" in done.stdout and done.returncode == 0


def test_packages_are_imported_once_and_in_no_other_thread(tmp_path):
    """diffusers puts a stand-in into sys.modules: whoever imports it at the same time in another thread fails."""
    (tmp_path / "diffusers.py").write_text("import threading; print(threading.current_thread().name); raise ValueError")
    program = "from lora_trainer import requirements; requirements.problem(), requirements.problem()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=INSTALL.parent, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.split() == ["MainThread"]


def test_versions_are_compared_as_numbers():
    need = Requirement("x", "0.9", "0.36")
    assert [need.accepts(v) for v in ("0.9", "0.10", "0.35.9", "0.36", "0.8.1", "")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
