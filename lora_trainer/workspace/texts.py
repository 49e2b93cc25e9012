"""Rows of text as a page shows them: a table with what is wrong, and what the model sees of one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_trainer.config import TrainConfig
from lora_trainer.dataset.text.checks import check_rows
from lora_trainer.dataset.text.rows import BadRow, Row, read_rows
from lora_trainer.errors import UserError
from lora_trainer.planning.text import encoder_for_page

PAGE = 50
_CELL = 300
"""Characters of a prompt or an answer that a table shows."""


def table(config: TrainConfig, offset: int = 0) -> dict[str, Any]:
    """``total``, ``wrong`` (rows with an error) and ``PAGE`` ``rows`` from ``offset`` on, in their order in the files.

    A row has ``where``, ``prompt`` and ``answer`` (both empty where it cannot be read), ``turns`` and ``problems``.

    Raises:
        UserError: there is no file that can be read, or the base model's tokenizer cannot.
    """
    rows = _in_order(config)
    encoder = encoder_for_page(config) if config.base_model else None
    findings: dict[str, list[dict[str, str]]] = {}
    for one in check_rows(Path(config.train_data_dir), encoder=encoder).findings:
        said = {"severity": one.severity, "message": one.message, "remedy": one.remedy}
        findings.setdefault(one.file, []).append(said)
    wrong = sum(any(one["severity"] == "error" for one in problems) for problems in findings.values())
    shown = [_cells(row, findings.get(row.where, [])) for row in rows[offset : offset + PAGE]]
    return {"total": len(rows), "wrong": wrong, "rows": shown}


def seen(config: TrainConfig, number: int) -> dict[str, Any]:
    """What the model sees of the row ``number`` of the table, in ``segments`` {text, learned}; with ``tokens``,
    ``learned`` and ``cut``, which count tokens.

    Raises:
        UserError: there is no such row, or it cannot be read.
    """
    rows = _in_order(config)
    row = rows[number] if number < len(rows) else None
    if not isinstance(row, Row):
        reason = "There is no such row." if row is None else f"{row.where} cannot be read: {row.reason}."
        raise UserError(reason, field="train_data_dir", remedy="Choose another row.")
    encoder = encoder_for_page(config)
    encoded = encoder.encode(row)
    return {
        "where": row.where,
        "tokens": len(encoded),
        "learned": sum(encoded.learned),
        "cut": encoded.cut,
        "segments": [{"text": text, "learned": learned} for text, learned in encoder.segments(encoded)],
    }


def _in_order(config: TrainConfig) -> list[Row | BadRow]:
    rows, bad = read_rows(Path(config.train_data_dir))
    return sorted([*rows, *bad], key=lambda row: (row.file, row.line))


def _cells(row: Row | BadRow, problems: list[dict[str, str]]) -> dict[str, Any]:
    messages = row.messages if isinstance(row, Row) else ()
    asked, answer = (messages[-2].text, messages[-1].text) if messages else ("", "")
    turns = sum(message.role == "assistant" for message in messages)
    return {"where": row.where, "prompt": _short(asked), "answer": _short(answer), "turns": turns, "problems": problems}


def _short(text: str) -> str:
    return text if len(text) <= _CELL else f"{text[:_CELL]}…"
