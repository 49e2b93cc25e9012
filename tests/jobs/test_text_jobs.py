"""Trainings of language models in the queue."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from lora_trainer.errors import ConfigError, UserError
from lora_trainer.jobs.estimating import estimate_job
from lora_trainer.jobs.worker import JobManager
from tests.jobs.fakes import FakeHost, wait_for
from tests.language_models import ROWS, tiny_language_model, write_rows

OVER = ("finished", "stopped", "failed")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_language_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def host(tmp_path, llama):
    (tmp_path / "LLM" / "some").mkdir(parents=True)
    (tmp_path / "LLM" / "some" / "llama").symlink_to(llama, target_is_directory=True)
    return FakeHost(tmp_path, name="a1111")


@pytest.fixture
def manager(host):
    manager = JobManager(host)
    manager.start_worker()
    yield manager
    manager.close()


@pytest.fixture
def settings(tmp_path):
    return {
        "task": "text", "base_model": "some/llama", "train_data_dir": str(write_rows(tmp_path / "rows.jsonl")),
        "lora_rank": 2, "alpha": 4, "batch_size": 4, "epochs": 2, "save_steps": 2, "chat_template": "plain",
        "save_precision": "fp32", "tensorboard": False, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip


def over(manager, job):
    wait_for(lambda: manager.store.get(job.id).status in OVER, "the end")
    return manager.store.get(job.id)


def test_a_language_model_of_the_list_is_trained_and_its_lora_stays_in_the_job(manager, host, settings, llama):
    job = over(manager, manager.submit({**settings, "output_name": "ward"}))
    assert (job.status, job.family, job.base_model, job.step) == ("finished", "llama", "llama", 4), job.error
    folder = manager.folders.of(job) / "output" / "ward"
    assert job.result["lora"] == "output/ward/adapter_model.safetensors"
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert list((host.root / "Lora").iterdir()) == [] and host.published == [] and not job.result.get("published")
    with pytest.raises(UserError, match="language model"):
        manager.publish(job.id)


def test_one_that_continues_begins_with_the_lora_before(manager, settings):
    first = over(manager, manager.submit(settings))
    assert first.name == "rows"
    second = over(manager, manager.continue_from(first.id, {"learning_rate": 1e-30, "max_train_steps": 1}))
    assert second.status == "finished", second.error
    one, other = (load_file(str(manager.result_file(job.id, "lora"))) for job in (first, second))
    assert all((one[name] == other[name]).all() for name in one)


def test_one_that_was_stopped_goes_on_to_the_same_bytes(manager, settings):
    settings = {**settings, "epochs": 10}
    whole = over(manager, manager.submit({**settings, "output_name": "whole"}))
    cut = manager.submit({**settings, "output_name": "cut"})
    wait_for(lambda: manager.store.get(cut.id).step >= 2, "step 2")
    manager.stop_and_save(cut.id)
    stopped = over(manager, cut)
    assert stopped.status == "stopped" and 2 <= stopped.step < 20
    manager.resume(cut.id)
    wait_for(lambda: manager.store.get(cut.id).status == "finished", "the end")
    one, other = (load_file(str(manager.result_file(job.id, "lora"))) for job in (whole, cut))
    assert all((one[name] == other[name]).all() for name in one)


def test_what_is_missing_is_said_of_rows_and_models(manager, settings):
    with pytest.raises(ConfigError) as caught:
        manager.submit({"task": "text"})
    said = [(problem.field, problem.message) for problem in caught.value.problems]
    assert said == [("train_data_dir", "No file with rows is chosen."), ("base_model", "No language model is chosen.")]
    with pytest.raises(UserError) as one:
        manager.submit({**settings, "base_model": "another"})
    assert one.value.field == "base_model"


def test_rows_that_cannot_be_learned_from_stop_it_before_it_starts(manager, settings, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "who", "response": ""}])
    with pytest.raises(UserError, match="no row that can be learned from") as caught:
        manager.submit(settings)
    assert caught.value.field == "train_data_dir"
    write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(UserError) as caught:
        manager.submit({**settings, "chat_template": "tokenizer"})
    assert caught.value.field == "chat_template"


def test_the_estimate_says_rows_tokens_steps_minutes_and_memory(manager, host, settings, tmp_path):
    rows = [*ROWS, {"prompt": "who"}]
    settings["train_data_dir"] = str(write_rows(tmp_path / "rows.jsonl", rows))
    found = estimate_job({**settings, "validation_share": 0.25}, host, manager.store)
    assert (found["task"], found["rows"], found["held_out"]) == ("text", 8, 3)
    assert (found["steps_per_epoch"], found["steps"]) == (2, 4) and found["learned"] < found["tokens"]
    assert any("rows.jsonl:9" in warning for warning in found["warnings"])
    assert 0 < found["minutes_low"] < found["minutes"] < found["minutes_high"]
    job = over(manager, manager.submit({**settings, "epochs": 20}))
    later = estimate_job({**settings, "epochs": 20}, host, manager.store)
    assert later["basis"] == job.id and later["memory"] > 0
    picked = {**settings, "target_modules": ["conv"]}
    with pytest.raises(UserError) as caught:
        estimate_job(picked, host, manager.store)
    assert caught.value.field == "target_modules"
