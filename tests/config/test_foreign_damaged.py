"""Other trainers' files with values of the wrong kind, and texts that are long: one sentence each, and soon."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest

from lora_trainer.config import from_mapping, load, read_text, to_yaml
from lora_trainer.config.foreign import read_what_can_be_read, translate
from lora_trainer.config.foreign.formats import parse_any
from lora_trainer.config.parse import parse_overrides
from lora_trainer.errors import UserError
from tests.config import foreign_presets as presets

PLACES = Path("/models/base.safetensors"), Path("/data"), Path("/out")
DOCUMENTS = {
    "kohya_gui": parse_any(presets.kohya_gui(*PLACES)),
    "sd_scripts": parse_any(presets.sd_scripts(*PLACES)),
    "dataset_config": parse_any(presets.dataset_config(*PLACES)),
    "ai_toolkit": parse_any(presets.ai_toolkit(*PLACES)),
    "onetrainer": parse_any(presets.onetrainer(*PLACES)),
}
VALUES = ("x", "it's", [1], [["a"]], {"a": 1}, None, -1, True, 1.5, 10**400, "9" * 5000, ["a=" + "-" * 20000],
          "a={[]: 1}")  # fmt: skip


def places(value, before=()):
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in pairs:
        yield (*before, name)
        yield from places(part, (*before, name))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_value_of_the_wrong_kind_is_taken_or_refused_with_a_sentence(name):
    for place in places(DOCUMENTS[name]):
        for value in VALUES:
            changed = copy.deepcopy(DOCUMENTS[name])
            holder = changed
            for step in place[:-1]:
                holder = holder[step]
            holder[place[-1]] = value
            try:
                translation = translate(changed, Path("/nowhere"), toml=name == "sd_scripts")
                if translation is not None:
                    json.dumps(translation.to_json())
                to_yaml(from_mapping(translation.settings if translation else changed))
            except UserError as error:
                assert str(error)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (presets.onetrainer(*PLACES, unet="x"), "unet"),
        (presets.onetrainer(*PLACES, concepts=[{"path": "/a", "balancing": "x"}]), "concepts.balancing"),
        (presets.onetrainer(*PLACES, concepts=[{"path": "/a", "image": 3}]), "concepts.image"),
        (presets.ai_toolkit(*PLACES, max_denoising_steps="x"), "max_timestep"),
        ("general = 3\n[[datasets]]\nresolution = 64\n", "general"),
        ("[[datasets]]\nsubsets = [1]\n", "datasets.subsets"),
        (json.dumps({"LoRA_type": "x", "unheard": [[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]}), "unheard"),
    ],
)
def test_the_field_of_a_value_of_the_wrong_kind_is_named(text, field):
    with pytest.raises(UserError) as caught:
        from_mapping(read_text(text)[0])
    assert caught.value.field == field


def test_free_text_of_kohyas_gui_is_cut_at_spaces_as_there():
    settings, _ = read_text(presets.kohya_gui(*PLACES, additional_parameters="--training_comment it's --seed 7"))
    assert from_mapping(settings).description == "it's" and settings["seed"] == 7


def test_one_name_of_a_prompt_file_too_long_for_the_disk_is_no_crash(tmp_path):
    text = presets.sd_scripts(*PLACES, f'sample_prompts = "{"x" * 5000}"')
    assert "sample_prompts" in {one.theirs for one in read_text(text, folder=tmp_path)[1].unmet}


@pytest.mark.parametrize("value", ["!!timestamp x", "!!bool x", "!!int ''"])
def test_a_value_that_does_not_fit_its_yaml_tag_is_a_line_that_is_wrong(value):
    with pytest.raises(UserError, match=r"line 1|YAML"):
        read_text(f"epochs: {value}\n")
    assert parse_overrides([f"epochs={value}"]) == {"epochs": value}


LONG = {
    "one name often": "a:\n" * 60_000,
    "one name often, below the limit": "a:\n" * 9_000,
    "JSON that is broken": '{"a": 1,,\n' + '"b": x\n' * 24_000,
    "wrong lines": "a b: c: d\n" * 9_000,
    "names that do not exist": "".join(f"k{number}: 1\n" for number in range(9_000)),
    "a bracket that is not closed": "a: [\n" + "b c\n" * 9_000,
    "a name of many parts": "a" + ".a" * 90_000 + " = 1\n",
    "folders with a name of their own each": "[[datasets]]\n"
    + "".join(f"[[datasets.subsets]]\nx{number}=1\n" for number in range(4_000)),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_is_answered_soon(name):
    begin = time.process_time()
    with pytest.raises(UserError):
        values, _, problems = read_what_can_be_read(LONG[name])
        from_mapping({**values, "epochs": 0}, problems)
    assert time.process_time() - begin < 5


def test_a_file_that_is_no_settings_is_not_read_whole(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("a" * 300_000)
    with pytest.raises(UserError, match="more than 200000 characters"):
        load(path)
