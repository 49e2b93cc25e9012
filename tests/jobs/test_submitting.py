"""What is refused, and what is added, before a job starts: names, settings, the model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from lora_trainer.config import from_mapping, parse_yaml
from lora_trainer.errors import ConfigError, UserError, problems_of
from lora_trainer.jobs.estimating import estimate_job
from tests.jobs.fakes import make_pictures, wait_status


def test_names_that_are_taken_are_refused_before_anything_starts(idle, settings, host):
    (host.root / "Lora" / "cat.safetensors").touch()
    with pytest.raises(UserError) as caught:
        idle.submit(settings)
    assert caught.value.field == "output_name"
    idle.submit({**settings, "overwrite": True})
    (host.root / "Lora" / "cat.safetensors").unlink()
    with pytest.raises(UserError, match="Another training"):
        idle.submit({**settings, "output_name": "CAT"})
    assert len(idle.store.jobs()) == 1 and len(list(idle.folders.jobs.iterdir())) == 1


def test_two_that_start_at_once_do_not_get_one_name(idle, settings):
    begin = threading.Barrier(6)

    def start(_):
        begin.wait()
        with suppress(UserError):
            idle.submit(settings)
        begin.wait()
        return idle.duplicate(1).name

    with ThreadPoolExecutor(6) as pool:
        names = list(pool.map(start, range(6)))
    assert sorted([*names, "cat"]) == sorted({job.name for job in idle.store.jobs()}) and len(set(names)) == 6


@pytest.mark.parametrize("there", ["people/cat.safetensors", "CAT.pt", "cat.json"])
def test_what_publishing_would_refuse_is_refused_before_the_training(idle, settings, host, there):
    """The picker knows a LoRA by its name alone, wherever it lies."""
    path = host.root / "Lora" / there
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"already\."):
        idle.submit(settings)


@pytest.mark.parametrize("task", ["auto", "text"])
def test_the_code_of_a_language_model_is_refused_here(idle, settings, tmp_path, task):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    given = {**settings, "base_model": str(tmp_path), "task": task}
    with pytest.raises(UserError) as caught:
        idle.submit({**given, "trust_remote_code": True})
    assert problems_of(caught.value)[0].field == "trust_remote_code"


def test_a_name_that_the_webui_never_finds_is_refused_before_the_training(idle, settings):
    with pytest.raises(UserError, match="keeps it for itself"):
        idle.submit({**settings, "output_name": "None"})


def test_a_name_is_found_where_none_is_given(idle, settings):
    del settings["output_name"]
    assert [idle.submit(settings).name for _ in range(3)] == ["photos", "photos_2", "photos_3"]
    assert idle.submit({**settings, "output_dir": "./output/my_style"}).name == "my_style"


def test_settings_come_as_yaml_and_all_their_problems_at_once(idle, settings):
    text = f"train_data_dir: {settings['train_data_dir']}\nlearning_rate: 2e-4\nrank: 8\n"
    job = idle.submit(text)
    assert idle.effective_config(job).lora_rank == 8 and idle.effective_config(job).learning_rate == 2e-4
    with pytest.raises(ConfigError) as caught:
        idle.submit({**settings, "rank": 0, "epochs": -1})
    assert [problem.field for problem in caught.value.problems] == ["rank", "epochs"]
    with pytest.raises(UserError, match="No pictures"):
        idle.submit({})


def test_a_few_lines_that_stand_for_gigabytes_are_refused_at_once(idle):
    pairs = zip("abcdefgh", "bcdefghi")
    levels = "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairs)
    with pytest.raises(UserError, match="alias"):
        idle.submit(f"a: &a [{', '.join('x' * 10)}]\n{levels}lora_rank: *i\n")


def test_duplicate_takes_changes_and_continue_starts_from_the_lora(manager, train, settings):
    train.free = True
    job = wait_status(manager, manager.submit({**settings, "network_dim": 4}), "finished")
    again = manager.duplicate(job.id, {"lora_rank": 8}, held=True)
    config = manager.effective_config(again)
    assert (again.name, config.lora_rank, config.trigger_word) == ("cat_2", 8, "zwx")
    more = manager.continue_from(job.id, held=True)
    assert manager.effective_config(more).init_lora == str(manager.result_file(job.id, "lora"))
    with pytest.raises(UserError, match="has not made"):
        manager.continue_from(again.id)


def test_the_lender_gets_the_runs_precision_and_the_hosts_options(manager, train, settings, host):
    train.free = True
    host.options = {"lora_trainer_hold_model": True}
    wait_status(manager, manager.submit({**settings, "clip_skip": 2}), "finished")
    options = host.lender_options[0]
    assert options.hold and not options.wait_for_model and options.clip_skip == 2


def test_another_model_than_was_shown_is_refused(idle, settings, host):
    first, second = "tiny.safetensors [abc]", "other.safetensors"
    host.models = {first: (False, True), second: (True, False)}
    for send in (idle.submit, lambda values, **more: estimate_job(values, host, idle.store, **more)):
        with pytest.raises(UserError, match=r"is other\.safetensors now, and tiny\.safetensors \[abc\]") as caught:
            send(settings, shown=first)
        assert caught.value.field == "base_model" and caught.value.remedy
    assert not idle.store.jobs()
    assert idle.submit(settings, shown=second).base_model == second
    named = {**settings, "base_model": first, "output_name": "named"}
    assert idle.submit(named, shown=first).base_model == first, "what is named is what is trained"
    host.models = {first: (True, True)}
    hashed_since = idle.submit({**settings, "output_name": "third"}, shown="tiny.safetensors")
    assert hashed_since.base_model == first, "it has got its hash in between"


def test_a_job_keeps_the_model_that_was_loaded_when_it_was_sent(idle, settings):
    job = idle.submit(settings)
    assert job.base_model == "tiny.safetensors [abc]"
    assert from_mapping(parse_yaml(job.effective_config)).base_model == "tiny.safetensors [abc]"
    assert "base_model" not in parse_yaml(job.config), "a copy of the job means what is loaded then"


def test_what_would_stop_a_run_at_once_is_refused_as_the_page_does(idle, settings, host, tmp_path):
    host.refused = UserError("base.safetensors is FLUX.1.", field="base_model", remedy="Choose another.")
    for held in (False, True):
        with pytest.raises(UserError, match=r"is FLUX\.1") as caught:
            idle.submit(settings, held=held)
        assert caught.value.field == "base_model"
    host.refused = None
    bare = tmp_path / "bare"
    make_pictures(bare)
    for caption in bare.glob("*.txt"):
        caption.unlink()
    (tmp_path / "empty").mkdir()
    for changes, field in (
        ({"train_data_dir": str(bare), "trigger_word": ""}, "train_data_dir"),
        ({"train_data_dir": str(tmp_path / "empty")}, "train_data_dir"),
        ({"init_lora": str(tmp_path / "no.safetensors")}, "init_lora"),
        ({"resume": str(tmp_path / "no.state")}, "resume"),
    ):
        with pytest.raises(UserError) as caught:
            idle.submit({**settings, **changes})
        with pytest.raises(UserError) as on_the_page:
            facts = estimate_job({**settings, **changes}, host, idle.store)
            raise UserError(facts["problems"][0].message, field=facts["problems"][0].field)
        assert (caught.value.message, caught.value.field) == (on_the_page.value.message, on_the_page.value.field)
        assert caught.value.field == field
    assert not idle.store.jobs()
