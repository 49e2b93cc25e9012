"""The first sub-tab: what to learn from, what it is, Start; and what is going on."""

from __future__ import annotations

from lora_trainer.planning.presets import PRESETS
from lora_trainer.ui.change_step import choice_of_ways, in_way, pair, way_of, words
from lora_trainer.ui.form import advanced, field
from lora_trainer.ui.markup import Markup, button, card, tag
from lora_trainer.ui.text_step import model_folder, rows_card


def create_ui(*, offer_folders: bool = True) -> Markup:
    """``offer_folders``: whether a folder of the server may be named."""
    first = (_data(offer_folders), rows_card(offer_folders))
    steps = tag("div", *first, _kind(), _start(offer_folders), class_="steps")
    form = tag("form", steps, id_="form", novalidate=True)
    return tag("div", _trouble(), form, _live(), _advanced(), class_="page")


def _trouble() -> Markup:
    return tag("p", id_="trouble", class_="notice problem", role="alert", hidden=True)


def _data(offer_folders: bool) -> Markup:
    """The first step of image models: pictures, a pair of them, or words."""
    return card(
        "1",
        "What to learn from",
        None,
        choice_of_ways(),
        tag("div", *_pictures(offer_folders), class_="way", data_way="pictures"),
        tag("div", *pair(offer_folders), class_="way other_way", data_way="pair"),
        tag("div", *words(), class_="way other_way", data_way="words"),
        tag("p", id_="problem_train_data_dir", class_="problem", role="alert", hidden=True),
        task="image",
    )


def _pictures(offer_folders: bool) -> list[Markup]:
    drop = tag(
        "label",
        tag("strong", "Drop pictures here"),
        tag("span", "or click to choose them"),
        tag("input", type="file", id_="files", class_="spoken", multiple=True,
            accept="image/*,.txt,.caption,.csv,.jsonl", aria_label="Choose pictures"),
        id_="drop",
        class_="drop",
    )  # fmt: skip
    folder = tag(
        "div",
        tag("label", "Folder on the server", for_="folder"),
        tag("div",
            tag("input", type="text", id_="folder", spellcheck="false", autocomplete="off",
                placeholder="/path/to/pictures"),
            button("Use it", "use-folder"),
            class_="inline"),
        class_="field",
    )  # fmt: skip
    earlier = tag("div", tag("label", "Pictures from before", for_="earlier"),
                  tag("select", id_="earlier"), class_="field", id_="earlier_field", hidden=True)  # fmt: skip
    other = [earlier, folder] if offer_folders else [earlier]
    sentence = "Twenty clear ones of one thing do more than a hundred of many. Captions (.txt, .csv) may come along."
    return [
        tag("p", sentence, class_="lead"),
        drop,
        tag("details", tag("summary", "Use a folder instead" if offer_folders else "Use earlier pictures"),
            *other, id_="other_pictures", class_="quiet", hidden=not offer_folders),
        tag("div", id_="thumbnails", class_="thumbnails", hidden=True),
        tag("p", id_="upload", class_="status", hidden=True),
        tag("p", id_="pictures", class_="status", role="status", hidden=True),
        tag("div", button("Caption them", "caption-chosen"), button("Edit", "edit-chosen"),
            tag("span", id_="unsaved", class_="help", role="status"), id_="picture_links", class_="row", hidden=True),
        tag("details", tag("summary"), tag("ul"), id_="refused", class_="quiet", hidden=True),
        tag("ul", id_="hints", class_="hints", hidden=True),
    ]  # fmt: skip


def _kind() -> Markup:
    choices = [
        tag("label", tag("input", type="radio", name="lora_trainer_kind", value=kind, checked=kind == "character",
                         data_task=preset.task),
            tag("span", preset.title), class_=in_way("choice", way_of(preset.task)), title=preset.hint,
            data_way=way_of(preset.task))
        for kind, preset in PRESETS.items()
    ]  # fmt: skip
    hints = [
        tag("p", preset.hint, class_="help", data_hint=kind, hidden=kind != "character")
        for kind, preset in PRESETS.items()
    ]
    return card(
        "2",
        "What is it?",
        "The kind chooses fitting settings; the name is what you will type in a prompt.",
        tag("fieldset", tag("legend", "Kind", class_="spoken"), *choices, class_="choices"),
        Markup("".join(hints)),
        tag("div", tag("label", "Preset of your own", for_="preset"), tag("select", id_="preset"), class_="field",
            id_="preset_field", hidden=True),
        field("output_name", text="Name", placeholder="my_face_v2", explained=False),
        field("trigger_word", text="Trigger word", placeholder="a word of your own, such as zwxface"),
        tag("p", id_="origin", class_="notice", hidden=True),
    )


def _start(offer_folders: bool) -> Markup:
    model = tag("div", tag("label", "Base model", for_="field_base_model", title=_BASE_HELP),
                tag("select", id_="field_base_model", data_setting="base_model", data_type="choice",
                    aria_describedby="problem_base_model"),
                tag("p", id_="problem_base_model", class_="problem", role="alert", hidden=True),
                class_="field", data_field="base_model")  # fmt: skip
    folder = [model_folder()] if offer_folders else []
    facts = tag(
        "dl",
        *(tag("div", tag("dt", title), tag("dd", "–", id_=f"fact_{name}"), title=explanation, data_task=task)
          for name, title, explanation, task in _FACTS),
        class_="facts",
    )  # fmt: skip
    return card(
        "3",
        "Train",
        "Everything is checked first; these numbers say what the training will do.",
        model,
        *folder,
        facts,
        tag("p", id_="shorter", class_="help", hidden=True),
        tag("button", "Start training", type="button", id_="start", class_="button primary", data_action="start"),
        tag("p", id_="problem_", class_="problem", role="alert", hidden=True),
        tag("p", "You can keep generating while it trains, and close this page.", class_="help"),
    )


_BASE_HELP = "The model that learns from your pictures. The LoRA works with its relatives as well."

_FACTS = (
    ("sum", "What is seen", "In an epoch every picture is seen as often as its repeats say", None),
    ("steps", "Steps", "One step learns from one batch of pictures", None),
    ("buckets", "Sizes", "Pictures of like shape are trained together (buckets), in pixels", "image"),
    ("tokens", "Tokens", "The pieces of words that the model reads; the answers are what it learns", "text"),
    ("time", "Time", "As similar trainings took here when nothing else ran, with all that belongs to it; before the"
     " first one, a forecast from a short trial", None),
    ("memory", "Memory", "As a similar training took here; before the first one, a forecast for the whole device",
     None),
)


def _advanced() -> Markup:
    yaml = tag(
        "details",
        tag("summary", tag("span", "As YAML, in and out")),
        tag("div",
            tag("p", "The same settings as a file for the command line: python -m lora_trainer train --config …"
                " Settings of kohya's GUI, sd-scripts, ai-toolkit and OneTrainer are understood too.", class_="help"),
            tag("textarea", id_="yaml", rows=12, spellcheck="false", aria_label="Settings as YAML",
                aria_describedby="problem_yaml"),
            tag("p", id_="problem_yaml", class_="problem", role="alert", hidden=True),
            tag("ul", id_="translation", class_="hints", role="status", hidden=True),
            tag("div",
                button("Show the settings here", "yaml-out"),
                button("Use these settings", "yaml-in"),
                tag("label", "Open a file", tag("input", type="file", id_="yaml_file", class_="spoken",
                    accept=".yaml,.yml,.txt,.json,.toml"), class_="button secondary"),
                button("Download", "yaml-download"),
                class_="row"),
            class_="fields wide"),
        class_="group",
    )  # fmt: skip
    summary = tag("summary", tag("span", "Advanced"), tag("span", id_="changed", class_="changed"))
    hint = tag(
        "p",
        "Nothing here needs to be touched. Values follow the kind, the number of pictures and the model until you"
        " change one.",
        class_="help",
    )
    search = tag("div",
                 tag("input", type="text", id_="find", spellcheck="false", autocomplete="off",
                     placeholder="find a setting", aria_label="Find a setting"),
                 tag("span", id_="found", class_="help", role="status"), class_="row find")  # fmt: skip
    return tag("details", summary, hint, search, advanced(), _presets(), yaml, id_="advanced", class_="advanced")


def _presets() -> Markup:
    fields = tag(
        "div",
        tag("p", "Saves what is set here under a name, to be chosen in step 2: for other pictures, names and models.",
            class_="help"),
        tag("div",
            tag("input", type="text", id_="preset_name", spellcheck="false", autocomplete="off",
                placeholder="name of the preset", aria_label="Name of the preset"),
            button("Save as preset", "preset-save"),
            tag("span",
                button("Rename it", "preset-rename"),
                button("Delete …", "preset-delete"),
                id_="preset_chosen", class_="row", hidden=True),
            class_="row"),
        tag("p", id_="preset_message", class_="problem", role="alert", hidden=True),
        class_="fields wide",
    )  # fmt: skip
    return tag("details", tag("summary", tag("span", "Presets of your own")), fields, class_="group")


def _live() -> Markup:
    progress = tag("div", tag("div", id_="bar_fill", class_="bar_fill"), id_="bar", class_="bar", role="progressbar",
                   aria_valuemin=0, aria_valuemax=100, aria_label="Progress")  # fmt: skip
    head = tag("div", tag("h3", id_="job_name"), tag("span", id_="job_state", class_="state"),
               tag("span", id_="job_base", class_="base"), progress,
               tag("span", id_="job_percent", class_="percent"), class_="strip")  # fmt: skip
    facts = tag("p", id_="job_facts", class_="status")  # which a screen reader would speak at every step
    buttons = tag("div", id_="job_buttons", class_="row")
    curve = tag("figure", tag("figcaption", tag("span", "Curves"), tag("span", id_="curve_reading")),
                tag("div", id_="curve", class_="curve"), class_="panel")  # fmt: skip
    previews = tag("figure", tag("figcaption", tag("span", "Previews"), tag("span", id_="preview_step")),
                   tag("div", id_="previews", class_="previews"), class_="panel", id_="preview_panel")  # fmt: skip
    log = tag("details", tag("summary", "Log"), tag("pre", id_="log", tabindex=0, aria_label="Log"),
              class_="quiet", id_="log_box")  # fmt: skip
    job = tag("section", head, facts, tag("div", id_="job_message", class_="notice", role="status", hidden=True),
              buttons, tag("div", curve, previews, class_="panels"), log, id_="live", class_="card live",
              hidden=True, tabindex=-1, aria_label="The current training")  # fmt: skip
    cut_off = tag("section", tag("h3", "Cut off"), tag("ul", id_="interrupted_list"), id_="interrupted", class_="card",
                  hidden=True)  # fmt: skip
    queue = tag("section", tag("h3", "Queue"), tag("ol", id_="queue_list"), id_="queue", class_="card", hidden=True)
    return Markup(cut_off + job + queue)
