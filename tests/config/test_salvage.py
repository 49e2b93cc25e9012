"""Text of settings that is not valid: every line that is wrong is named in one round, with what to write, and the
settings of the other lines are checked too."""

from __future__ import annotations

import pytest

from lora_trainer.config import load, read_text
from lora_trainer.errors import ConfigError, UnreadableError

YAML = """base_model: a.safetensors
epochs: many
learning_rate 1e-4
trigger_word: "sks
output_name: one: two
lora_rank: 8
lora_rank: 9
description: @x
target_modules: [to_q,
train_data_dir: "D:\\new\\tom"
more_folders:
- a
- b: c: d
seed: 4
"""
TOML = """base_model = "a.safetensors"
epochs = "many"
learning_rate = fast
trigger_word = "sks
output_name 'x'
target_modules = [
 "to_q",
 "to_k"]
lora_rank = 8
lora_rank = 9
train_data_dir = "D:\\new\\tom"
"""
WRONG = {
    "YAML": {3: ("learning_rate", "not a setting"), 4: ("trigger_word", "quotes are not closed"),
             5: ("output_name", "a colon in the text"), 7: ("lora_rank", "Keep one of them"),
             8: ("description", "meaning of its own"), 9: ("target_modules", "bracket is not closed"),
             10: ("train_data_dir", "Write 'D:\\new\\tom'"), 13: ("more_folders", "a colon in the text")},
    "TOML": {3: ("learning_rate", "Invalid value"), 4: ("trigger_word", "Unterminated string|Illegal character"),
             5: ("output_name", "Expected '='"), 10: ("lora_rank", "overwrite"),
             11: ("train_data_dir", "Write 'D:\\new\\tom'")},
}  # fmt: skip


@pytest.mark.parametrize(("form", "text"), [("YAML", YAML), ("TOML", TOML)])
def test_every_line_that_is_wrong_is_named_and_the_others_are_checked(tmp_path, form, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path)
    *of_lines, of_values = caught.value.problems
    assert len(of_lines) == len(WRONG[form])
    for problem, (line, (name, said)) in zip(of_lines, WRONG[form].items()):
        assert problem.field == name and f"line {line}" in problem.message, problem
        assert any(part in str(problem) for part in said.split("|")), (str(problem), said)
    assert of_values.field == "epochs", "a setting whose line is right, and whose value is not"
    assert caught.value.config.base_model == "a.safetensors" and caught.value.config.lora_rank == 8


def test_the_line_itself_is_quoted():
    with pytest.raises(UnreadableError, match=r"line 2.*no colon|line 2.*'learning_rate 1e-4'"):
        read_text("epochs: 3\nlearning_rate 1e-4\n")


def test_of_json_the_line_and_its_text_are_named():
    with pytest.raises(ConfigError, match="backslash") as caught:
        read_text('{\n"epochs": 3,\n"train_data_dir": "D:\\new"\n}')
    assert caught.value.values == {"epochs": 3}
    with pytest.raises(Exception, match=r"line 3.*'\"lora_rank\" 8'"):
        read_text('{\n"epochs": 3,\n"lora_rank" 8\n}')


@pytest.mark.parametrize("text", ["a: &v 1\nb: *v\nc: [\n", "c: [\na: &v 1\nb: *v\n"])
def test_an_entry_may_refer_to_another(text):
    with pytest.raises(UnreadableError) as caught:
        read_text(text)
    assert caught.value.values == {"a": 1, "b": 1} and len(caught.value.problems) == 1


def test_a_file_of_something_else_is_no_list_of_a_thousand_problems():
    with pytest.raises(UnreadableError) as caught:
        read_text("\n".join(f"name {number}: [" for number in range(300)))
    assert len(caught.value.problems) <= 20
