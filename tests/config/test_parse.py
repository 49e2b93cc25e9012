from __future__ import annotations

import dataclasses
import typing

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer.config import TrainConfig, field_docs, from_mapping, load, parse_yaml, to_mapping, to_yaml
from lora_trainer.config.names import ALIASES
from lora_trainer.config.parse import parse_overrides
from lora_trainer.errors import ConfigError, UserError

ARTICLES = {
    "one": """
train_data_dir: "./data/style_train"
metadata_path: "./data/style_train/metadata.csv"
base_model: "./models/Stable-diffusion/v1-5-pruned.safetensors"
lora_rank: 8
unet_target_modules: ["q_proj", "v_proj"]
batch_size: 4
epochs: 10
learning_rate: 2e-4
output_dir: "./output/my_style_lora"
save_steps: 100
""",
    "two": """
train_data_dir: "./data/style_train"
metadata_path: "./data/style_train/metadata.csv"
base_model: "./models/Stable-diffusion/v1-5-pruned.safetensors"
lora_rank: 8
alpha: 16
batch_size: 4
epochs: 10
learning_rate: 2e-4
output_dir: "./output/my_style_lora"
save_steps: 100
""",
    "three": """
train_data_dir: "./data/style_train"
metadata_path: "./data/style_train/metadata.csv"
base_model: "./models/sd-v1-5-pruned.safetensors"
lora_rank: 16
target_modules: ["q_proj", "v_proj"]
batch_size: 4
epochs: 15
learning_rate: 2e-4
output_dir: "./output/cyberpunk_lora"
""",
}


@pytest.mark.parametrize("text", ARTICLES.values(), ids=ARTICLES)
def test_the_articles_files_load_as_they_stand(tmp_path, text):
    path = tmp_path / "my_lora_config.yaml"
    path.write_text(text, encoding="utf-8")
    config = load(path)
    assert config.learning_rate == 2e-4 and config.batch_size == 4
    assert config.lora_rank in (8, 16)


def test_article_values_reach_their_fields():
    one, two = (from_mapping(parse_yaml(ARTICLES[name])) for name in ("one", "two"))
    assert one.target_modules == ["q_proj", "v_proj"] and one.effective_alpha == 8
    assert two.effective_alpha == 16 and two.save_steps == 100


def test_every_field_is_explained():
    assert set(field_docs()) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_aliases_lead_to_fields():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(ALIASES.values()) <= names and not set(ALIASES) & names


def test_the_names_of_kohyas_scripts():
    config = from_mapping(
        {"lr_scheduler_num_cycles": 3, "lr_scheduler_power": 2, "ip_noise_gamma": 0.1, "v_parameterization": True}
    )
    assert (config.lr_cycles, config.lr_power, config.input_perturbation, config.v_prediction) == (3, 2, 0.1, True)


@pytest.mark.parametrize("name", ["logging_dir", "xformers", "cache_latents", "sdpa", "network_train_unet_only"])
def test_a_name_that_is_like_no_setting_gets_no_wrong_hint(name):
    with pytest.raises(ConfigError, match="Remove it") as caught:
        from_mapping({name: "1"})
    assert "Did you mean" not in str(caught.value)


def test_all_problems_are_reported_at_once_with_field_value_and_remedy():
    with pytest.raises(ConfigError) as caught:
        from_mapping({"lora_rnk": 8, "epochs": 0, "batch_size": "many", "optimizer": "adam", "resolution": "huge"})
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    assert "lora_rnk" in text and "'lora_rank'" in text
    assert "epochs: 0 is below 1" in text
    assert "batch_size: 'many' is not a number" in text
    assert "adamw" in text and "resolution" in text


@pytest.mark.parametrize("spelling", ["2e-4", 2e-4, "0.0002", "2.0e-04"])
def test_numbers_in_every_spelling(spelling):
    assert from_mapping({"learning_rate": spelling}).learning_rate == 2e-4


@pytest.mark.parametrize("value", [True, "nan", "inf", float("nan"), [1], {"a": 1}, "1,5", ""])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ConfigError, match="learning_rate"):
        from_mapping({"learning_rate": value})


def test_a_bare_no_is_a_choice():
    assert from_mapping({"mixed_precision": False}).mixed_precision == "no"


def test_two_names_of_one_setting_are_refused():
    with pytest.raises(ConfigError, match="second name"):
        from_mapping({"lora_rank": 8, "network_dim": 4})


def test_overrides_win_and_are_typed(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 3\n", encoding="utf-8")
    config = load(path, ["epochs=5", "target_modules=[to_q, to_v]", "learning_rate=1e-3", "trigger_word=zwx"])
    assert (config.epochs, config.target_modules, config.learning_rate) == (5, ["to_q", "to_v"], 1e-3)
    with pytest.raises(UserError, match="name=value"):
        parse_overrides(["epochs"])


@pytest.mark.parametrize("written", ["on", "no", "007", "0123", "1.10", "1:30", "2024-01-01", "1_000"])
def test_a_text_is_what_was_written_not_what_yaml_guesses(written):
    text = f"trigger_word: {written}\nepochs: 1_0\nflip: on\n"
    config = from_mapping(parse_yaml(text))
    assert (config.trigger_word, config.epochs, config.flip) == (written, 10, True)
    assert from_mapping(parse_overrides([f"trigger_word={written}"])).trigger_word == written


def test_aliases_of_aliases_are_refused_before_they_grow():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UserError, match=r"line 2.*alias"):
        parse_yaml("\n".join([*lines, "target_modules: *a9"]))
    assert parse_yaml("vae: &v [a]\ntrain_data_dir: *v") == {"vae": ["a"], "train_data_dir": ["a"]}


@pytest.mark.parametrize("field", ["train_data_dir", "trigger_word", "preview_prompts"])
def test_bytes_that_are_not_utf8_are_a_message(field):
    with pytest.raises(ConfigError, match="Unicode"):
        from_mapping(parse_overrides([f"{field}=a\udcff"]))


@pytest.mark.parametrize("text", ["./set #2", "[2024] photos", "- a", "a: b", "*x", "%x", "C:\\new\\x", "a\nb"])
def test_the_command_line_takes_a_text_as_it_stands(text):
    config = from_mapping(parse_overrides([f"train_data_dir={text}", f"vae={text}", "description='a #b'"]))
    assert (config.train_data_dir, config.vae, config.description) == (text, text, "a #b")


def test_nothing_behind_a_text_setting_is_its_empty_default():
    config = from_mapping(parse_yaml("base_model:\noutput_name:\ntrigger_word: null\nvae:\n"))
    assert (config.base_model, config.output_name, config.trigger_word, config.vae) == ("", "", "", None)
    assert from_mapping(parse_overrides(["trigger_word=", "vae=null"])).trigger_word == ""
    with pytest.raises(ConfigError, match="resolution"):
        from_mapping({"resolution": None})


def test_a_prompt_may_hold_commas():
    one = "a red star, on blue #2"
    assert from_mapping(parse_yaml(f"preview_prompts: '{one}'")).preview_prompts == [one]
    assert from_mapping(parse_overrides([f"preview_prompts={one}"])).preview_prompts == [one]
    assert from_mapping(parse_overrides(['preview_prompts=["a, b", c]'])).preview_prompts == ["a, b", "c"]
    assert from_mapping({"preview_prompts": "a, b\n\nc"}).preview_prompts == ["a, b", "c"]
    assert from_mapping({"target_modules": "to_q, to_v"}).target_modules == ["to_q", "to_v"]


def test_numbers_inside_optimizer_args():
    config = from_mapping(parse_yaml("optimizer_args: {weight_decay: 1e-2, betas: [0.9, 1e-1]}"))
    assert config.optimizer_args == {"weight_decay": 0.01, "betas": [0.9, 0.1]}


@pytest.mark.parametrize(
    "text",
    ["a: [", "- 1\n- 2", "just text", "a: 1\na: 2", "? [x]\n: 1", "\x00", "a: !!python/object:os.system {}", "42"],
)
def test_malformed_yaml_is_one_message(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(UserError):
        load(path)


def test_missing_directory_and_binary_files_are_one_message(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=str(path.name)):
            load(path)
    (tmp_path / "latin.yaml").write_bytes(b"description: \xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        load(tmp_path / "latin.yaml")


def _values(field: dataclasses.Field) -> st.SearchStrategy:
    kind = typing.get_type_hints(TrainConfig)[field.name]
    options = [option for option in typing.get_args(kind) if option is not type(None)] or [kind]
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is dict:
        return st.nothing()
    low = field.metadata.get("minimum", field.metadata.get("above", 0) + 1e-6)
    high = field.metadata.get("maximum", 1000)
    base = {
        bool: st.booleans(),
        int: st.integers(int(max(low, 1)), int(min(high, 255))),
        float: st.floats(low, high),
        str: st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
    }.get(options[0])
    return st.nothing() if base is None else base


DEPENDENT = {
    "resolution", "output_name", "bucket_step", "min_bucket_resolution", "max_bucket_resolution",
    "min_timestep", "max_timestep", "dora", "debiased_estimation", "adapter", "augmentations", "offload_blocks",
    "shard_base",
}  # fmt: skip
SIMPLE = [
    field
    for field in dataclasses.fields(TrainConfig)
    if not _values(field).is_empty and field.name not in DEPENDENT
]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_yaml_round_trip(data):
    chosen = data.draw(st.lists(st.sampled_from(SIMPLE), max_size=12, unique_by=lambda field: field.name))
    values = {field.name: data.draw(_values(field), label=field.name) for field in chosen}
    none_words = {name for name, value in values.items() if str(value).strip().lower() in ("", "none", "null")}
    config = from_mapping({name: value for name, value in values.items() if name not in none_words})
    assert from_mapping(parse_yaml(to_yaml(config))) == config


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(TrainConfig)] + ["nonsense", "lr"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=5,
        ),
        max_size=6,
    )
)
def test_any_values_are_accepted_or_refused_with_a_message(values):
    try:
        config = from_mapping(values)
    except UserError as error:
        assert str(error)
    else:
        assert from_mapping(to_mapping(config)) == config


def test_floats_are_numbers_for_every_yaml_reader():
    assert yaml.safe_load(to_yaml(from_mapping({"learning_rate": "2e-4"})))["learning_rate"] == 2e-4


@pytest.mark.parametrize("value, expected", [("auto", "auto"), (" Auto ", "auto"), ("", "auto"), ("12", 12), (0, 0)])
def test_a_word_may_take_a_numbers_place(value, expected):
    config = from_mapping({"offload_blocks": value, "gradient_checkpointing": True})
    assert config.offload_blocks == expected and from_mapping(parse_yaml(to_yaml(config))) == config


@pytest.mark.parametrize("value, expected", [
    ("auto", "auto"), (True, True), ("no", False), ("1", True), (0, False), (0.5, 0.5), ("0.25", 0.25), ("1.0", 1.0),
])  # fmt: skip
def test_a_word_or_a_number_may_take_the_place_of_yes_and_no(value, expected):
    config = from_mapping({"gradient_checkpointing": value})
    found = config.gradient_checkpointing
    assert found == expected and type(found) is type(expected)
    assert config.given_gradient_checkpointing == (0 if expected == "auto" else expected)
    assert from_mapping(parse_yaml(to_yaml(config))) == config


@pytest.mark.parametrize("value", [None, [], "some", 1.5, -1])
def test_where_it_is_neither_all_are_named(value):
    with pytest.raises(ConfigError, match=r"number from 0 to 1\. It may also be auto, true, false\.$"):
        from_mapping({"gradient_checkpointing": value})


@pytest.mark.parametrize("value", [None, [], "all", 1001, 1.5])
def test_where_a_number_or_a_word_is_wrong_both_are_named(value):
    with pytest.raises(ConfigError, match=r"from 0 to 1000\. It may also be auto\.$"):
        from_mapping({"offload_blocks": value})
