"""The commands for language models, on a tiny one."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.cli import main
from lora_trainer.config import from_mapping
from lora_trainer.run import file_lender, train
from tests.language_models import ROWS, tiny_language_model, write_rows
from tests.run.test_text import our_logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(base, settings, adapter): a model that learned its rows by heart."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_language_model(folder / "base", shards=3)
    rows = write_rows(folder / "rows.jsonl", [ROWS[0], ROWS[1]])
    settings = {
        "base_model": str(base), "train_data_dir": str(rows), "output_dir": str(folder / "out"), "lora_rank": 8,
        "output_name": "ward", "batch_size": 2, "max_train_steps": 60, "learning_rate": 3e-2, "save_precision": "fp32",
        "chat_template": "chatml", "tensorboard": False, "lr_scheduler": "constant",
    }  # fmt: skip
    config = from_mapping(settings)
    result = train(config, file_lender(config))
    return base, settings, result.lora.parent


def test_the_answers_of_base_and_lora_stand_side_by_side(trained, capsys):
    base, _, adapter = trained
    question = ["--base", str(base), "--prompt", ROWS[0]["prompt"], "--template", "chatml", "--max-tokens", "30"]
    assert main(["generate", *question, "--adapter", str(adapter)]) == 0
    said = capsys.readouterr().out
    bare, _, learned = said.removeprefix("--- base\n").partition("--- ward\n")
    assert learned.strip() == ROWS[0]["response"] and ROWS[0]["response"] not in bare
    assert main(["generate", *question]) == 0
    assert capsys.readouterr().out == bare


def test_a_schema_is_kept_to(trained, tmp_path, capsys):
    pytest.importorskip("llguidance")
    base, _, adapter = trained
    schema = tmp_path / "schema.json"
    form = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["age"], "additionalProperties": False}  # fmt: skip
    schema.write_text(json.dumps(form))
    command = ["generate", "--base", str(base), "--prompt", "who", "--json-schema", str(schema), "--template", "plain"]
    assert main([*command, "--adapter", str(adapter), "--temperature", "1"]) == 0
    bare, _, learned = capsys.readouterr().out.removeprefix("--- base\n").partition("--- ward\n")
    for text in (bare, learned):
        assert set(json.loads(text)) == {"age"} and 0 <= json.loads(text)["age"] <= 99
    schema.write_text('{"type": "cat"}')
    assert main(command) == 2
    assert "json_schema: The schema cannot be used" in capsys.readouterr().err


def test_without_llguidance_a_schema_is_answered_with_its_name(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    (tmp_path / "schema.json").write_text("{}")
    options = ["--prompt", "x", "--json-schema", str(tmp_path / "schema.json")]
    assert main(["generate", "--base", str(trained[0]), *options]) == 2
    assert "pip install llguidance" in capsys.readouterr().err


def test_show_prints_what_the_model_sees_with_the_learned_tokens_marked(trained, tmp_path, capsys):
    from lora_trainer.config import to_yaml

    (tmp_path / "run.yaml").write_text(to_yaml(from_mapping(trained[1])))
    assert main(["show", "--config", str(tmp_path / "run.yaml"), "--rows", "1", "--from-row", "2"]) == 0
    head, _, text = capsys.readouterr().out.partition("\n")
    assert head.startswith("--- rows.jsonl:2: ") and head.endswith("learned")
    prompt, response = ROWS[1]["prompt"], ROWS[1]["response"]
    assert text == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n⟦{response}<|im_end|>⟧\n\n"


def test_rows_are_checked_with_and_without_a_model(trained, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[0], ROWS[0], {"prompt": "x"}])
    assert main(["check", str(rows)]) == 0
    said = capsys.readouterr().out
    assert "error:   rows.jsonl:3" in said and "warning: rows.jsonl:2" in said and "2 rows\n" in said
    assert main(["check", str(rows), "--base", str(trained[0]), "--max-length", "8", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["stops_training"] and {one["kind"] for one in report["findings"]} >= {"too-long", "malformed"}


def test_a_merged_folder_computes_what_base_and_lora_do(trained, tmp_path, capsys):
    base, settings, adapter = trained
    out = tmp_path / "merged"
    assert len(list(base.glob("*.safetensors"))) > 1
    command = ["merge", "--base", str(base), "--lora", str(adapter), "--output", str(out)]
    assert main(command) == 0
    assert "convert_hf_to_gguf.py" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()}
    tokens = torch.arange(40)[None]
    merged = our_logits(out, settings, None, tokens)
    assert (merged - our_logits(base, settings, adapter, tokens)).abs().max() <= 1e-4
    assert main(command) == 2, "nothing is written over"
    assert not list(tmp_path.glob(".*")), "nothing unfinished is left"


def test_a_lora_of_another_model_is_not_merged(trained, tmp_path, capsys):
    base, _, adapter = trained
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(str(adapter / "adapter_model.safetensors"))
    save_file(
        {name.replace(".1.", ".7."): tensor for name, tensor in tensors.items()},
        str(other / "adapter_model.safetensors"),
    )
    out = tmp_path / "merged"
    assert main(["merge", "--base", str(base), "--lora", str(other), "--output", str(out)]) == 2
    assert "model.layers.7." in capsys.readouterr().err and not out.exists() and not list(tmp_path.glob(".*"))
    assert main(["generate", "--base", str(base), "--adapter", str(other), "--prompt", "x", "--max-tokens", "1"]) == 2


def test_a_run_merges_when_it_is_told_to(trained, tmp_path):
    settings = {**trained[1], "output_dir": str(tmp_path / "out"), "merge_into_base": str(tmp_path / "whole"),
                "max_train_steps": 2}  # fmt: skip
    config = from_mapping(settings)
    assert train(config, file_lender(config)).merged == tmp_path / "whole"
    assert (tmp_path / "whole" / "config.json").exists()
