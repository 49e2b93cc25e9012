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


def create_ui() -> Markup:
    chooser = tag("select", *(tag("option", text, value=value) for value, text in FILTERS), id_="runs_filter",
                  aria_label="Which runs are shown")  # fmt: skip
    head = tag("div", chooser, tag("span", id_="runs_count", class_="status", role="status"), class_="row")
    empty = tag("p", "No run yet. Each training stays here with its settings, curve, previews and files.",
                id_="runs_empty", class_="lead", hidden=True)  # fmt: skip
    return tag("div", head, empty, tag("ul", id_="runs_list", class_="runs"),
               button("Show more", "runs-more", id_="runs_more", hidden=True), class_="page")  # fmt: skip
