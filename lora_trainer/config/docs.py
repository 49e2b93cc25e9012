"""The explanations that stand under the fields in ``schema.py``, for the tab and the command line."""

from __future__ import annotations

import ast
import inspect
from functools import cache

from lora_trainer.config import schema


@cache
def field_docs() -> dict[str, str]:
    """Field name -> its explanation in one line."""
    docs = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:]):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs
