"""The explanations that stand under the fields of the settings, for the tab and the command line."""

from __future__ import annotations

import ast
import inspect
from functools import cache

from lora_trainer.config.schema import GROUPS


@cache
def field_docs() -> dict[str, str]:
    """Field name -> its explanation in one line."""
    docs = {}
    for _, kind in GROUPS:
        (node,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:]):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs
