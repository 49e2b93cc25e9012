"""How sentences for people begin: with the name of a file, never with its whole path on the server."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lora_trainer"
# What is typed at a terminal, and read there, may be said as it was typed.
TYPED = ("cli", "config", "demo")
_PATH = re.compile(r"(^|[._])(path|folder|root|index|output|base|lora|directory|temporary|target|resume)$")
_VERB = re.compile(r"^(:|,|) (is|are|has|holds|cannot|could|does|do|was|were|exists|takes|links|names|lies|would|adds|"
                   r"changes|ends|gives|which|already|the|tensor)\b")  # fmt: skip


def sentences_that_begin_with_a_path(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr) or len(node.values) < 2:
            continue
        first, rest = node.values[:2]
        if isinstance(first, ast.FormattedValue) and isinstance(rest, ast.Constant) and _VERB.match(str(rest.value)):
            expression = ast.unparse(first.value)
            if _PATH.search(expression):
                found.append(f"line {node.lineno}: {ast.unparse(node)[:100]}")
    return found


def test_no_sentence_begins_with_a_whole_path():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] not in TYPED:
            for sentence in sentences_that_begin_with_a_path(path.read_text(encoding="utf-8")):
                found.setdefault(str(path.relative_to(PACKAGE)), []).append(sentence)
    assert not found


def test_the_reader_knows_such_a_sentence():
    assert sentences_that_begin_with_a_path('f"{path} is damaged."')
    assert sentences_that_begin_with_a_path('f"{self.path}: tensor {name} is odd."')
    assert not sentences_that_begin_with_a_path('f"{path.name} is damaged."')
