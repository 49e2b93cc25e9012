"""HTML by function calls: everything that is not already markup is escaped."""

from __future__ import annotations

from html import escape

PREFIX = "lora_trainer_"
"""Begins every element id and class name: nothing of the page can touch the host's."""

_VOID = {"input", "img", "br", "hr"}


class Markup(str):
    """Text that is HTML already."""


def tag(element: str, /, *children: str, **attributes: object) -> Markup:
    """One element. ``id_``, ``class_`` and ``for_`` get the prefix, once for each name in them; ``aria_label`` becomes
    aria-label; True is an attribute without a value, False and None are none."""
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    inside = "".join(child if isinstance(child, Markup) else escape(child) for child in children)
    return Markup(f"<{element}{written}>" if element in _VOID else f"<{element}{written}>{inside}</{element}>")


def _attribute(key: str, value: object) -> str:
    name = key.strip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    text = str(value)
    if name in ("id", "class", "for", "aria-describedby", "aria-labelledby"):
        text = " ".join(PREFIX + part for part in text.split())
    return f' {name}="{escape(text)}"'


def button(text: str, action: str, *, kind: str = "secondary", **attributes: object) -> Markup:
    """A button that does ``action`` (see ``javascript/lora_trainer_main.js``)."""
    return tag("button", text, type="button", class_=f"button {kind}", data_action=action, **attributes)


def card(number: str, title: str, sentence: str | None, *children: Markup, task: str | None = None) -> Markup:
    """A step of the first sub-tab. task: the kind of training that it is for; None for all. The page begins with
    "image"."""
    heading = tag("h3", tag("span", number, class_="number", aria_hidden="true"), tag("span", title))
    lead = [] if sentence is None else [tag("p", sentence, class_="lead")]
    return tag("section", heading, *lead, *children,
               class_="card other_task" if task == "text" else "card", data_task=task)  # fmt: skip
