"""The second sub-tab: the pictures with their captions, to look through, edit, check and describe."""

from __future__ import annotations

from lora_trainer.ui.markup import Markup, button, tag

PANELS = (
    ("tags", "Tags", "How often each tag stands there; click one to filter by it"),
    ("many", "Edit many", "Change the captions of all selected pictures, or of all that pass the filter"),
    ("caption", "Caption them", "Let a captioner describe the pictures"),
    ("check", "Check", "Look for duplicates, broken files, missing trigger words and more"),
    ("export", "Export", "Write the captions in another format; go back to a backup"),
)
STATES = (
    ("", "All pictures"),
    ("uncaptioned", "Without a caption"),
    ("captioned", "With a caption"),
    ("unsaved", "Not saved yet"),
    ("excluded", "Excluded"),
    ("edited", "Turned or cropped"),
)
TAG_FILTERS = (("tags", "has the tag"), ("missing", "lacks the tag"), ("core", "as core"), ("mood", "as mood"))
ACTIONS = (
    ("add", "Add"),
    ("remove", "Remove"),
    ("replace", "Replace"),
    ("move", "Move"),
    ("mark", "Mark"),
    ("regex", "Regular expression"),
)
MODES = (
    ("keep", "Only pictures without a caption"),
    ("append", "Add it after the caption"),
    ("prepend", "Put it before the caption"),
    ("replace", "Replace captions (a backup is kept)"),
)
FORMATS = (
    ("csv", "metadata.csv"),
    ("jsonl", "metadata.jsonl"),
    ("txt", ".txt beside each picture"),
    ("caption", ".caption beside each picture"),
)


def create_ui(*, offer_folders: bool = True) -> Markup:
    """``offer_folders``: whether a folder of the server may be named."""
    problem = tag("p", id_="editor_problem", class_="notice problem", role="alert", hidden=True)
    return tag("div", _opening(offer_folders), problem, _editor(), class_="page")


def _opening(offer_folders: bool) -> Markup:
    folder = tag(
        "div",
        tag("label", "Folder on the server", for_="editor_folder"),
        tag("div",
            tag("input", type="text", id_="editor_folder", spellcheck="false", autocomplete="off",
                placeholder="/path/to/pictures"),
            button("Open", "editor-folder"),
            class_="inline"),
        class_="field",
    )  # fmt: skip
    return tag(
        "section",
        tag("h3", "Which pictures?"),
        tag("p", "Good captions decide the result. Add pictures in step 1 of Train, or open some from before.",
            class_="lead"),
        tag("ul", id_="sets", class_="sets", aria_label="Pictures from before"),
        tag("p", "No pictures yet. What is added in step 1 of Train is kept here.", id_="sets_empty", class_="help",
            hidden=True),
        tag("div", *([folder] if offer_folders else []), class_="fields"),
        id_="editor_open",
        class_="card",
    )  # fmt: skip


def _editor() -> Markup:
    return tag(
        "section",
        _head(),
        tag("div", id_="editor_message", class_="notice", role="status", hidden=True),
        tag("div", id_="editor_conflicts", class_="notice", role="alert", hidden=True),
        _task(),
        _filters(),
        _panels(),
        tag("div", _gallery(), _picture(), class_="desk"),
        id_="editor",
        class_="card editor",
        aria_label="Dataset editor",
        hidden=True,
    )


def _head() -> Markup:
    buttons = tag(
        "div",
        button("Save", "editor-save", kind="primary", id_="editor_save", title="Ctrl+S"),
        button("Undo", "editor-undo", id_="editor_undo"),
        button("Redo", "editor-redo", id_="editor_redo"),
        button("Discard …", "editor-discard", id_="editor_discard"),
        button("Train with them", "editor-train", title="Back to the Train page, with these pictures"),
        button("Other pictures", "editor-other"),
        class_="row",
    )
    counts = tag("span", id_="editor_counts", class_="status", role="status")
    return tag("div", tag("div", tag("h3", id_="editor_name"), counts, class_="title"), buttons, class_="editor_head")


def _task() -> Markup:
    bar = tag("div", tag("div", id_="editor_bar_fill", class_="bar_fill"), id_="editor_bar", class_="bar",
              role="progressbar", aria_valuemin=0, aria_valuemax=100, aria_label="Progress")  # fmt: skip
    # Only what is done is spoken by screen readers, not how far it is.
    text = tag("span", id_="editor_task_text", role="status")
    count = tag("span", id_="editor_task_count", class_="status")
    return tag("div", text, count, bar, button("Cancel", "editor-cancel"), id_="editor_task", class_="strip",
               hidden=True)  # fmt: skip


def _filters() -> Markup:
    text = tag("input", type="text", id_="editor_text", placeholder="words in captions or names", spellcheck="false",
               aria_label="Find by text")  # fmt: skip
    state = _select("editor_state", STATES, "Which pictures are shown")
    problem = tag("select", tag("option", "With or without problems", value=""), id_="editor_kind", hidden=True,
                  aria_label="Find by problem")  # fmt: skip
    how = _select("editor_how", TAG_FILTERS, "How the tag is looked for")
    wanted = tag("input", type="text", id_="editor_tag", placeholder="a tag, then Enter", spellcheck="false",
                 list="lora_trainer_editor_known", aria_label="Find by tag")  # fmt: skip
    known = tag("datalist", id_="editor_known")
    chips = tag("div", id_="editor_chips", class_="chips")
    return tag("div", text, state, problem, tag("span", how, wanted, class_="inline"), known, chips, class_="filters",
               role="search")  # fmt: skip


def _panels() -> Markup:
    openers = [
        button(title, "editor-panel", data_panel=name, aria_expanded="false", title=hint, id_=f"editor_opens_{name}")
        for name, title, hint in PANELS
    ]
    bodies = [
        tag("div", tag("div", id_="editor_tags"), id_="editor_panel_tags", class_="tool", hidden=True),
        tag("div", *_many(), id_="editor_panel_many", class_="tool", hidden=True),
        tag("div", *_caption(), id_="editor_panel_caption", class_="tool", hidden=True),
        tag("div", *_check(), id_="editor_panel_check", class_="tool", hidden=True),
        tag("div", *_export(), id_="editor_panel_export", class_="tool", hidden=True),
    ]
    return Markup(tag("div", *openers, class_="row") + "".join(bodies))


def _many() -> list[Markup]:
    fields = tag(
        "div",
        _field("What to do", _select("editor_action", ACTIONS), "editor_action"),
        _field("Tags", _input("editor_old", placeholder="red hat, blue sky"), "editor_old",
               needed="remove replace move mark"),
        _field("Pattern", _input("editor_pattern"), "editor_pattern", needed="regex"),
        _field("New text", _input("editor_value"), "editor_value", needed="add replace regex"),
        _field("Place", _select("editor_place", (("start", "at the start"), ("end", "at the end"))), "editor_place",
               needed="add move"),
        _field("Mark as", _select("editor_mark", (("core", "core: always kept"), ("mood", "mood: dropped more often"),
                                                  ("none", "neither"))), "editor_mark", needed="mark"),
        class_="fields",
    )  # fmt: skip
    return [
        fields,
        tag("div", button("Change them", "editor-apply", kind="primary"), button("Exclude", "editor-exclude-many"),
            button("Include again", "editor-include-many"), tag("span", id_="editor_scope", class_="help"),
            class_="row"),
    ]  # fmt: skip


def _caption() -> list[Markup]:
    fields = tag(
        "div",
        _field("Captioner", tag("select", id_="editor_captioner"), "editor_captioner"),
        _field("Captions that are there", _select("editor_mode", MODES), "editor_mode"),
        _field("Kind", tag("select", id_="editor_caption_kind"), "editor_caption_kind"),
        _field("Trigger word", _input("editor_trigger"), "editor_trigger"),
        _field("Template", _input("editor_template", value="{caption}"), "editor_template"),
        class_="fields",
    )
    return [
        fields,
        tag("p", id_="editor_captioner_problem", class_="problem", role="alert", hidden=True),
        tag("div", button("Caption them", "editor-caption", kind="primary", id_="editor_caption_go", disabled=True),
            tag("span", id_="editor_caption_scope", class_="help"), class_="row"),
    ]  # fmt: skip


def _check() -> list[Markup]:
    return [
        tag("div", button("Check now", "editor-check", kind="primary"),
            button("Fix all that is safe", "editor-fix-all", id_="editor_fix_all", hidden=True),
            tag("span", id_="editor_verdict", class_="status", role="status"), class_="row"),
        tag("ul", id_="editor_findings", class_="findings"),
        tag("details", tag("summary", "Sizes and steps"), tag("div", id_="editor_buckets"), id_="editor_sizes",
            class_="quiet", hidden=True),
    ]  # fmt: skip


def _export() -> list[Markup]:
    return [
        tag("div", _select("editor_format", FORMATS, "Format"), button("Export", "editor-export", kind="primary"),
            tag("span", "It is written into the folder, beside what is there.", class_="help"), class_="row"),
        tag("div", tag("strong", "Backups"), tag("ul", id_="editor_backups", class_="findings")),
    ]  # fmt: skip


def _gallery() -> Markup:
    pager = tag(
        "div",
        button("Earlier", "editor-earlier", id_="editor_earlier"),
        tag("span", id_="editor_range", class_="status", role="status"),
        button("Later", "editor-later", id_="editor_later"),
        tag("button", "Select all", type="button", class_="button link", data_action="editor-select-all",
            id_="editor_select_all"),
        class_="row",
    )  # fmt: skip
    grid = tag("ul", id_="editor_grid", class_="grid_of_pictures", aria_label="Pictures")
    empty = tag("p", "No picture passes the filter.", id_="editor_empty", class_="lead", hidden=True)
    return tag("div", grid, empty, pager, class_="gallery")


def _picture() -> Markup:
    tools = tag(
        "div",
        button("Turn left", "editor-left"),
        button("Turn right", "editor-right"),
        tag("button", "Crop", type="button", class_="button secondary", data_action="editor-crop", id_="editor_crop",
            aria_pressed="false", title="Then drag over the picture, or use the arrow keys"),
        button("Whole picture", "editor-whole", id_="editor_whole"),
        button("Exclude", "editor-exclude", id_="editor_exclude"),
        class_="row",
    )  # fmt: skip
    keys = "← → another picture · Enter edits and keeps · Escape puts the caption back · Ctrl+Z undo · Ctrl+S save"
    return tag(
        "div",
        tag("div", tag("strong", id_="editor_file"), tag("span", id_="editor_place_of", class_="help"), class_="title"),
        tag("canvas", id_="editor_canvas", class_="large_picture", role="img", tabindex=-1, width=512, height=512),
        tools,
        tag("label", "Caption", for_="editor_caption"),
        tag("textarea", id_="editor_caption", rows=4, spellcheck="false", aria_describedby="editor_count"),
        tag("div", id_="editor_items", class_="chips", role="group", aria_label="Tags of this caption"),
        tag("div", id_="editor_item_tools", class_="row", hidden=True),
        tag("div", id_="editor_suggestions", class_="chips", hidden=True),
        tag("div", tag("strong", "What the tokenizer reads"), tag("span", id_="editor_count", class_="help"),
            class_="title"),
        tag("div", id_="editor_tokens", class_="tokens"),
        tag("p", id_="editor_warnings", class_="help", hidden=True),
        tag("p", keys, class_="help"),
        class_="detail",
        id_="editor_detail",
    )  # fmt: skip


def _field(text: str, control: Markup, name: str, *, needed: str | None = None) -> Markup:
    return tag("div", tag("label", text, for_=name), control, class_="field", data_needed=needed)


def _input(name: str, *, value: str = "", placeholder: str | None = None) -> Markup:
    return tag("input", type="text", id_=name, value=value, placeholder=placeholder, spellcheck="false",
               autocomplete="off")  # fmt: skip


def _select(name: str, options: tuple[tuple[str, str], ...], label: str | None = None) -> Markup:
    rows = [tag("option", text, value=value) for value, text in options]
    return tag("select", *rows, id_=name, aria_label=label)
