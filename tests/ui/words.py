"""Everything that the tab says, collected from its HTML and its scripts."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
_STRING = r'"((?:[^"\\\n]|\\.)*)"'
_SENTENCE = r"(?=.*[a-z]{2})(?=.*\S \S).*[.!]"
_TABLE = re.compile(r"const (?:STATES|PHASES|TIPS|PARTS) = \{(.*?)\};", re.DOTALL)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: set[str] = set()
        self.ids: list[str] = []
        self.classes: set[str] = set()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._literal = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._literal += tag == "textarea"  # settings, not words
        self.words |= {text for key in ("placeholder", "title", "aria-label") if (text := attributes.get(key))}
        if attributes.get("id"):
            self.ids.append(attributes["id"] or "")
        self.classes |= set((attributes.get("class") or "").split())

    def handle_endtag(self, tag: str) -> None:
        self._literal -= tag == "textarea"

    def handle_data(self, data: str) -> None:
        if data.strip() and not self._literal:
            self.words.add(data.strip())


def read_html(*blocks: str) -> _Reader:
    reader = _Reader()
    for block in blocks:
        reader.feed(block)
    return reader


def words_of_scripts() -> set[str]:
    """Texts in calls of app.t and app.button, in lists of actions and in tables of words."""
    words: set[str] = set()
    for path in sorted((ROOT / "javascript").glob("lora_trainer*.js")):
        source = path.read_text(encoding="utf-8")
        for match in re.finditer(r"app\.(?:t|button)\(", source):
            argument = _first_argument(source, match.end())
            if "===" in argument:  # a comparison before the choice between two texts
                argument = argument.partition("?")[2]
            words |= set(re.findall(_STRING, argument))
        words |= set(re.findall(r'\["([A-Z][^"]*)", ', source))
        for table in _TABLE.findall(source):
            words |= set(re.findall(r":\s*" + _STRING, table))
    return words


@functools.cache
def words_of_the_server() -> set[str]:
    """Every text of the package, with {0}, {1} for what it names: what a person may be told is among them."""
    said: set[str] = set()
    for path in (ROOT / "lora_trainer").rglob("*.py"):
        texts = (node for node in ast.walk(_tree(path)) if isinstance(node, (ast.Constant, ast.JoinedStr)))
        said.update(text for node in texts for text in _templates(node))
    return said


@functools.cache
def sentences_of_file(path: Path) -> frozenset[str]:
    """What a file may say to a person: texts that begin as a sentence or with a name, and end as a sentence.

    Left out are docstrings and what goes into the log.
    """
    tree, elsewhere = _tree(path), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            elsewhere.add(node.value)
        if isinstance(node, ast.JoinedStr):
            elsewhere |= {part for value in node.values for part in ast.walk(value)}
        called = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if called and (getattr(called.value, "id", "") in ("log", "re") or called.attr == "give_up"):  # logs the reason
            elsewhere |= set(ast.walk(node))
    texts = {text for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr))
             and node not in elsewhere for text in _templates(node)}  # fmt: skip
    return frozenset(text for text in texts if re.fullmatch(_SENTENCE, text, re.DOTALL)) | problems_of_file(path)


def problems_of_file(path: Path) -> set[str]:
    """Messages and remedies of the ``UserError`` that a file makes, with {0}, {1} for what they name."""
    tree, named, said = _tree(path), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named.setdefault(node.targets[0].id, []).extend(_templates(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "Problem"):
            for part in (*node.args[:1], *(one.value for one in node.keywords if one.arg == "remedy")):
                said |= set(named.get(part.id, ()) if isinstance(part, ast.Name) else _templates(part))
    return said


@functools.cache
def _tree(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def _templates(node: ast.AST | None) -> list[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.Dict):
        return [text for value in node.values for text in _templates(value)]
    if isinstance(node, (ast.Tuple, ast.List)):
        return [text for value in node.elts for text in _templates(value)]
    if isinstance(node, ast.IfExp):
        return _templates(node.body) + _templates(node.orelse)
    if isinstance(node, ast.JoinedStr):
        numbers = itertools.count()
        parts = (one.value if isinstance(one, ast.Constant) else f"{{{next(numbers)}}}" for one in node.values)
        return ["".join(parts)]
    return []


def _first_argument(source: str, start: int) -> str:
    depth = 0
    for index in range(start, len(source)):
        depth += (source[index] in "([{") - (source[index] in ")]}")
        if depth < 0 or (depth == 0 and source[index] == "," and source[start:index].count('"') % 2 == 0):
            return source[start:index]
    raise AssertionError("a call that does not end")
