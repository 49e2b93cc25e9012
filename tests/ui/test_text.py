"""A language model's training in a browser: rows in, what the model sees, Start."""

from __future__ import annotations

import json

import pytest

from tests.language_models import ROWS, tiny_language_model


@pytest.fixture
def llama(manager):
    return tiny_language_model(manager.host.root / "LLM" / "tiny-llama")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "ward.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    lines.insert(1, '{"prompt": "who"')
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_from_a_file_to_a_training(llama, page, manager, train, rows):
    page.check("input[name=lora_trainer_kind][value=text]")
    assert page.is_hidden("#lora_trainer_drop") and page.is_visible("#lora_trainer_text_drop")
    assert page.is_hidden("#lora_trainer_field_trigger_word") and page.is_visible("#lora_trainer_model_folder")
    page.wait_for_function("document.getElementById('lora_trainer_field_base_model').value === 'tiny-llama'")
    page.set_input_files("#lora_trainer_text_file", rows)
    page.wait_for_selector("#lora_trainer_row_table tbody tr")
    assert page.locator("#lora_trainer_row_table tbody tr").count() == len(ROWS) + 1
    wrong = page.locator("#lora_trainer_row_table tr.lora_trainer_wrong")
    assert wrong.count() == 1 and "ward.jsonl:2" in wrong.inner_text()
    page.locator("#lora_trainer_row_table >> text=See it").first.click()
    learned = page.locator("#lora_trainer_seen mark")
    learned.first.wait_for()
    assert learned.first.inner_text().startswith(ROWS[0]["response"])
    page.wait_for_function("document.getElementById('lora_trainer_fact_tokens').textContent.includes('learned')")
    assert page.is_hidden("#lora_trainer_fact_buckets")

    train.free = True
    page.fill("#lora_trainer_field_output_name", "ward")
    page.click("#lora_trainer_start")
    config = train.config()
    assert (config.task, config.lora_rank, config.lr_scheduler) == ("text", 16, "cosine")
    assert config.base_model == str(llama) and config.train_data_dir.endswith("ward")
    page.wait_for_selector("text=among the files of this run")
    assert page.is_hidden("#lora_trainer_preview_panel")

    page.check("input[name=lora_trainer_kind][value=style]")
    assert page.is_visible("#lora_trainer_drop") and page.is_hidden("#lora_trainer_row_table")
    page.wait_for_function("!document.getElementById('lora_trainer_field_base_model').value.includes('llama')")
    assert "task" not in page.evaluate("loraTrainer.form.settings()")


def test_what_is_missing_is_said_beside_it(page):
    page.check("input[name=lora_trainer_kind][value=text]")
    page.click("#lora_trainer_start")
    page.wait_for_selector("#lora_trainer_problem_train_data_dir >> visible=true")
    assert "No file with rows" in page.inner_text("#lora_trainer_problem_train_data_dir")
    assert "No language model" in page.inner_text("#lora_trainer_problem_base_model")
