"""Who may import whom; docs of the rule: README, "For developers"."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lora_trainer"
LEAVES = {"config", "convolution", "curves", "devices", "errors", "files", "out_of_memory", "patterns", "plugins",
          "processor", "run_files", "storage", "__init__"}  # fmt: skip
MAY_IMPORT = {
    "convolution": set(),
    "curves": set(),
    "devices": set(),
    "storage": set(),
    "errors": set(),
    "requirements": {"errors"},
    "files": {"errors"},
    "patterns": {"errors"},
    "processor": set(),
    "plugins": {"errors"},
    "out_of_memory": {"errors"},
    "config": {"errors", "files", "plugins"},
    "dataset": LEAVES,
    "adapters": LEAVES,
    "models": LEAVES,
    "captioning": LEAVES,
    "training": LEAVES | {"dataset", "adapters", "models", "captioning"},
    "run": LEAVES | {"dataset", "adapters", "models", "captioning", "training"},
    "loras": LEAVES | {"adapters", "models", "run"},
    "host": LEAVES | {"models", "adapters", "captioning", "training", "run"},
    "demo": LEAVES | {"dataset", "adapters", "models", "training", "run"},
    "planning": LEAVES | {"dataset", "captioning", "adapters", "models", "training", "run", "host"},
    "report": LEAVES | {"dataset", "adapters", "training", "run", "planning"},
    "comparison": LEAVES | {"models", "host"},
    "workspace": LEAVES | {"dataset", "captioning", "adapters", "models", "run", "host", "loras", "planning"},
    "jobs": LEAVES
    | {"dataset", "adapters", "models", "training", "run", "host", "planning", "comparison", "workspace"}
    | {"requirements"},
}
# cli, api and ui are the outside: they may know everything but each other.
OUTSIDE = {"cli", "api", "ui"}
INSIDE = set(MAY_IMPORT) | LEAVES
MAY_IMPORT["cli"] = INSIDE | {"api", "ui"}  # its command "ui" serves them
HOST_ROOMS = {("host", "a1111"), ("host", "forge")}
HOST_ROOTS = {"modules", "backend", "modules_forge", "ldm_patched", "ldm", "sgm"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module name, and whether the import stands at the top level of the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            yield node.module or "", id(node) in top
            if node.module == "lora_trainer":
                yield from ((f"lora_trainer.{alias.name}", id(node) in top) for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = part_of(path)
    for name, top in imports(path):
        root, *rest = name.split(".")
        if root == "lora_trainer" and rest and part != "__main__":
            allowed = MAY_IMPORT.get(part, INSIDE) | {part}
            is_ours = (PACKAGE / rest[0]).exists() or (PACKAGE / f"{rest[0]}.py").exists()
            assert rest[0] in allowed or not is_ours, f"{path.name} ({part}) imports {name}"
        if root in HOST_ROOTS:
            assert path.relative_to(PACKAGE).parts[:2] in HOST_ROOMS, f"{path} imports the host's {name}"
            assert not top, f"{path} imports the host's {name} at the top of the file; it must be lazy"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_person_can_read_the_file_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


def test_the_package_and_its_command_line_start_without_torch_or_a_host():
    code = "import sys, lora_trainer.cli, lora_trainer.config; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_what_builds_no_model_starts_without_diffusers():
    parts = "run", "report", "planning.estimate", "loras.convert", "jobs"
    code = f"import sys; import {', '.join(f'lora_trainer.{part}' for part in parts)}; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], cwd=PACKAGE.parent, text=True).split()
    assert "torch" in modules and not {"diffusers", "transformers"} & set(modules)
