"""The state file: whole or not at all, exact, and never another run's."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_trainer.errors import UserError
from lora_trainer.training.metrics import MetricsLog, StepMetrics, read_metrics
from lora_trainer.training.state import DamagedState, StateStore, TrainingState, read_state, write_state


def state(step: int, run_key=None, **parts) -> TrainingState:
    return TrainingState(step, 0, step, run_key or {"lr": 1}, parts or {"a": torch.full((3,), float(step))})


def values():
    tensors = st.integers(0, 4).map(lambda n: torch.arange(n, dtype=torch.float32) / 3) | st.sampled_from(
        [torch.tensor(2.5), torch.tensor([True]), torch.tensor([1, 2], dtype=torch.uint8), torch.ones(2).bfloat16()]
    )
    scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text() | tensors
    keys = st.text() | st.integers()
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner),
        max_leaves=12,
    )


def equal(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@settings(deadline=None)
@given(value=values())
def test_any_nesting_comes_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("state") / "x.state"
    write_state(path, state(3, part={"value": value}))
    assert equal(read_state(path).parts["part"], {"value": value})


def test_names_that_look_alike_do_not_collide(tmp_path):
    value = {"a.b": torch.tensor(1.0), "a": {"b": torch.tensor(2.0)}, 1: torch.tensor(3.0), "1": torch.tensor(4.0)}
    write_state(tmp_path / "x.state", state(1, part=value))
    assert equal(read_state(tmp_path / "x.state").parts["part"], value)


def test_tensors_that_share_memory_and_unknown_objects(tmp_path):
    table = torch.arange(4.0)
    write_state(tmp_path / "x.state", state(1, part=[table, table, table[1:]]))
    assert equal(read_state(tmp_path / "x.state").parts["part"], [table, table, table[1:].clone()])
    with pytest.raises(TypeError, match=r"part\.f"):
        write_state(tmp_path / "x.state", state(1, part={"f": print}))
    assert list(tmp_path.iterdir()) == [tmp_path / "x.state"]


def test_any_damage_is_found(tmp_path):
    path = tmp_path / "x.state"
    write_state(path, state(1, part={"w": torch.randn(20), "n": 3}))
    data = path.read_bytes()
    for cut in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(DamagedState):
            read_state(path)
    for position in range(len(data) - 80, len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(DamagedState):
            read_state(path)
    path.write_bytes(data)
    read_state(path)
    with pytest.raises(DamagedState):
        read_state(tmp_path / "missing.state")


def test_two_states_are_kept_and_the_damaged_newest_is_passed_over(tmp_path):
    warnings = []
    store = StateStore(tmp_path, "x", {"lr": 1}, warnings.append)
    for step in (1, 2, 3):
        store.save(state(step))
    assert sorted(path.name[-6 - 8 : -6] for path in tmp_path.iterdir()) == ["00000002", "00000003"]
    path = store.path(3)
    path.write_bytes(path.read_bytes()[:-1])
    assert store.newest().step == 2 and warnings[0].startswith(f"{path.name} is damaged")
    store.path(2).write_bytes(b"")
    assert store.newest() is None and store.find("auto") is None


def test_other_runs_states_are_neither_used_nor_removed(tmp_path):
    first, second = StateStore(tmp_path, "x", {"lr": 1}), StateStore(tmp_path, "x", {"lr": 2})
    longer = StateStore(tmp_path, "x-y", {"lr": 1})
    first.save(state(1))
    longer.save(state(9))
    for step in (2, 3, 4):
        second.save(state(step, {"lr": 2}))
    assert first.newest().step == 1 and second.newest().step == 4 and longer.newest().step == 9
    assert second.other_settings() == ["lr"]
    assert first.find("never") is None
    assert second.find(str(first.path(1))).step == 1
    with pytest.raises(UserError) as error:
        second.find(str(tmp_path / "nothing.state"))
    assert error.value.field == "resume"


def line(step: int, loss: float | None = 0.5) -> StepMetrics:
    return StepMetrics(step, 1, loss, 1e-4, 0.1, 2)


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path):
    with MetricsLog(tmp_path, 0, False, print) as log:
        for step in (1, 2, 3):
            log.write(line(step), {"unet": 1e-4})
    with open(log.path, "a") as file:
        file.write('{"step": 4, "ep')  # killed while writing
    with MetricsLog(tmp_path, 2, False, print) as log:
        log.write(line(3, None), {"unet": 1e-4})
    rows = read_metrics(log.path)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2]["loss"] is None
    assert set(rows[0]) == {"step", "epoch", "loss", "lr", "seconds", "images", "grad_norm"}
    assert all(json.loads(text) for text in log.path.read_text().splitlines())


def test_the_curves_of_an_earlier_run_are_kept(tmp_path):
    for _ in range(3):
        with MetricsLog(tmp_path, 0, False, print) as log:
            log.write(line(1), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics-1.jsonl", "metrics-2.jsonl", "metrics.jsonl"]


def test_tensorboard_gets_all_there_is(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, 0, True, print) as log:
        log.write(line(1), {"unet": 1e-4, "text_encoder": 5e-5})
        log.write(line(2, None), {"unet": 1e-4, "text_encoder": 5e-5})
        log.write(dataclasses.replace(line(3), grad_norm=2.5), {"unet": 1e-4, "text_encoder": 5e-5})
        log.write_measurement({"step": 3, "epoch": 1, "validation": 0.4, "training": 0.2, "drift": 0.1})
        log.write_preview(3, "a red/blue 圆盘", Image.new("RGB", (8, 8), "red"))
        log.write_text("settings", "lora_rank: 4\nepochs: 2")
    with MetricsLog(tmp_path, 3, True, print) as resumed:
        resumed.write_text("settings", "lora_rank: 4\nepochs: 2")
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert {tag for tag in tags["scalars"] if not tag.startswith("lr/")} == {
        "train/loss", "train/gradient_norm", "validation/held_out", "validation/trained", "validation/drift",
    }  # fmt: skip
    assert events.Scalars("train/gradient_norm")[0].value == 2.5 and events.Scalars("validation/trained")[0].step == 3
    assert [tag.replace("_", " ") for tag in tags["images"]] == ["previews/a red blue 圆盘"], "older: no spaces"
    (text,) = events.Tensors(next(tag for tag in tags["tensors"] if tag.startswith("settings")))
    assert text.tensor_proto.string_val == [b"    lora_rank: 4\n    epochs: 2"]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 3]
    assert len(events.Scalars("lr/text_encoder")) == 3


def test_without_tensorboard_there_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    warnings = []
    with MetricsLog(tmp_path, 0, True, warnings.append) as log:
        log.write(line(1), {})
        log.write(line(2), {})
    assert len(warnings) == 1 and "tensorboard" in warnings[0]
