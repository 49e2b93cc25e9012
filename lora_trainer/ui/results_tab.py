"""The second sub-tab: every run there was, with its settings, curve, previews and files."""

from __future__ import annotations

from lora_trainer.ui.markup import Markup, button, tag

FILTERS = (
    ("", "All runs"),
    ("finished", "Finished"),
    ("stopped", "Stopped"),
    ("failed", "Failed"),
    ("interrupted", "Interrupted"),
)


ORDERS = (
    ("newest", "Newest first"),
    ("oldest", "Oldest first"),
    ("name", "By name"),
    ("model", "By base model"),
    ("longest", "Longest first"),
)


def create_ui() -> Markup:
    search = tag("input", type="text", id_="runs_search", placeholder="name, base model or pictures",
                 spellcheck="false", aria_label="Find runs")  # fmt: skip
    chooser = tag("select", *(tag("option", text, value=value) for value, text in FILTERS), id_="runs_filter",
                  aria_label="Which runs are shown")  # fmt: skip
    order = tag("select", *(tag("option", text, value=value) for value, text in ORDERS), id_="runs_order",
                aria_label="Order of the runs", title="What runs or waits now always comes first")  # fmt: skip
    many = tag("span", id_="runs_many", class_="row", hidden=True)
    head = tag("div", search, chooser, order, tag("span", id_="runs_count", class_="status", role="status"), many,
               class_="row runs_head")  # fmt: skip
    message = tag("p", id_="runs_message", class_="problem", role="alert", hidden=True)
    empty = tag("p", "No run yet. Each training stays here with its settings, curve, previews and files.",
                id_="runs_empty", class_="lead", hidden=True)  # fmt: skip
    return tag("div", head, message, empty, tag("ul", id_="runs_list", class_="runs"),
               button("Show more", "runs-more", id_="runs_more", hidden=True), class_="page")  # fmt: skip
