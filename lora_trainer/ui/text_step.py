"""What the first sub-tab shows of a language model's training in place of pictures: rows, and what the model sees."""

from __future__ import annotations

from lora_trainer.ui.markup import Markup, button, card, tag


def rows_card(offer_folders: bool) -> Markup:
    """The first step. ``offer_folders``: whether a file of the server may be named."""
    drop = tag(
        "label",
        tag("strong", "Drop a file with rows here"),
        tag("span", "or click to choose it"),
        tag("input", type="file", id_="text_file", class_="spoken", accept=".jsonl,.json", aria_label="Choose a file"),
        id_="text_drop",
        class_="drop",
    )
    path = tag(
        "div",
        tag("label", "File or folder on the server", for_="text_path"),
        tag("div",
            tag("input", type="text", id_="text_path", spellcheck="false", autocomplete="off",
                placeholder="/path/to/rows.jsonl"),
            button("Use it", "use-text-path"),
            class_="inline"),
        class_="field",
    )  # fmt: skip
    earlier = tag("div", tag("label", "Files from before", for_="earlier_texts"), tag("select", id_="earlier_texts"),
                  class_="field", id_="earlier_texts_field", hidden=True)  # fmt: skip
    pages = tag("div", button("Earlier rows", "rows-before"), button("Further rows", "rows-after"),
                class_="row", id_="row_pages", hidden=True)  # fmt: skip
    seen = tag("figure", tag("figcaption", id_="seen_title"), tag("div", id_="seen", class_="seen", tabindex=0,
               aria_label="What the model sees"), id_="seen_box", class_="panel", hidden=True)  # fmt: skip
    return card(
        "1",
        "Rows",
        "A hundred or more prompts with the answer that is wanted: .jsonl or .json, one conversation a row.",
        drop,
        *([path] if offer_folders else []),
        earlier,
        tag("p", id_="texts", class_="status", role="status", hidden=True),
        tag("ul", id_="text_hints", class_="hints", hidden=True),
        tag("div", id_="row_table", class_="row_table", hidden=True),
        pages,
        seen,
        task="text",
    )


def model_folder() -> Markup:
    """A language model that is not in the list, by its folder."""
    return tag(
        "div",
        tag("label", "Folder of another model", for_="model_folder"),
        tag("div",
            tag("input", type="text", id_="model_folder", spellcheck="false", autocomplete="off",
                placeholder="/path/to/model"),
            button("Use it", "use-model-folder"),
            class_="inline"),
        class_="field other_task",
        data_task="text",
    )  # fmt: skip
