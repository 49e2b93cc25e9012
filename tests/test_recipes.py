"""The recipes for many runs: their own tools parse them, and our commands in them are understood."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lora_trainer.cli.main import build_parser

RECIPES = Path(__file__).parents[1] / "lora_trainer" / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.iterdir()), ids=lambda path: path.name)
def test_it_is_parsed_and_its_commands_are_ours(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sh":
        assert text.startswith("#!/bin/bash")
        if shutil.which("bash"):
            subprocess.run(["bash", "-n", str(path)], check=True)
    else:
        recipe = yaml.safe_load(text)
        if recipe.get("kind") == "Job":
            assert recipe["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] and recipe["spec"]["suspend"] is True
            text = shlex.join(recipe["spec"]["template"]["spec"]["containers"][0]["command"])
        else:
            text = recipe["run"]
    commands = re.findall(r"-m lora_trainer ([^&\n]+)", text.replace("\\\n", ""))
    assert commands
    for command in commands:
        options = build_parser().parse_args(shlex.split(command))
        assert options.command in ("train", "supervise")
