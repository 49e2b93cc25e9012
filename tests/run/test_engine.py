"""Whole runs on a tiny model: from pictures to files that are right, repeatable and safe."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import from_mapping, load
from lora_trainer.devices import torch_version
from lora_trainer.errors import UserError
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.run import file_lender, summary, train
from lora_trainer.run.workloads import image_model
from lora_trainer.run.workloads.pictures import Pictures
from lora_trainer.training.callbacks import TrainCommands
from tests.jobs.fakes import FakeLender
from tests.pictures import draw_dataset
from tests.run.runs import Listener, assert_same_weights, run, weights


def test_a_run_leaves_everything_it_promises(settings, tmp_path):
    listener = Listener()
    result = run(settings, listener, trigger_word="zwx")
    out = tmp_path / "out"
    assert result.status == "finished" and result.step == result.total_steps == len(listener.steps) == 6
    assert result.lora == out / "disc.safetensors" and result.diffusers == out / "pytorch_lora_weights.safetensors"
    assert {path.name for path in out.glob("*.safetensors")} == {
        "disc.safetensors", "disc-step00000002.safetensors", "disc-step00000004.safetensors",
        "pytorch_lora_weights.safetensors",
    }  # fmt: skip
    metrics = [json.loads(line) for line in (out / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == list(range(1, 7))
    assert sum(entry["images"] for entry in metrics) == 2 * 5, "no picture is dropped"
    assert not list(out.rglob("*.tmp"))
    with safe_open(str(result.lora), "pt") as file:
        metadata = file.metadata()
        assert any(file.get_tensor(name).abs().max() > 0 for name in file.keys() if "lora_up" in name)  # noqa: SIM118
    assert metadata["ss_output_name"] == "disc" and metadata["ss_num_train_images"] == "5"
    assert metadata["modelspec.trigger_phrase"] == "zwx"
    assert "<lora:disc:0.8> zwx" in summary(result)


@pytest.mark.skipif(torch_version() < (2, 2), reason="bf16 on the CPU crashes this torch")
def test_the_layers_of_a_run_compute_with_copies_in_its_format(settings, monkeypatch):
    """In the order in which a run builds things; the joint q, k, v products are known once adapters are attached."""
    found = []
    begin = AdapterSet.begin_step

    def look(adapters, *arguments):
        found.append([bool(joint.working) for joint in adapters.joints])
        return begin(adapters, *arguments)

    monkeypatch.setattr(AdapterSet, "begin_step", look)
    run(settings, mixed_precision="bf16", max_train_steps=1)
    assert found[0] and all(found[0])


class WatchedLender(FileLender):
    """Knows whether somebody has a turn."""

    in_turn, hashed = False, 0

    @contextmanager
    def turn(self):
        self.in_turn = True
        try:
            yield
        finally:
            self.in_turn = False

    def model_hash(self):
        assert not self.in_turn, "a WebUI would wait while gigabytes are read"
        self.hashed += 1
        return super().model_hash()


def test_the_base_is_hashed_once_and_outside_of_turns(settings):
    config = from_mapping({**settings, "max_train_steps": 2, "save_steps": 1})
    lender = WatchedLender(config.base_model)
    with safe_open(str(train(config, lender).lora), "pt") as file:
        assert lender.hashed == 1 and lender.model_hash() in file.metadata().values()


def test_the_saved_configuration_runs_again_to_the_same_result(settings, tmp_path):
    first = run(settings)
    config = load(tmp_path / "out" / "disc.config.yaml", [f"output_dir={tmp_path / 'again'}"])
    second = train(config, file_lender(config))
    assert_same_weights(first.lora, second.lora)


def test_a_lora_that_another_run_made_is_not_written_over(settings, tmp_path):
    first = run(settings)
    before = first.lora.read_bytes()
    with pytest.raises(UserError, match="overwrite") as caught:
        run(settings, seed=7)
    assert caught.value.field == "output_name" and first.lora.read_bytes() == before
    foreign = tmp_path / "out" / "mine.safetensors"
    foreign.write_bytes(b"not even a LoRA")
    with pytest.raises(UserError, match=r"mine\.safetensors"):
        run(settings, output_name="mine")
    assert foreign.read_bytes() == b"not even a LoRA"
    again = run(settings, seed=7, overwrite=True)
    assert again.lora.read_bytes() != before
    assert again.diffusers == first.diffusers, "the older one would be taken for this LoRA"


def test_two_names_in_one_folder_keep_apart(settings, tmp_path):
    first = run(settings)
    second = run(settings, output_name="other", seed=7)
    assert second.diffusers == tmp_path / "out" / "pytorch_lora_weights-other.safetensors"
    assert weights(first.diffusers).keys() == weights(second.diffusers).keys()


def test_old_checkpoints_are_let_go(settings, tmp_path):
    (tmp_path / "out").mkdir()
    foreign = tmp_path / "out" / "disc-stepping.safetensors"
    foreign.write_bytes(b"somebody else's")
    run(settings, save_steps=1, keep_checkpoints=2)
    steps = sorted(path.stem[-1] for path in (tmp_path / "out").glob("disc-step0*.safetensors"))
    assert steps == ["4", "5"] and foreign.read_bytes() == b"somebody else's"


def test_a_foreign_checkpoint_is_not_written_over(settings, tmp_path):
    (tmp_path / "out").mkdir()
    foreign = tmp_path / "out" / "disc-step00000002.safetensors"
    foreign.write_bytes(b"somebody else's")
    with pytest.raises(UserError, match="step00000002"):
        run(settings)
    assert foreign.read_bytes() == b"somebody else's"


def test_previews_without_a_webui(settings):
    listener = Listener()
    run(settings, listener, preview_prompts=["a red disc"], save_steps=3)
    assert listener.previews and all(path.stat().st_size > 100 for path in listener.previews)


def test_each_phase_is_said_as_it_begins_and_with_its_own_count(settings):
    """ "Encoding the captions 2/2" once stood there while the first preview was drawn."""
    listener = Listener()
    run(settings, listener, preview_prompts=["a red disc", "a blue one"], save_steps=2, max_train_steps=3)
    names = [name for name, _ in itertools.groupby(listener.phases, key=lambda phase: phase[0])]
    saved = ["hashing", "saving", "previews"]
    assert names == [*("pictures", "model", "trying", "latents", "captions", "previews", "training"), *saved,
                     "training", *saved[1:]]  # fmt: skip
    drawn = [phase[1:] for phase in listener.phases if phase[0] == "previews"]
    assert drawn == [(0, 2), (1, 2), (2, 2)] * 3
    assert [phase[1:] for phase in listener.phases if phase[0] == "training"] == [(0, 3), (2, 3)]


def test_previews_in_the_data_folder_are_no_pictures_to_train_on(settings):
    settings |= {"output_dir": settings["train_data_dir"], "trigger_word": "zwx", "preview_prompts": ["a red disc"]}
    first, again = Listener(), Listener()
    run(settings, first, preview_steps=1)
    run(settings, again, preview_steps=1)
    assert first.previews and ("pictures", 5, 5) in again.phases
    assert any("finished before" in warning for warning in again.warnings), "it was taken for another run"


def test_unusable_pictures_are_left_out_with_a_word(settings, tmp_path):
    folder = tmp_path / "圆 盘 pictures"
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    listener = Listener()
    assert run(settings, listener).status == "finished"
    assert any("broken.png" in warning for warning in listener.warnings)


def test_no_caption_at_all_names_the_picture(settings, tmp_path):
    draw_dataset(tmp_path / "bare", 2, caption=lambda index: None)
    with pytest.raises(UserError, match="disc 0"):
        run(settings, train_data_dir=str(tmp_path / "bare"))
    assert run(settings, train_data_dir=str(tmp_path / "bare"), trigger_word="zwx").status == "finished"


def test_merged_into_the_base(settings, tmp_path, tiny_base):
    result = run(settings, merge_into_base=str(tmp_path / "merged.safetensors"))
    base, merged = weights(tiny_base), weights(result.merged)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert base.keys() == merged.keys() and changed
    assert all("transformer_blocks" in name or "proj_" in name for name in changed)


@pytest.mark.parametrize("field, changes", [
    ("optimizer_args", {"optimizer_args": {"betas": [0.9]}}),
    ("block_lr_weights", {"block_lr_weights": [0] * 25}),
    ("debiased_estimation", {"debiased_estimation": True, "min_snr_gamma": None, "zero_terminal_snr": True}),
    ("resume", {"resume": "no such.state"}),
    ("resume", {"resume": __file__}),
])  # fmt: skip
def test_settings_that_do_not_go_together_are_said_before_anything_is_encoded(settings, tmp_path, field, changes):
    listener = Listener()
    with pytest.raises(UserError) as error:
        run(settings, listener, **changes)
    assert error.value.field == field
    assert "latents" not in {name for name, _, _ in listener.phases} and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, word", [
    ("taken.safetensors", "exists already"), ("merged", ".safetensors"), ("out/disc.safetensors", "would replace"),
    ("taken.safetensors/merged.safetensors", "no folder to write to"),
])  # fmt: skip
def test_what_cannot_be_merged_is_said_before_the_training(settings, tmp_path, name, word):
    (tmp_path / "taken.safetensors").write_text("mine")
    listener = Listener()
    with pytest.raises(UserError, match=word):
        run(settings, listener, merge_into_base=str(tmp_path / name))
    assert not listener.steps and (tmp_path / "taken.safetensors").read_text() == "mine"


def test_a_merge_that_fails_leaves_the_finished_lora(settings, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("the disk is full.")

    monkeypatch.setattr(image_model, "merge", fail)
    listener = Listener()
    result = run(settings, listener, merge_into_base=str(tmp_path / "merged.safetensors"))
    assert result.status == "finished" and result.lora.exists() and result.merged is None
    assert any("not merged" in text and "the disk is full" in text for text in listener.warnings)


def test_a_damaged_cache_is_made_anew(settings, tmp_path):
    first = run(settings)
    files = sorted((tmp_path / "out" / "cache").rglob("*.cache"))
    for path in random.Random(0).sample(files, 4):
        path.write_bytes(path.read_bytes()[:100])
    second = run(settings, output_name="second")
    assert_same_weights(first.lora, second.lora)


def test_pictures_that_changed_are_encoded_again(settings, tmp_path):
    first = run(settings)
    shutil.copy(tmp_path / "圆 盘 pictures" / "disc 01.png", tmp_path / "圆 盘 pictures" / "disc 03.png")
    second = run(settings, output_name="second")
    one, other = weights(first.lora), weights(second.lora)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_run_says_what_the_models_family_does_not_use(settings):
    listener = Listener()
    config = from_mapping({**settings, "clip_skip": 2, "conv_alpha": 2})
    Pictures.open(config, FakeLender("sdxl"), listener, TrainCommands())
    assert [text.partition(":")[0] for text in listener.warnings] == ["conv_alpha", "clip_skip"]
