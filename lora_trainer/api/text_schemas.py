"""What goes in and comes out of the routes of rows and language models."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class LanguageModelListModel(BaseModel):
    names: list[str]


class RowsModel(BaseModel):
    """settings: of the training, as far as they are known. row: counted from 0, in the order of the files."""

    settings: dict[str, Any]
    row: int = Field(0, ge=0)


class RowModel(BaseModel):
    """where: file and line. problems: {severity (error, warning, info), message, remedy}."""

    where: str
    prompt: str
    answer: str
    turns: int
    problems: list[dict[str, str]]


class RowTableModel(BaseModel):
    """total: of all rows. wrong: of those with an error."""

    total: int
    wrong: int
    rows: list[RowModel]


class SeenRowModel(BaseModel):
    """segments: {text, learned}. tokens, learned and cut are counts of tokens."""

    where: str
    tokens: int
    learned: int
    cut: int
    segments: list[dict[str, Any]]
