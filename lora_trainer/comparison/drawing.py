"""Drawing a comparison into its folder: every cell, the whole as one picture, and a list of what there is."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from lora_trainer.comparison.picture import labelled
from lora_trainer.comparison.plan import Cell, Plan
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_path, atomic_write
from lora_trainer.host.base import Host, LenderOptions
from lora_trainer.run_files import COMPARISONS, GRID

LIST = "compare.json"

log = logging.getLogger(__name__)


def draw(
    host: Host,
    plan: Plan,
    output: Path,
    options: LenderOptions,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Draw ``plan`` into a new folder below ``output``, a run's output folder; returns that folder.

    Stopped early, or when a picture fails, it shows what was drawn up to then. None: nothing was.

    Raises:
        UserError: a picture could not be drawn or written.
    """
    folder = _new_folder(Path(output))
    drawn: list[Cell] = []
    total = len(plan.cells)
    on_progress(0, total)
    try:
        with closing(host.draw_all([cell.request for cell in plan.cells], options)) as pictures:
            while len(drawn) < total and not stopped():
                picture = next(pictures)
                cell = plan.cells[len(drawn)]
                with atomic_path(folder / cell.file, durable=False) as temporary:
                    picture.save(temporary, format="PNG")
                drawn.append(cell)
                on_progress(len(drawn), total)
    except UserError:
        raise
    except Exception as error:  # the host's code, or its user took the model away in between
        log.warning("The host could not draw a picture", exc_info=True)
        raise UserError(f"The picture could not be drawn: {error}") from error
    finally:
        if drawn:
            _finish(folder, plan, drawn)
        else:
            folder.rmdir()
    return folder if drawn else None


def comparisons(output: Path) -> list[dict[str, Any]]:
    """Those in a run's output folder, newest first: what ``compare.json`` says, and ``folder``, relative to it."""
    found = []
    for path in sorted((Path(output) / COMPARISONS).glob(f"[0-9]*/{LIST}"), reverse=True):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            found.append({**facts, "folder": f"{COMPARISONS}/{path.parent.name}"})
        except (OSError, ValueError):
            log.warning("%s cannot be read", path)
    return found


def _new_folder(output: Path) -> Path:
    for number in itertools.count(1):
        folder = output / COMPARISONS / f"{number:04d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{folder.name} cannot be made: {error.strerror}.", remedy="Free some space or mend its permissions."
            ) from error
    raise AssertionError("there is no last number")


def _finish(folder: Path, plan: Plan, drawn: list[Cell]) -> None:
    files = {(cell.prompt, cell.step, cell.weight): folder / cell.file for cell in drawn}
    with atomic_path(folder / GRID) as temporary:
        labelled(plan, files).save(temporary, format="PNG")
    facts = {
        "name": plan.name,
        "steps": plan.steps,
        "weights": plan.weights,
        "prompts": [
            {"text": prompt, **_facts_of(next(cell for cell in plan.cells if cell.prompt == index))}
            for index, prompt in enumerate(plan.prompts)
        ],
        "cells": [
            {"prompt": cell.prompt, "step": cell.step, "weight": cell.weight, "file": cell.file} for cell in drawn
        ],
        "grid": GRID,
        "complete": len(drawn) == len(plan.cells),
    }
    atomic_write(folder / LIST, json.dumps(facts, ensure_ascii=False, indent=1))


def _facts_of(cell: Cell) -> dict[str, Any]:
    request = cell.request
    return {
        "seed": request.seed, "width": request.width, "height": request.height, "sampling_steps": request.steps,
        "cfg": request.cfg_scale, "negative": request.negative_prompt,
    }  # fmt: skip
