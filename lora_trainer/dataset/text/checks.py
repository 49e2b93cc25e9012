"""The checks of rows of text: what would stop or spoil a training, by file and line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_trainer.dataset.findings import Finding, Severity, verdict
from lora_trainer.dataset.text.encoding import Encoder
from lora_trainer.dataset.text.rows import Row, read_rows

_MARK = re.compile(r"<\|[a-z_]+\|>|<s>|</s>|\[/?INST\]|<</?SYS>>|\[gMASK\]")
_SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class TextReport:
    """rows: that can be learned from. tokens, labelled: of all of them; None where no tokenizer was given.
    stops_training: a training on these rows would refuse to start."""

    findings: tuple[Finding, ...]
    rows: int
    tokens: int | None = None
    labelled: int | None = None

    @property
    def stops_training(self) -> bool:
        return not self.rows

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as ``check --json`` prints them."""
        names = ("file", "kind", "severity", "message", "remedy")
        return {
            "findings": [{name: getattr(finding, name) for name in names} for finding in self.findings],
            "rows": self.rows,
            "tokens": self.tokens,
            "labelled": self.labelled,
            "stops_training": self.stops_training,
        }

    def to_text(self) -> str:
        """The same for a terminal, from the worst to the least."""
        lines = [f"{one.severity + ':':<9}{one.file}: {one.message} {one.remedy}" for one in self.findings]
        counted = "" if self.tokens is None else f", {self.tokens} tokens, {self.labelled} of them learned"
        lines.append(f"{self.rows} rows{counted}")
        lines.append(verdict(self.findings, self.stops_training))
        return "\n".join(lines)


def check_rows(path: Path, *, held_out: Path | None = None, encoder: Encoder | None = None) -> TextReport:
    """Look at every row. held_out: rows that are not trained, to test with; encoder: counts tokens.

    Raises:
        UserError: a file cannot be read at all.
    """
    rows, bad = read_rows(path)
    findings = [
        Finding(one.where, "malformed", "error", f"The row is left out: {one.reason}.", "Correct it.") for one in bad
    ]
    findings += _repeated(rows)
    findings += _marked(rows)
    if held_out is not None:
        findings += _leaking(rows, read_rows(held_out)[0])
    tokens = labelled = None
    usable = len(rows)
    if encoder is not None:
        encoded = [encoder.encode(row) for row in rows]
        for row in encoded:
            if row.cut:
                whole, limit = len(row) + row.cut, encoder.max_length
                learns = any(row.learned)
                what = "is cut" if learns else "is left out, since its answer begins behind that"
                message = f"The row has {whole} tokens, more than max_length ({limit}), and {what}."
                severity: Severity = "warning" if learns else "error"
                remedy = "Raise max_length, or divide the row."
                findings.append(Finding(row.row.where, "too-long", severity, message, remedy))
        learned = [row for row in encoded if any(row.learned)]
        usable, tokens = len(learned), sum(map(len, learned))
        labelled = sum(sum(row.learned) for row in learned)
    findings.sort(key=lambda finding: _SEVERITIES.index(finding.severity))
    return TextReport(tuple(findings), usable, tokens, labelled)


def _repeated(rows: Sequence[Row]) -> Iterable[Finding]:
    """Rows that are there twice, and prompts that are answered in two ways."""
    whole: dict[tuple, Row] = {}
    asked: dict[tuple, Row] = {}
    for row in rows:
        key, prompt = _key(row, len(row.messages)), _key(row, len(row.messages) - 1)
        if (first := whole.get(key)) is not None:
            message = f"The row is the same as {first.where}."
            yield Finding(row.where, "duplicate", "warning", message, "Remove one; repeats shows rows more often.")
        elif (first := asked.get(prompt)) is not None:
            message = f"The row answers the prompt of {first.where} otherwise."
            yield Finding(row.where, "contradiction", "info", message, "Keep both only if both answers are right.")
        whole.setdefault(key, row)
        asked.setdefault(prompt, row)


def _marked(rows: Sequence[Row]) -> Iterable[Finding]:
    for row in rows:
        found = next((match for one in row.messages if (match := _MARK.search(one.text))), None)
        if found is not None:
            message = f"The row holds {found.group()}, a mark of chat templates, which the tokenizer may read as one."
            yield Finding(row.where, "template-mark", "warning", message, "Remove it: the template writes such marks.")


def _leaking(rows: Sequence[Row], held_out: Sequence[Row]) -> Iterable[Finding]:
    known = {_key(row, len(row.messages) - 1): row for row in held_out}
    for row in rows:
        if (other := known.get(_key(row, len(row.messages) - 1))) is not None:
            message = f"The row's prompt is held out as well ({other.where})."
            yield Finding(row.where, "leak", "error", message, "Remove one: a test on learned rows shows nothing.")


def _key(row: Row, count: int) -> tuple:
    """The first ``count`` messages, whatever their case and white space."""
    return tuple((one.role, " ".join(one.text.split()).casefold()) for one in row.messages[:count])
