"""The page itself, from its title to its last table."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import lora_trainer
from lora_trainer.adapters.peft_folder import WEIGHTS
from lora_trainer.config import FACTS, TrainConfig
from lora_trainer.config.docs import field_docs
from lora_trainer.curves import thinned
from lora_trainer.planning.presets import PRESETS
from lora_trainer.report.curves import MOST_POINTS, Line, average, chart
from lora_trainer.report.data import facts_of
from lora_trainer.report.html import Html, element, joined
from lora_trainer.report.pictures import GRID, PREVIEW, data_address
from lora_trainer.report.run_folder import RunFolder, plain
from lora_trainer.report.style import STYLE
from lora_trainer.report.words import Words
from lora_trainer.run.outputs import RUN_ENTRY
from lora_trainer.training.metrics import VALIDATION

MOST_STEPS = 12
"""Of more steps with previews, so many are shown, evenly chosen."""
_PICTURE = re.compile(r"(data:image/jpeg;base64,[A-Za-z0-9+/=]+)")
_SHORTEST_PLACE = 3  # "/" or "C:\\" alone are no secret


def report_of(run: RunFolder, language: str = "en") -> str:
    """The run as one HTML page. Nothing in it names a place of this machine."""
    words = Words(language)
    parts = [
        ("", _head(run, words)),
        (words("Curves"), _curves(run, words)),
        (words("Comparison"), _comparison(run, words)),
        (words("Previews"), _previews(run, words)),
        (words("Data set"), _data(run, words)),
        (words("Settings"), _settings(run, words)),
        (words("Files"), _files(run, words)),
        (words("Environment"), _table(run.environment().items())),
    ]
    sections = [
        element("section", element("h2", title) if title else None, content) for title, content in parts if content
    ]
    made = words("Made by LoRA trainer {version}", version=lora_trainer.__version__)
    body = element("body", element("main", *sections), element("footer", made))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", run.name),
        element("style", Html(STYLE)),
    )
    page = "<!DOCTYPE html>\n" + element("html", head, body, lang=words.language)
    return _without_places(page, run)


def _head(run: RunFolder, words: Words) -> Html:
    found = run.verdict
    config = run.config
    lines = [line for line in run.metrics if "kind" not in line]
    steps, seconds = [line["step"] for line in lines], sum(line.get("seconds") or 0 for line in lines)
    facts = [
        (words("Base model"), plain("base_model", config.base_model) or run.metadata.get("ss_sd_model_name", "")),
        (words("Trigger word"), config.trigger_word),
        (words("Started"), _day(run.started)),
        (words("Steps"), str(max(steps)) if steps else ""),
        (words("Time in steps"), words("{n} min", n=f"{seconds / 60:.1f}") if steps else ""),
    ]
    return joined(
        element("h1", run.name),
        element("p", config.description) if config.description else None,
        element("p", words.said(found.sentence), class_="verdict") if found else None,
        _table(pair for pair in facts if pair[1]),
    )


def _curves(run: RunFolder, words: Words) -> Html:
    lines = thinned(run.metrics, MOST_POINTS)
    steps = [line for line in lines if "kind" not in line]
    measured = [line for line in lines if line.get("kind") == VALIDATION]

    def points(name: str, of: Sequence[dict[str, Any]] = steps) -> list[tuple[int, float]]:
        return [(line["step"], line[name]) for line in of if isinstance(line.get(name), (int, float))]

    loss, held = points("loss"), partial(points, of=measured)
    charts = [
        chart(words("Loss"), [Line(words("each step"), "raw", loss), Line(words("average"), "mean", average(loss))]),
        chart(
            words("Loss on the same noise"),
            [
                Line(words("held out"), "validation", held("validation"), dots=True),
                Line(words("trained"), "training", held("training"), dots=True),
            ],
        ),
        chart(words("Drift from the base model"), [Line(words("Drift"), "mean", held("drift"), dots=True)]),
        chart(words("Gradient norm"), [Line(words("Gradient norm"), "raw", points("grad_norm"))]),
        chart(words("Learning rate"), [Line(words("Learning rate"), "mean", points("lr"))]),
    ]
    return joined(*charts)


def _previews(run: RunFolder, words: Words) -> Html:
    previews = run.previews()
    steps = _evenly(sorted(previews))
    prompts = sorted({number for step in steps for number in previews[step]})
    rows = []
    for number in prompts:
        given = run.config.preview_prompts
        cells = []
        for step in steps:
            path = previews[step].get(number)
            address = data_address(path, PREVIEW) if path else None
            caption = words("step {n}", n=step) if step else words("before")
            picture = element("img", src=address, alt="") if address else element("span", words("no picture"))
            cells.append(element("figure", picture, element("figcaption", caption)))
        title = element("p", given[number]) if number < len(given) else None
        rows += [title, element("div", *cells, class_="film")]
    return joined(*rows)


def _comparison(run: RunFolder, words: Words) -> Html:
    path = run.comparison()
    address = data_address(path, GRID) if path else None
    return element("img", src=address, alt=words("Comparison"), class_="grid") if address else Html()


def _data(run: RunFolder, words: Words) -> Html:
    is_text = run.config.task == "text" or (run.directory / run.name / WEIGHTS).exists()
    facts = facts_of(run.config, run.metadata, is_text, words)
    return joined(
        element("p", facts.missing) if facts.missing else None,
        _table(facts.numbers),
        element("div", *facts.shown, class_="" if is_text else "pictures"),
    )


def _settings(run: RunFolder, words: Words) -> Html:
    """Those that differ from the defaults, beside the defaults and the preset that comes nearest."""
    given, default = run.settings(), TrainConfig()
    names, preset = _nearest(given)
    title = " / ".join(words(name) for name in names)
    rows = []
    for name, value in given.items():
        usual = plain(name, getattr(default, name))
        advised = preset.get(name, usual)
        if value != usual or value != advised:
            doc = words(field_docs().get(name, ""))
            marked = "other" if value != advised else None
            cells = [element("td", element("code", name), title=doc), element("td", _shown(value), class_=marked)]
            cells += [element("td", _shown(one)) for one in (([advised] if names else []) + [usual])]
            rows.append(element("tr", *cells))
    preset_head = [words("Preset {name}", name=title)] if names else []
    heads = [words("Setting"), words("This run"), *preset_head, words("Default")]
    return element("table", element("tr", *(element("th", one) for one in heads)), *rows)


def _nearest(given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Titles of the presets for this kind of training of which the most settings were kept, and their settings; none
    where hardly any was."""
    task = given.get("task", "auto")
    kept = {
        kind: sum(given.get(name) == value for name, value in preset.settings.items())
        for kind, preset in PRESETS.items()
        if task in ("auto", preset.task)
    }
    most = max(kept.values())
    nearest = [PRESETS[kind] for kind in kept if kept[kind] == most]
    if 2 * most <= len(nearest[0].settings):
        return [], {}
    return [one.title for one in nearest if one.settings == nearest[0].settings], nearest[0].settings


def _files(run: RunFolder, words: Words) -> Html:
    found, metadata = run.verdict, run.metadata
    rows = []
    for lora in run.loras():
        recommended = found is not None and lora.step == found.best
        note = words("recommended") if recommended else ""
        cells = [lora.name, "" if lora.step is None else str(lora.step), f"{lora.size / 2**20:.1f} MiB", note]
        rows.append(element("tr", *(element("td", one) for one in cells), element("td", element("code", lora.digest))))
    heads = [words("File"), words("Step"), words("Size"), "", "SHA-256"]
    table = element("table", element("tr", *(element("th", one) for one in heads)), *rows) if rows else None
    other = [
        (words("SHA-256 of the base model"), metadata.get("ss_new_sd_model_hash", "")),
        (words("Mark of the settings and data"), metadata.get(RUN_ENTRY, "")),
    ]
    return joined(table, _table(pair for pair in other if pair[1] not in ("", "None")))


def _table(pairs: Iterable[tuple[str, str]]) -> Html:
    rows = [element("tr", element("th", name), element("td", value)) for name, value in pairs]
    return element("table", *rows, class_="facts") if rows else Html()


def _shown(value: Any) -> str:
    if value in (None, "", [], {}):
        return "–"
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    return str(value)


def _evenly(steps: Sequence[int]) -> list[int]:
    if len(steps) <= MOST_STEPS:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (MOST_STEPS - 1))] for index in range(MOST_STEPS)]


def _day(moment: str) -> str:
    try:
        return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return ""


def _without_places(page: str, run: RunFolder) -> str:
    """Without the paths that the settings and this run name, wherever a person may have written them."""
    values = [getattr(run.config, name) for name in FACTS if FACTS[name].path is not None]
    named = [one for value in values for one in (value if isinstance(value, list) else [value])]
    places = {run.directory, run.directory.resolve(), *(Path(one).parent for one in named if one)}
    places |= {place.resolve() for place in places}
    with suppress(RuntimeError):  # a user without a home
        places.add(Path.home())
    known = sorted((html.escape(str(place)) for place in places if place.is_absolute()), key=len, reverse=True)
    pieces = _PICTURE.split(page)
    for index in range(0, len(pieces), 2):  # between the pictures, whose letters may look like a path
        for place in known:
            pieces[index] = pieces[index].replace(place, "…") if len(place) > _SHORTEST_PLACE else pieces[index]
    return "".join(pieces)
