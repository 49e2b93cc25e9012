"""Memory that runs out at every place of a run: the run goes on, and learns what it learns undisturbed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_trainer.errors import RankFailedError, UserError
from lora_trainer.out_of_memory import is_out_of_memory, with_room
from tests.training.fakes import FakeModel, Killed, Run, configuration, draw_pictures, kill, same

ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("HIP error: hipErrorOutOfMemory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.94 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:40])
def test_what_says_that_memory_is_short(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: device-side assert triggered"), ValueError("mat1 and mat2 shapes cannot be multiplied"),
    UserError("There is not enough memory to describe a single picture."),
    RankFailedError("Rank 1 failed: CUDA out of memory."), KeyError("memory"),
], ids=str)  # fmt: skip
def test_what_does_not(error):
    assert not is_out_of_memory(error)


def test_room_is_made_before_the_second_try_and_what_failed_is_gone_by_then():
    class Big:
        pass

    kept, rooms = [], []

    def compute():
        big = Big()
        kept.append(weakref.ref(big))
        if len(kept) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return 7

    def make_room():
        rooms.append(kept[0]() is None)

    assert with_room(compute, make_room) == 7 and rooms == [True]


# -- runs -------------------------------------------------------------------------------------------------------------

SETTINGS = {"batch_size": 4, "gradient_accumulation_steps": 2, "epochs": 2, "dropout": 0.2, "rank_dropout": 0.2,
            "conv_rank": 2, "save_steps": 1, "ema_decay": 0.9}  # fmt: skip
TEXT = {"train_text_encoder": True, "shuffle_tags": True, "caption_dropout": 0.3, "ema_decay": None}


def small(folder: Path, **settings):
    """Twelve pictures in two buckets: an epoch of two steps, of two micro-batches each."""
    draw_pictures(folder / "data", 12)
    return configuration(folder, **{**SETTINGS, **settings})


class Room:
    """Stands for a lender's ``make_room``."""

    def __init__(self):
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


def prepared(config, model: FakeModel | None = None) -> tuple[Run, Room]:
    run, room = Run(config, model), Room()
    run.trainer.recovery._make_room = room
    return run, room


def undisturbed(folder: Path, **settings) -> Run:
    run = Run(small(folder / "undisturbed", **settings))
    run.trainer.run()
    assert not run.recorder.warnings
    return run


def assert_close(run: Run, other: Run) -> None:
    assert [step for step, *_ in run.saved] == [step for step, *_ in other.saved]
    for (_, _, tensors), (_, _, others) in zip(run.saved, other.saved):
        for name, value in tensors.items():
            torch.testing.assert_close(value, others[name], rtol=2e-4, atol=2e-6)
    for report, expected in zip(run.recorder.reports, other.recorder.reports, strict=True):
        assert report.loss == pytest.approx(expected.loss, rel=1e-4)


def fail(owner: object, name: str, when: Callable[..., bool], error: Exception, after: bool = False) -> None:
    """Make a method raise where ``when(*arguments)`` says so, before or after it did its work."""
    method = getattr(owner, name)

    def fails(*arguments, **options):
        result = method(*arguments, **options) if after else None
        if when(*arguments):
            raise error
        return result if after else method(*arguments, **options)

    setattr(owner, name, fails)


def times(run: Run, count: int, step: int = 1) -> Callable[..., bool]:
    """True for the first ``count`` calls from a step on (counted from 0)."""
    left = [count]

    def when(*arguments) -> bool:
        if run.trainer.step < step or not left[0]:
            return False
        left[0] -= 1
        return True

    return when


@pytest.mark.parametrize("error", ERRORS[:5:2], ids=lambda error: str(error)[:40])
def test_once_in_the_forward_pass_the_step_is_repeated_to_the_bit(tmp_path, error):
    whole = undisturbed(tmp_path)
    run, room = prepared(small(tmp_path / "short"))
    fail(run.model, "predict", times(run, 1), error)
    run.trainer.run()
    assert same(run.final, whole.final) and room.calls == 1
    assert len(run.recorder.warnings) == 1 and "step 2" in run.recorder.warnings[0]


def test_in_the_backward_pass(tmp_path):
    whole = undisturbed(tmp_path)
    run, _ = prepared(small(tmp_path / "short"))
    when, failed = times(run, 2), []

    def raises(gradient):
        if when():
            failed.append(run.trainer.step)
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    # The adapter that the backward pass reaches last: the others have their gradients by then.
    run.trainer.train_step.parameters[-1].register_hook(raises)
    run.trainer.run()
    assert failed == [1, 1] and run.trainer.recovery.measures.part_size == 2
    assert_close(run, whole)


def test_in_the_second_micro_batch(tmp_path):
    whole = undisturbed(tmp_path)
    run, room = prepared(small(tmp_path / "short"))
    calls = []
    fail(run.model, "predict", lambda *_: calls.append(0) or len(calls) in (2, 4), ERRORS[0])
    run.trainer.run()
    assert room.calls == 1 and run.trainer.recovery.measures.part_size == 2
    assert_close(run, whole)


@pytest.mark.parametrize("settings", [
    {}, TEXT, {"adapter": "loha"}, {"dora": True}, {"loss": "huber", "use_masks": True, "multires_noise_iterations": 3}
], ids=["lora", "text", "loha", "dora", "huber"])  # fmt: skip
@pytest.mark.parametrize("most", [2, 1])
def test_only_so_many_pictures_fit_at_once(tmp_path, settings, most):
    whole = undisturbed(tmp_path, **settings)
    run, _ = prepared(small(tmp_path / "short", **settings))
    fail(run.model, "predict", lambda latents, *_: len(latents) > most, ERRORS[1])
    run.trainer.run()
    measures = run.trainer.recovery.measures
    assert (measures.part_size, measures.gradient_checkpointing, measures.optimizer_on_cpu) == (most, False, False)
    assert f"at most {most} " in run.recorder.warnings[-1] and not run.model.checkpointing
    assert_close(run, whole)


def test_gradient_checkpointing_is_the_next_measure(tmp_path):
    whole = undisturbed(tmp_path)
    run, _ = prepared(small(tmp_path / "short"))
    fail(run.model, "predict", lambda *_: run.trainer.step == 1 and not run.model.checkpointing, ERRORS[0])
    run.trainer.run()
    measures = run.trainer.recovery.measures
    assert (measures.part_size, measures.gradient_checkpointing, measures.optimizer_on_cpu) == (1, True, False)
    assert run.model.checkpointing and "gradient checkpointing" in run.recorder.warnings[-1]
    assert_close(run, whole)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_optimizer_on_the_cpu_is_the_last_measure(tmp_path, optimizer):
    whole = undisturbed(tmp_path, optimizer=optimizer)
    run, _ = prepared(small(tmp_path / "short", optimizer=optimizer))
    measures = run.trainer.recovery.measures
    fail(run.model, "predict", lambda *_: run.trainer.step == 2 and not measures.optimizer_on_cpu, ERRORS[0])
    run.trainer.run()
    assert measures.optimizer_on_cpu and measures.gradient_checkpointing and measures.part_size == 1
    assert len(run.recorder.warnings) == 5 and "on the CPU" in run.recorder.warnings[-1]
    assert_close(run, whole)


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_in_the_optimizers_first_step_half_of_it_done(tmp_path, optimizer, failures):
    whole = undisturbed(tmp_path, optimizer=optimizer)
    run, _ = prepared(small(tmp_path / "short", optimizer=optimizer))
    parameters = run.trainer.train_step.parameters
    step, left = run.trainer.train_step.optimizer.step, list(range(failures))

    def half(*arguments):
        step(*arguments)
        if left:
            left.pop()
            with torch.no_grad():
                parameters[0].add_(1.0)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    run.trainer.train_step.optimizer.step = half
    run.trainer.run()
    measures = run.trainer.recovery.measures
    assert not left and measures.optimizer_on_cpu == (failures == 2) and measures.part_size is None
    assert_close(run, whole)
    if failures == 1:
        assert same(run.final, whole.final)


def test_while_the_average_is_updated(tmp_path):
    whole = undisturbed(tmp_path)
    run, _ = prepared(small(tmp_path / "short"))
    fail(run.trainer.train_step.ema, "update", times(run, 1, step=0), ERRORS[0], after=True)
    run.trainer.run()
    assert same(run.final, whole.final) and not run.trainer.train_step.updating


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch < 2.3 has GradScaler for CUDA only")
@pytest.mark.parametrize("place", ["forward", "clipping", "update"])
def test_with_scaled_gradients(tmp_path, place, monkeypatch):
    def scaled(folder):
        run, _ = prepared(small(folder, ema_decay=None))
        run.trainer.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        return run

    whole = scaled(tmp_path / "undisturbed")
    whole.trainer.run()
    run = scaled(tmp_path / "short")
    step = run.trainer.train_step
    when = times(run, 1, step=0)
    if place == "forward":
        fail(run.model, "predict", when, ERRORS[0])
    elif place == "clipping":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)  # put back at the end
        fail(torch.nn.utils, "clip_grad_norm_", when, ERRORS[0])
    else:
        fail(step.optimizer, "step", when, ERRORS[0])
    run.trainer.run()
    assert same(run.final, whole.final) and len(run.recorder.warnings) == 1
    assert step.scaler.state_dict() == whole.trainer.train_step.scaler.state_dict()


def test_latents_and_captions_are_encoded_when_there_is_room(tmp_path):
    whole = undisturbed(tmp_path)

    class Short(FakeModel):
        failed = 0

        def encode_images(self, pixels):
            return self._sometimes(super().encode_images, pixels)

        def encode_prompts(self, *arguments, **options):
            return self._sometimes(super().encode_prompts, *arguments, **options)

        def _sometimes(self, encode, *arguments, **options):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls % 2:
                self.failed += 1
                raise ERRORS[self.failed % len(ERRORS)]
            return encode(*arguments, **options)

    run = Run(small(tmp_path / "short"), Short())
    assert run.model.failed == 12 + 13
    run.trainer.run()
    assert same(run.final, whole.final)


def test_captions_that_cannot_be_encoded_name_the_device(tmp_path):
    class Full(FakeModel):
        def encode_prompts(self, *arguments, **options):
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")

    with pytest.raises(UserError) as error:
        Run(small(tmp_path), Full())
    assert error.value.field == "device"


@pytest.mark.parametrize("most", ["pictures", "everything"])
def test_a_resumed_run_keeps_what_was_changed(tmp_path, most):
    def short(folder: Path) -> Run:
        run, _ = prepared(small(folder))
        measures = run.trainer.recovery.measures
        if most == "pictures":
            fail(run.model, "predict", lambda latents, *_: len(latents) > 2, ERRORS[0])
        else:
            when = lambda *_: run.trainer.step >= 1 and not measures.optimizer_on_cpu  # noqa: E731
            fail(run.model, "predict", when, ERRORS[0])
        return run

    plain = undisturbed(tmp_path)
    whole = short(tmp_path / "whole")
    whole.trainer.run()
    killed = short(tmp_path / "killed")
    killed.recorder._on = {3: kill}
    with pytest.raises(Killed):
        killed.trainer.run()
    resumed = short(tmp_path / "killed")
    resumed.trainer.run()
    assert len(resumed.recorder.reports) < 4 and resumed.trainer.recovery.measures == whole.trainer.recovery.measures
    assert len(resumed.recorder.warnings) == 1 and "short before" in resumed.recorder.warnings[0]
    assert resumed.model.checkpointing == (most == "everything")
    assert same(resumed.final, whole.final)
    for name, value in resumed.final.items():
        torch.testing.assert_close(value, plain.final[name], rtol=2e-4, atol=2e-6)


def test_when_all_measures_are_used_up_the_state_is_saved_without_the_activations(tmp_path):
    run, room = prepared(small(tmp_path))
    predict, kept, living = run.model.predict, [], []

    def too_large(*arguments):
        if run.trainer.step == 2:
            activations = torch.zeros(10)
            kept.append(weakref.ref(activations))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(*arguments)

    run.model.predict = too_large
    save = run.trainer._save_state
    run.trainer._save_state = lambda: (living.append([ref() is not None for ref in kept]), save())[1]
    with pytest.raises(UserError) as error:
        run.trainer.run()
    assert error.value.field == "resolution" and "lora_rank" in error.value.remedy
    assert room.calls == 1 and len(kept) == 1 + 1 + 2 + 1 + 1  # as it is, with room, 2 and 1 at once, and two more
    assert living[-1] == [False] * len(kept)
    assert run.trainer.states.newest().step == 2
    measures = run.trainer.recovery.measures
    assert (measures.part_size, measures.gradient_checkpointing, measures.optimizer_on_cpu) == (1, True, True)
    onward = Run(run.config)
    onward.trainer.run()
    assert onward.recorder.reports[0].step == 3 and onward.model.checkpointing


def test_other_errors_are_no_matter_of_memory(tmp_path):
    run, room = prepared(small(tmp_path))
    fail(run.model, "predict", lambda *_: True, RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="assert"):
        run.trainer.run()
    assert not room.calls and not run.recorder.warnings


def test_a_preview_without_memory_is_left_out(tmp_path):
    class Painter:
        def draw(self, *arguments):
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    config = small(tmp_path, preview_prompts=["a"], preview_steps=2)
    run = Run(config, previewer=Painter())
    assert run.trainer.run().status == "finished"
    assert run.adapters.training and "No preview at step 0" in run.recorder.warnings[0]


def test_who_keeps_his_state_on_the_card_is_told_of_one_who_need_not(tmp_path):
    run, _ = prepared(small(tmp_path))
    for optimizer, told in (("adamw8bit", True), ("adamw", False)):
        run.trainer.config = replace(run.trainer.config, optimizer=optimizer)
        with pytest.raises(UserError) as error:
            run.trainer.give_up_for_memory(ERRORS[0])
        assert ("optimizer: adamw" in error.value.remedy) == told
