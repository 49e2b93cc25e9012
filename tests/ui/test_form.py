"""The page as HTML: every setting once, labelled; nothing that touches the host's page; every word in Chinese."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from lora_trainer.api.jobs import COMMANDS
from lora_trainer.captioning.registry import KINDS
from lora_trainer.config import TrainConfig, field_docs, from_mapping, settings_where
from lora_trainer.ui import dataset_tab, markup, results_tab, tools_tab, train_tab
from lora_trainer.ui.form import control
from lora_trainer.ui.settings import OPTIONS
from tests.ui.words import ROOT, read_html, sentences_of_file, words_of_scripts, words_of_the_server

SCRIPTS = sorted((ROOT / "javascript").glob("*.js"))
CSS = (ROOT / "style.css").read_text(encoding="utf-8")
HOST_CAPTIONERS = ("The WebUI's BLIP, a sentence", "The WebUI's deepbooru, tags")
FINDINGS = set(re.findall(
    r'"([a-z0-9]+(?:-[a-z]+)*)"(?:, |: \()(?:"(?:error|warning|info)"|severity\b)',
    "".join(re.sub(r",\s+", ", ", path.read_text(encoding="utf-8"))
            for path in sorted((ROOT / "lora_trainer" / "dataset").glob("*check*.py"))),
)) - {"error", "warning"}
CHINESE = json.loads((ROOT / "localizations" / "zh_CN.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_trainer.devices.gpu_count", lambda: 2)  # with fewer there is no field for them
        return read_html(*(one.create_ui() for one in (train_tab, dataset_tab, results_tab, tools_tab)))


def controls(page):
    return {attributes["data-setting"]: (tag, attributes) for tag, attributes in page.elements
            if "data-setting" in attributes}  # fmt: skip


def test_every_setting_is_asked_for_once(page):
    named = [attributes["data-setting"] for _, attributes in page.elements if "data-setting" in attributes]
    asked = [field.name for field in dataclasses.fields(TrainConfig)]
    elsewhere = {"train_data_dir", "output_dir", "cache_dir"}  # the first step's pictures, and what a job decides
    elsewhere |= set(settings_where(lambda facts: facts.given_by == "file"))
    assert sorted(named) == sorted(set(asked) - elsewhere)


def test_the_explanations_are_those_of_the_schema(page):
    for name in controls(page):
        if name != "base_model":
            assert field_docs()[name] in page.words


def test_every_control_has_a_label_and_its_own_place_for_problems(page):
    labelled = {attributes.get("for") for tag, attributes in page.elements if tag == "label"}
    for name, (_, attributes) in controls(page).items():
        assert attributes["id"] == f"lora_trainer_field_{name}" and attributes["id"] in labelled
        described = attributes["aria-describedby"].split()
        assert f"lora_trainer_problem_{name}" in described and set(described) <= set(page.ids)
    for tag, attributes in page.elements:
        if tag in ("input", "select", "textarea") and "data-setting" not in attributes:
            assert attributes.get("aria-label") or attributes.get("id") in labelled or attributes.get("type") in (
                "radio", "file"), attributes  # these stand inside their label  # fmt: skip


def test_the_values_in_the_page_are_the_defaults(page):
    values = {}
    for name, (tag, attributes) in controls(page).items():
        if attributes["data-type"] == "boolean":
            values[name] = "checked" in attributes
        elif tag == "input":
            values[name] = attributes["value"]
    assert from_mapping({name: value for name, value in values.items() if value != ""}) == TrainConfig()


def test_ids_are_ours_and_unique(page):
    assert all(name.startswith(markup.PREFIX) for name in [*page.ids, *page.classes])
    assert len(page.ids) == len(set(page.ids))


def test_styles_stay_inside_the_page():
    rules = re.sub(r"/\*.*?\*/|@media[^{]*\{", "", CSS, flags=re.DOTALL)
    selectors = [one.strip() for rule in re.findall(r"([^{}]+)\{[^{}]*\}", rules) for one in rule.split(",\n")]
    assert len(selectors) > 100
    for selector in selectors:
        for one in re.split(r",(?![^(]*\))", selector):
            assert re.match(r"(\.dark )?#lora_trainer\b", one.strip()), one


def test_colors_are_the_hosts():
    bare = re.sub(r"var\([^()]*\)|in srgb", "", CSS)  # a color may stand as the fallback of a variable only
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b|rgb|hsl", bare)


def test_names_of_classes_in_scripts_have_a_style_or_are_found_by_them():
    named = {name for path in SCRIPTS for names in re.findall(r'class: "([^"]+)"', path.read_text(encoding="utf-8"))
             for name in names.split()}  # fmt: skip
    everything = CSS + "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    loose = {name for name in named if f".lora_trainer_{name}" not in everything}
    assert loose <= {"series", "secondary", "run_text"}, loose


def test_every_word_is_in_chinese(page):
    settings = {field.name for field in dataclasses.fields(TrainConfig)}
    words = {"no", "yes", "automatic", "reset", "neither"}
    choices = {word for word in page.words if re.fullmatch(r"[a-z0-9_]+|–", word)} - words
    examples = {"my_face_v2", "weight_decay: 0.01"}
    elsewhere = {"Dataset", "Runs", "Tools", "Train", "Use earlier pictures", "LoRA trainer"}
    said = (page.words | words_of_scripts() | elsewhere) - settings - choices - examples
    said |= {"before", "failed", "finished", "interrupted", "paused", "stopped", "stopping", "training"}
    said |= {option.label for option in OPTIONS} | {label for option in OPTIONS for label, _ in option.choices}
    said |= {kind.title for kind in KINDS.values()} | set(HOST_CAPTIONERS)
    said |= {*FINDINGS, "Exclude the picture", "Crop to 2:1 around the center"}
    assert not (missing := said - set(CHINESE)), f"not translated: {missing}"
    assert not (gone := set(CHINESE) - said - words_of_the_server()), f"not said any more: {gone}"


ON_THE_COMMAND_LINE = ("cli/", "demo/", "run/engine.py", "training/processes.py", "training/watch.py")
"""Files that speak to the terminal alone: commands, and trainings in several processes."""
NOT_FOR_THE_PAGE = {
    "adapters/base.py": {"{0}: adapters of grouped convolutions are not defined."},
    "adapters/inject.py": {"This adapter set is attached already."},
    "adapters/masks.py": {"Dropout needs AdapterSet.begin_step before each step."},
    "adapters/tensor_file.py": {"{0} is not what was announced."},
    "api/jobs.py": set(COMMANDS.values()),
    "api/route.py": {"{0}."},
    "config/foreign/report.py": {"{0}: settings of {1}."},
    "dataset/text/templates.py": {"{0}{1}. Write a response that appropriately completes the request."},
    "jobs/publishing.py": {
        "Trained on {0} with {1}.", "{0} steps, batch {1}, {2}, {3}.",
        "{0}, learning rate {1}, {2}, seed {3}.", "Last loss {0}.",
    },
    "training/graphs.py": {"too little memory is free for their activations."},
}  # fmt: skip
"""For programmers, the log, the API's documentation and the LoRA's card."""


def test_what_a_person_may_be_told_on_the_page_is_in_chinese():
    missing = {}
    for path in sorted((ROOT / "lora_trainer").rglob("*.py")):
        name = path.relative_to(ROOT / "lora_trainer").as_posix()
        if name.startswith(ON_THE_COMMAND_LINE):
            continue
        said = sentences_of_file(path)
        assert NOT_FOR_THE_PAGE.get(name, set()) <= said, f"{name} does not say it any more"
        missing[name] = said - set(CHINESE) - NOT_FOR_THE_PAGE.get(name, set())
    assert {name: texts for name, texts in missing.items() if texts} == {}


def test_translations_keep_what_is_filled_in():
    for text, chinese in CHINESE.items():
        assert sorted(re.findall(r"\{\w+\}", chinese)) == sorted(re.findall(r"\{\w+\}", text)), text
        assert chinese.strip()


def test_scripts_make_no_html_of_text_and_one_global():
    for path in SCRIPTS:
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", source), path.name
        assert len(source.splitlines()) < 350, path.name
        outside = re.findall(r"^(?:var|let|const|function|window\.)\s*(\w+)", source, flags=re.MULTILINE)
        assert set(outside) <= {"loraTrainer"}, path.name


def test_markup_escapes_what_is_not_markup():
    made = markup.tag("p", "<b>", markup.tag("i", "&"), title='"x"', hidden=True, lang=None, data_n=0)
    assert made == '<p title="&quot;x&quot;" hidden data-n="0">&lt;b&gt;<i>&amp;</i></p>'


def test_folders_of_the_server_are_offered_only_where_they_may_be_named():
    assert "lora_trainer_folder" in read_html(train_tab.create_ui(offer_folders=True)).ids
    assert "lora_trainer_folder" not in read_html(train_tab.create_ui(offer_folders=False)).ids


def test_a_setting_that_is_a_word_or_a_number_takes_both():
    markup = control("min_snr_gamma", {})
    assert "<input" in markup and 'value="auto"' in markup and 'data-type="number"' in markup


def test_a_setting_that_is_a_word_beside_yes_and_no_offers_the_three():
    elements = read_html(control("gradient_checkpointing", {})).elements
    options = [attributes for tag, attributes in elements if tag == "option"]
    assert [(one["value"], "selected" in one) for one in options] == [("auto", False), ("true", False), ("false", True)]
