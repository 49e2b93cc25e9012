"""Minutes and memory that are told before a run: of a job like it, else a forecast."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from lora_trainer.config import TrainConfig
from lora_trainer.errors import UserError
from lora_trainer.jobs.estimating import estimate_job
from lora_trainer.models.base import ModelInfo
from lora_trainer.models.detect import detect
from lora_trainer.models.families import meta_model
from lora_trainer.models.families.flow.names import TRANSFORMER
from lora_trainer.planning import cost
from lora_trainer.training import throughput
from lora_trainer.training.forecast import memory_needed, work_on_batch
from lora_trainer.training.precision import Precision, resolve
from tests import flux
from tests.devices import pretended_gpu
from tests.jobs.fakes import wait_for, wait_status
from tests.tiny import SD1, sd1_shapes

SPEED, IN_USE = 2e9, 7 << 30
TIMINGS = {"training": [3.0, 6], "loading": [6.0, 1], "encoding": [2.0, 4], "saving": [4.0, 2], "ending": [5.0, 1]}


@pytest.fixture
def known(host, monkeypatch):
    """A host that says how its model is built, and how often the device was tried."""
    tried = []
    architecture = detect(sd1_shapes(**SD1))
    lend = host.lender

    def lender(checkpoint, options):
        lent = lend(checkpoint, options)
        lent.info = dataclasses.replace(lent.info, architecture=architecture)
        return lent

    monkeypatch.setattr(host, "lender", lender)
    monkeypatch.setattr(throughput, "throughput", lambda *what: tried.append(what) or throughput.Speed(SPEED))
    monkeypatch.setattr(cost, "memory_in_use", lambda device: IN_USE)
    monkeypatch.setattr(cost, "_trials", {})
    monkeypatch.setattr(cost, "_models", {})
    monkeypatch.setattr(cost, "_in_use_idle", {})
    return architecture, tried


@pytest.fixture
def trained(manager, train, settings, known):
    """A finished job: two pictures a second, 5,000 bytes."""
    train.total_steps, train.free = 10, True
    job = manager.submit({**settings, "output_name": "before"})
    wait_for(lambda: manager.store.get(job.id).status == "finished")
    assert manager.store.get(job.id).pictures_per_second == manager.store.get(job.id).speed, "one picture a step"
    manager.store.update(job.id, pictures_per_second=2.0, memory=5_000, timings=TIMINGS)
    return job.id


def test_minutes_and_memory_are_those_of_a_job_like_it(manager, settings, host, known, trained):
    facts = estimate_job({**settings, "max_train_steps": 240}, host, manager.store)
    assert (facts["parts"]["training"], facts["memory"]) == (2.0, 5_000) and not known[1]
    assert facts["basis"] == facts["memory_basis"] == trained and facts["basis_name"] == "before"


def test_other_settings_take_more_minutes_than_the_job_and_memory_of_their_own(manager, settings, host, known, trained):
    larger = {**settings, "max_train_steps": 240, "batch_size": 2, "gradient_checkpointing": True, "lora_rank": 64}
    facts = estimate_job(larger, host, manager.store)
    pictures = facts["pictures"] * 240 / facts["steps_per_epoch"]
    works = [
        work_on_batch(known[0], (512, 512), config).operations / config.batch_size
        for config in (TrainConfig(batch_size=2, gradient_checkpointing=True, lora_rank=64), TrainConfig(batch_size=1))
    ]
    training = pictures / 2 * works[0] / works[1] / 60
    assert facts["parts"]["training"] == pytest.approx(training) and works[0] > 1.2 * works[1]
    assert facts["memory"] > IN_USE and (facts["basis"], facts["memory_basis"]) == (trained, None)


def test_a_job_on_another_model_or_in_another_precision_says_nothing(
    manager, settings, host, known, trained, monkeypatch
):
    manager.store.update(trained, architecture="of another width")
    facts = estimate_job(settings, host, manager.store)
    assert (facts["basis"], facts["memory_basis"]) == (None, None) and facts["minutes"] > 0
    manager.store.update(trained, architecture=cost.architecture_mark(known[0]))
    assert estimate_job(settings, host, manager.store)["basis"] == trained
    monkeypatch.setattr(torch, "__version__", "2.2.0")  # the first that computes in bf16 on the CPU
    assert estimate_job({**settings, "mixed_precision": "bf16"}, host, manager.store)["basis"] is None


@pytest.mark.parametrize("changes", [{"batch_size": 16}, {"gradient_accumulation_steps": 16}])
def test_minutes_count_pictures_not_places_in_a_batch(idle, host, settings, known, changes):
    """Three pictures never fill a batch of 16."""
    one, many = (estimate_job({**settings, "epochs": 10, **more}, host, idle.store) for more in ({}, changes))
    assert one["steps"] > many["steps"] and many["parts"]["training"] == pytest.approx(one["parts"]["training"])


def test_before_the_first_job_they_are_forecast(idle, host, settings, known):
    architecture, tried = known
    wanted = {**settings, "max_train_steps": 90, "batch_size": 2, "gradient_accumulation_steps": 3, "resolution": "256"}
    config, precision = TrainConfig(batch_size=2), resolve("cpu", "no")
    facts = estimate_job(wanted, host, idle.store)
    pictures = 90 / facts["steps_per_epoch"] * facts["pictures"]
    operations = pictures / 2 * work_on_batch(architecture, (256, 256), config).operations
    assert facts["parts"]["training"] == pytest.approx(operations / SPEED / 60)
    assert (facts["basis"], facts["memory_basis"]) == (None, None)
    assert facts["memory"] == IN_USE + memory_needed(meta_model(architecture), (256, 256), config, precision)
    host.model_bytes = lambda: 1_000_000
    loaded = estimate_job(wanted, host, idle.store)["memory"]
    assert loaded == facts["memory"] - 1_000_000, "what is there already is not taken once more"
    estimate_job({**wanted, "epochs": 3}, host, idle.store)
    assert tried == [(architecture, precision, (256, 256))], "once for each size"
    estimate_job({**wanted, "resolution": "1024x640"}, host, idle.store)
    assert tried[1:] == [(architecture, precision, (512, 512))], "a CPU is not tried for long"


def test_a_device_at_work_is_left_alone(idle, host, settings, known, monkeypatch):
    @contextmanager
    def taken():
        yield False

    free, host.spare_turn = host.spare_turn, taken
    facts = estimate_job(settings, host, idle.store)
    assert (facts["minutes"], facts["memory"]) == (None, None) and not known[1]
    host.spare_turn = free
    first = estimate_job(settings, host, idle.store)
    assert first["minutes"] > 0 and first["memory"] > IN_USE
    host.spare_turn = taken
    assert estimate_job(settings, host, idle.store) == first, "what was tried is known"
    host.spare_turn = free
    assert estimate_job(settings, host, idle.store) == first and len(known[1]) == 1
    monkeypatch.setattr(cost, "_TRIAL_AGE", 0.0)
    estimate_job(settings, host, idle.store)
    assert len(known[1]) == 2, "somebody else may have slowed it down"


@pytest.mark.parametrize("known_before", [False, True])
def test_memory_of_a_run_in_hand_is_not_counted_for_the_next(manager, host, settings, known, monkeypatch, known_before):
    wanted = {**settings, "output_name": "next"}
    before = estimate_job(wanted, host, manager.store) if known_before else {"minutes": None, "memory": None}
    wait_status(manager, manager.submit({**settings, "output_name": "first"}), "running")
    monkeypatch.setattr(cost, "memory_in_use", lambda device: 2 * IN_USE)
    facts = estimate_job(wanted, host, manager.store)
    assert all(facts[name] == before[name] for name in ("minutes", "memory")) and len(known[1]) == known_before


def test_what_torch_keeps_on_a_gpu_for_later_is_free_for_a_run(known, monkeypatch):
    with pretended_gpu() as gpu:
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 << 30)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 << 30)
        assert cost._in_use(gpu.device) == IN_USE - (3 << 30)
        assert cost._in_use(torch.device("cpu")) == IN_USE


def test_a_full_device_only_costs_the_forecast(idle, host, settings, known, monkeypatch):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(throughput, "throughput", fail)
    facts = estimate_job(settings, host, idle.store)
    assert facts["minutes"] is None and facts["memory"] > IN_USE
    monkeypatch.setattr(throughput, "throughput", lambda *_: pytest.fail("tried again at once"))
    assert estimate_job(settings, host, idle.store)["minutes"] is None


def test_layers_that_the_model_lacks_are_named_before_the_start(idle, host, settings, known):
    with pytest.raises(UserError) as caught:
        estimate_job({**settings, "target_modules": ["no_such_layer"]}, host, idle.store)
    assert caught.value.field == "target_modules"


def test_all_that_belongs_to_a_run_is_in_its_minutes(manager, settings, host, known, trained):
    """A save of 2 s, an end of 5 s, loading of 6 s, and half a second for each picture and caption."""
    facts = estimate_job({**settings, "max_train_steps": 240, "save_steps": 100}, host, manager.store)
    seconds = {name: 60 * minutes for name, minutes in facts["parts"].items()}
    encoding = 2 * facts["pictures"] * 0.5
    assert seconds == pytest.approx(
        {"training": 120, "loading": 6, "saving": 6, "ending": 5, "encoding": encoding, "previews": 0}
    )
    assert facts["minutes"] == pytest.approx(sum(seconds.values()) / 60)
    assert facts["minutes_low"] < facts["minutes"] < facts["minutes_high"]


def test_previews_are_counted_as_they_were_drawn(manager, settings, host, known, trained):
    past = manager.store.get(trained)
    wanted = {**settings, "max_train_steps": 100, "preview_steps": 30, "preview_prompts": ["a dog", "a cow --s 5"]}
    config = past.effective_config.replace("preview_prompts: []", "preview_prompts: [a cat --s 10]")
    timings = {**TIMINGS, "previews": [8.0, 2]}
    manager.store.update(trained, effective_config=config, timings=timings)
    facts = estimate_job(wanted, host, manager.store)
    assert 60 * facts["parts"]["previews"] == pytest.approx(5 * (20 + 5) / 10 * 4), "at 0, 30, 60, 90 and the end"
    before = estimate_job({**wanted, "preview_prompts": []}, host, manager.store)
    assert before["parts"]["previews"] == 0 and before["minutes_high"] < facts["minutes_high"]


def test_the_range_holds_all_comparable_runs(
    manager, settings, host, known, trained
):
    wanted = {**settings, "max_train_steps": 240}
    one = estimate_job(wanted, host, manager.store)
    assert one["minutes_high"] < 1.6 * one["minutes_low"]
    second = manager.submit({**settings, "output_name": "second"})
    wait_for(lambda: manager.store.get(second.id).status == "finished")
    manager.store.update(second.id, timings={**TIMINGS, "training": [6.0, 6]})
    two = estimate_job(wanted, host, manager.store)
    assert two["basis_name"] == "second" and two["parts"]["training"] == pytest.approx(4.0)
    assert two["minutes_low"] < one["minutes"] < two["minutes"] < two["minutes_high"]
    larger = estimate_job({**wanted, "resolution": "1024"}, host, manager.store)
    assert larger["minutes_high"] / larger["minutes_low"] > two["minutes_high"] / two["minutes_low"]


def test_a_forecast_has_a_wide_range_with_previews_loading_and_saving(idle, host, settings, known):
    wanted = {**settings, "max_train_steps": 50, "save_steps": 10, "preview_prompts": ["a cat", "a dog"]}
    facts = estimate_job(wanted, host, idle.store)
    assert facts["basis"] is None and facts["minutes_high"] > 3 * facts["minutes_low"] > 0
    assert set(facts["parts"]) == {"training", "previews", "encoding", "loading", "saving", "ending"}
    fewer = estimate_job({**wanted, "save_steps": None}, host, idle.store)
    assert fewer["parts"]["previews"] == pytest.approx(facts["parts"]["previews"] * 2 / 6)


def test_the_pictures_that_the_base_draws_take_their_time(idle, host, settings, known):
    wanted = {**settings, "max_train_steps": 50, "preserve": 0.3, "preview_prompts": ["a cat"]}
    own = estimate_job(wanted, host, idle.store)
    drawn = estimate_job({**wanted, "preserve_pictures": 24}, host, idle.store)
    assert "known" not in own["parts"] and drawn["parts"]["training"] == own["parts"]["training"]
    assert drawn["parts"]["known"] == pytest.approx(24 * own["parts"]["previews"] / 2 / 1.2)
    assert drawn["minutes_low"] == pytest.approx(own["minutes_low"]), "they may be there already"
    assert "known" not in estimate_job({**wanted, "preserve": 0, "preserve_pictures": 24}, host, idle.store)["parts"]


def test_the_pictures_that_the_base_drew_before_say_how_long_others_take(manager, host, settings, known, trained):
    manager.store.update(trained, timings={**TIMINGS, "known": [12.0, 4]})
    wanted = {**settings, "preserve": 0.3, "preserve_pictures": 24}
    assert estimate_job(wanted, host, manager.store)["parts"]["known"] == pytest.approx(24 * 3 / 60)


def test_what_would_shorten_a_long_run_on_a_processor_is_said(idle, host, settings, known):
    wanted = {**settings, "epochs": 3000, "resolution": "512"}
    facts = estimate_job(wanted, host, idle.store)
    assert [(one["name"], one["value"]) for one in facts["shorter"]] == [("resolution", "256"), ("epochs", 1500)]
    assert all(one["minutes"] < facts["minutes"] for one in facts["shorter"])
    assert not estimate_job({**wanted, "resolution": "256"}, host, idle.store)["shorter"]
    assert not estimate_job({**wanted, "epochs": 1}, host, idle.store)["shorter"]


def test_blocks_that_would_wait_in_main_memory_are_not_counted(monkeypatch):
    """Where a run would read the base model from its file; a WebUI decides itself."""
    shapes = {TRANSFORMER + name: shape for name, shape in flux.transformer_shapes(double=2, single=3).items()}
    model = meta_model(dataclasses.replace(detect(shapes), t5=None, clips=()))
    info, config = ModelInfo("flux", "flow", "small"), TrainConfig(gradient_checkpointing=True)
    card = Precision(torch.device("cuda", 0), torch.bfloat16, torch.bfloat16)
    monkeypatch.setattr(cost, "free_memory", lambda host: 1_000)

    def placed(config, name="standalone", precision=card):
        return cost._placed(config, model, info, (64, 64), precision, SimpleNamespace(name=name, model_bytes=lambda: 0))

    assert placed(config).offload_blocks == 5
    for kept in (placed(config, "forge"), placed(config, precision=resolve("cpu", "no"))):
        assert kept is config
    for given in (dataclasses.replace(config, offload_blocks=2), TrainConfig()):
        assert placed(given) is given
    auto = placed(TrainConfig(gradient_checkpointing="auto"))
    assert (auto.given_gradient_checkpointing, auto.offload_blocks) == (1, 5), "nothing waits before all is recomputed"
    assert placed(TrainConfig(gradient_checkpointing="auto"), "forge").given_gradient_checkpointing == 1
    monkeypatch.setattr(cost, "free_memory", lambda host: 1 << 40)
    auto = placed(TrainConfig(gradient_checkpointing="auto"))
    assert (auto.gradient_checkpointing, auto.offload_blocks) == (0, "auto")
