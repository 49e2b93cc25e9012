"""The fourth sub-tab: tools on finished LoRAs. Each makes a new one."""

from __future__ import annotations

from lora_trainer.ui.markup import Markup, button, tag

_PRECISIONS = (("", "as in the file"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "fp32"))
_LAYOUTS = (
    ("kohya", "kohya: the WebUIs and ComfyUI"),
    ("diffusers", "diffusers: a file to download"),
    ("peft", "PEFT: a folder to download, as .zip"),
)


def create_ui() -> Markup:
    lead = tag("p", "Each tool makes a new LoRA in your LoRA folder. What it reads stays as it is, and nothing is"
               " overwritten.", class_="lead")  # fmt: skip
    empty = tag("p", "There is no LoRA in your LoRA folder yet.", id_="tools_empty", class_="lead", hidden=True)
    state = tag(
        "div",
        tag("span", id_="tools_status", class_="status", role="status"),
        button("Cancel", "tools-cancel", id_="tools_cancel", hidden=True),
        class_="row",
    )
    problem = tag("p", id_="tools_problem", class_="problem", role="alert", hidden=True)
    tools = (_strength(), _resize(), _combine(), _extract(), _convert(), _edit())
    return tag("div", lead, empty, state, problem, *tools, class_="page", id_="tools")


def _tool(kind: str, title: str, sentence: str, action: str, *fields: Markup, open_: bool = False) -> Markup:
    return tag(
        "details",
        tag("summary", tag("strong", title), tag("span", sentence, class_="help")),
        tag(
            "form",
            tag("div", *fields, class_="fields"),
            tag("div", button(action, "tools-run", kind="primary"), class_="row"),
            tag("p", class_="problem", role="alert", hidden=True),
            data_tool=kind,
            novalidate=True,
        ),
        class_="card lora_tool",
        open=open_,
    )


def _field(tool: str, name: str, label: str, control: str = "input", *children: Markup, **attributes: object) -> Markup:
    """attributes: of the control; ``title`` is the label's."""
    title = attributes.pop("title", None)
    identifier = f"tools_{tool}_{name}"
    made = tag(control, *children, id_=identifier, data_name=name, spellcheck="false", **attributes)
    return tag("div", tag("label", label, for_=identifier, title=title), made, class_="field")


def _lora(tool: str) -> Markup:
    return _field(tool, "lora", "LoRA", "select", data_list="loras")


def _base(tool: str, name: str = "base", label: str = "Base model", usual: bool = True) -> Markup:
    title = "Only needed where it is not a usual SD 1.5, SD 2 or SDXL" if usual else None
    return _field(tool, name, label, "select", data_list="bases", data_usual=usual, title=title)


def _output(tool: str) -> Markup:
    return _field(tool, "output", "Name of the new LoRA", type="text", autocomplete="off")


def _number(tool: str, name: str, label: str, title: str, value: str = "") -> Markup:
    return _field(tool, name, label, type="text", inputmode="decimal", data_type="number", title=title, value=value)


def _choice(tool: str, name: str, label: str, choices: tuple[tuple[str, str], ...]) -> Markup:
    options = [tag("option", text, value=value) for value, text in choices]
    return _field(tool, name, label, "select", *options)


def _size(tool: str) -> tuple[Markup, Markup, Markup]:
    return (
        _number(tool, "rank", "Rank", "Of every layer at most, such as 8"),
        _number(tool, "share", "Share to keep", "Of each layer's change, such as 0.95; with both, the smaller counts"),
        _choice(tool, "precision", "Number format", _PRECISIONS),
    )


def _strength() -> Markup:
    return _tool(
        "strength", "Strength by block", "How strongly a LoRA changes each block of the model.", "Measure",
        _lora("strength"), _base("strength"), open_=True,
    )  # fmt: skip


def _resize() -> Markup:
    return _tool(
        "resize", "Resize", "The best approximation of a lower rank: a smaller file.", "Resize it",
        _lora("resize"), *_size("resize"), _base("resize"), _output("resize"),
    )  # fmt: skip


def _combine() -> Markup:
    parts = tag("div", id_="tools_parts", class_="field")
    return _tool(
        "combine", "Combine", "One LoRA that does at weight 1 what several do at theirs: exactly, or at a lower rank.",
        "Combine them", parts, *_size("combine"), _base("combine"), _output("combine"),
    )  # fmt: skip


def _extract() -> Markup:
    return _tool(
        "extract", "Extract", "The LoRA that turns one base model into another that was made from it.", "Extract it",
        _base("extract", usual=False), _base("extract", "tuned", "What it became", usual=False),
        _number("extract", "rank", "Rank", "Of every layer at most, such as 32", "32"),
        _number("extract", "conv_rank", "Rank of convolutions", "0 leaves them out", "0"),
        _number("extract", "share", "Share to keep", "Of each layer's change that is enough, such as 0.95"),
        _output("extract"),
    )  # fmt: skip


def _convert() -> Markup:
    return _tool(
        "convert", "Convert", "The same LoRA under the names of another program.", "Convert it",
        _lora("convert"), _choice("convert", "layout", "For", _LAYOUTS),
        _choice("convert", "precision", "Number format", _PRECISIONS), _base("convert"), _output("convert"),
    )  # fmt: skip


def _edit() -> Markup:
    return _tool(
        "edit", "Edit", "Other words in the file and on its card; the weights stay the same.", "Save as a new LoRA",
        _lora("edit"), _field("edit", "trigger", "Activation text", type="text", data_entry="modelspec.trigger_phrase"),
        _field("edit", "title", "Title", type="text", data_entry="modelspec.title"),
        _field("edit", "description", "Description", "textarea", rows=2, data_entry="modelspec.description"),
        _output("edit"),
    )  # fmt: skip
