"""Runs that learn a change on a tiny model: from words, from a pair in both ways, from opposites."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lora_trainer.config import from_mapping
from lora_trainer.dataset import images, known
from lora_trainer.errors import UserError
from lora_trainer.models.base import FlowSchedule
from lora_trainer.run import file_lender, train
from lora_trainer.run.workloads import workload_of
from lora_trainer.run.workloads.words import Words
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.state import read_state
from tests.flux import tiny_flux

KINDS = {
    "words": {"task": "words", "original_prompt": "a circle", "target_prompt": "a square", "both_ways": True,
              "protected_prompts": ["a ring"], "batch_size": 2, "denoised_steps": 3},
    "pair": {"task": "pair", "pair_mask": True, "saved_strength": 2.0, "min_scale": 0.5},
    "copier": {"task": "pair", "pair_method": "copier", "copy_steps": 3},
    "slider": {"task": "slider"},
}  # fmt: skip


class Listener(TrainCallbacks):
    def __init__(self):
        self.steps, self.warnings = [], []

    def on_step(self, report):
        self.steps.append(report)

    def on_warning(self, text):
        self.warnings.append(text)


class Stopper(Listener):
    def __init__(self, step):
        super().__init__()
        self.commands, self._last = TrainCommands(), step

    def on_step(self, report):
        super().on_step(report)
        if report.step == self._last:
            self.commands.stop_and_save()


def write_pictures(folder, names, tint=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(tint)
    for name in names:
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def settings(tmp_path, tiny_base):
    pairs = write_pictures(tmp_path / "pairs", ["a.png", "a_after.png", "b.png", "b_after.png"])
    opposite = write_pictures(tmp_path / "opposite", ["c.png"], tint=1)
    for folder in (pairs, opposite):
        (folder / "a.txt").write_text("a disc")

    def of(kind, **changes):
        common = {
            "base_model": str(tiny_base), "output_dir": str(tmp_path / kind), "output_name": "it", "resolution": 64,
            "bucket_step": 32, "lora_rank": 2, "alpha": 1, "max_train_steps": 4, "learning_rate": 1e-2,
            "target_modules": ["to_q"], "save_precision": "fp32", "tensorboard": False, "train_data_dir": str(pairs),
        }  # fmt: skip
        if kind == "slider":
            common |= {"opposite_dir": str(opposite), "default_caption": "a disc"}
        if kind == "words":
            del common["train_data_dir"], common["bucket_step"]
        return {**common, **KINDS[kind], **changes}

    return of


def run(settings, listener=None, commands=None):
    config = from_mapping(settings)
    return train(config, file_lender(config), callbacks=listener or Listener(), commands=commands)


@pytest.mark.parametrize("kind", ["pair", "slider"])
def test_pictures_that_have_not_changed_are_not_decoded_by_the_next_run(settings, monkeypatch, kind):
    monkeypatch.setattr(known, "FRESH", -(10**12))  # the files of a test are young
    read, original = [], images._read
    monkeypatch.setattr(images, "_read", lambda path: read.append(path.name) or original(path))
    config = from_mapping(settings(kind))
    for expected in ({"pair": 4, "slider": 5}[kind], 0):
        read.clear()
        workload_of(config).open(config, file_lender(config), Listener(), TrainCommands())
        assert len(read) == expected


class Killer(Listener):
    """SIGKILL at a step: nothing of the run's own code gets to answer it."""

    def __init__(self, step):
        super().__init__()
        self._last = step

    def on_step(self, report):
        if report.step == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def kill(settings, step):
    child = os.fork()
    if child == 0:
        try:
            run(settings, Killer(step))
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), f"it ended before step {step}"


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("words", ["stop 2"]),
        # Three steps memorise what is before, four learn what is after.
        pytest.param(
            "copier",
            ["kill 1", "stop 2", "kill 5"],
            marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed run has a process of its own"),
        ),
        pytest.param("pair", ["stop 2"], marks=pytest.mark.slow),
        pytest.param("slider", ["stop 2"], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_or_killed_anywhere_goes_on_to_the_same_bytes(settings, tmp_path, kind, places):
    whole = run(settings(kind))
    assert whole.status == "finished" and whole.lora.name == "it.safetensors"
    wanted = load_file(str(whole.lora))
    assert any(tensor.abs().max() > 0 for name, tensor in wanted.items() if "lora_up" in name)
    changes = {"output_dir": str(tmp_path / "again"), "save_steps": 1 if kind == "copier" else None}
    for place in places:
        how, step = place.split()
        if how == "kill":
            kill(settings(kind, **changes), int(step))
            continue
        stopping = Stopper(int(step))
        stopped = run(settings(kind, **changes), stopping, stopping.commands)
        assert stopped.status == "stopped" and stopping.steps[-1].step == int(step)
        assert (stopped.lora is None) == (kind == "copier"), "the first LoRA is no result"
    listener = Listener()
    resumed = run(settings(kind, **changes), listener)
    assert listener.steps[0].step == int(step) + (how == "stop"), "what was done and saved is not done again"
    assert resumed.status == "finished"
    assert listener.warnings == [text for text in listener.warnings if "finished before" not in text]
    found = load_file(str(resumed.lora))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_a_run_leaves(settings, tmp_path):
    """The LoRA as every other: kohya's layout and diffusers', with the alpha that it is saved with."""
    listener = Listener()
    result = run(settings("pair", max_train_steps=1, preview_prompts=["a disc --s 1"]), listener)
    assert result.diffusers is not None and list((tmp_path / "pair" / "previews").iterdir())
    with safe_open(str(result.lora), "pt") as file:
        metadata = file.metadata()
        alphas = {file.get_tensor(name).item() for name in file.keys() if name.endswith("alpha")}  # noqa: SIM118
    assert alphas == {2.0} and metadata["ss_network_alpha"] == "2.0" and metadata["ss_num_train_images"] == "2"
    assert not listener.warnings


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        ("words", {"target_prompt": "a circle"}, "original_prompt"),
        ("words", {"positive_prompt": "old", "negative_prompt": "old"}, "positive_prompt"),
        ("words", {"guidance": 0}, "guidance"),
        ("words", {"guidance": 0, "positive_prompt": "old", "target_prompt": ""}, "guidance"),
        ("words", {"guidance": 0, "positive_prompt": "old", "target_prompt": "a circle"}, "guidance"),
        ("words", {"train_text_encoder": True}, "train_text_encoder"),
        ("words", {"prompt_templates": ["{} by day", "by night"]}, "prompt_templates"),
        ("pair", {"pair_suffix": "_then"}, "train_data_dir"),
        ("slider", {"opposite_dir": None}, "opposite_dir"),
        ("copier", {"copied_lora": "nothing.safetensors"}, "copied_lora"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_its_setting(settings, kind, changes, field):
    with pytest.raises(UserError) as caught:
        run(settings(kind, **changes))
    assert caught.value.field == field


def test_a_positive_prompt_at_guidance_0_leaves_the_target_prompt_to_learn(settings):
    Words.look(from_mapping(settings("words", guidance=0, positive_prompt="old")))


@pytest.mark.parametrize(
    ("takes_negative", "changes", "named"),
    [
        (False, {}, {}),  # as before the empty prompt was kept
        (True, {}, {"kept_prompts": ["", "a ring"]}),
        (True, {"both_ways": True}, {"kept_prompts": ["", "a ring"], "kept_turns": "each way"}),
        (False, {"both_ways": True}, {}),
        (False, {"prompt_templates": ["{}, at night"]}, {}),
    ],
)
def test_a_state_fits_where_the_steps_are_the_same(settings, takes_negative, changes, named):
    config = from_mapping(settings("words", **{"both_ways": False, **changes}))
    schedule = FlowSchedule("uniform", 1.0, None if takes_negative else 3.5, 4.0)
    model = SimpleNamespace(schedule=schedule, network_key="", vae_key="", text_key="",
                            info=SimpleNamespace(family="flux", prediction_type="flow"))  # fmt: skip
    key = Words(config, None, None, (64, 64)).run_key(model)
    assert {name: value for name, value in key.items() if name not in ("base_model", "noise_schedule")} == named


def test_pictures_of_a_pair_must_be_alike_and_others_are_left_out(settings, tmp_path):
    listener = Listener()
    write_pictures(tmp_path / "pairs", ["alone.png"])
    run(settings("pair", max_train_steps=1, flip=True), listener)
    assert listener.warnings == ["1 pictures belong to no pair and are left out: alone.png."]
    Image.new("RGB", (96, 64)).save(tmp_path / "pairs" / "a_after.png")
    with pytest.raises(UserError, match=r"a\.png and a_after\.png have different sizes: 64×64 and 96×64"):
        run(settings("pair"))


def test_both_pictures_of_a_pair_are_shown_at_the_same_places(settings):
    config = from_mapping(settings("pair", repeats=3))
    opened = workload_of(config).open(config, file_lender(config), Listener(), TrainCommands())
    before, after = (
        [(view.place, view.crop) for epoch in range(2) for batch in plan.epoch(epoch) for view in batch]
        for plan in opened._plans
    )
    assert before == after and len(set(before)) == len(before), "anew each time"


def test_settings_of_other_tasks_are_said_to_have_no_effect(settings):
    listener = Listener()
    run(settings("words", max_train_steps=1, flip=True, pair_suffix="_b", min_snr_gamma=3.0), listener)
    assert {text.partition(":")[0] for text in listener.warnings} == {"flip", "pair_suffix", "min_snr_gamma"}


def test_a_difference_of_two_pictures_preserves_nothing_and_says_so(settings, tmp_path):
    loras = []
    for preserve in (0.0, 0.9):
        listener = Listener()
        given = settings("pair", max_train_steps=3, trigger_word="disc", preserve=preserve)
        result = run({**given, "output_dir": str(tmp_path / f"with {preserve}")}, listener)
        loras.append(load_file(str(result.lora)))
        assert any(text.startswith("preserve:") for text in listener.warnings) == bool(preserve)
    assert all(torch.equal(value, loras[1][name]) for name, value in loras[0].items())


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return tiny_flux(tmp_path_factory.mktemp("flux"), double=1, single=1)


@pytest.mark.parametrize("kind", ["words", "pair"])
def test_a_flow_model_learns_a_change(settings, kind, flux):
    listener = Listener()
    prompts = {"original_prompt": "a red circle", "target_prompt": "a blue square"} if kind == "words" else {}
    result = run(settings(kind, target_modules=["attention"], max_train_steps=2, **prompts, **flux), listener)
    tensors = load_file(str(result.lora))
    assert result.status == "finished" and all(report.loss > 0 for report in listener.steps)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_up" in name)
    assert not [text for text in listener.warnings if "flow" in text]


def test_the_smaller_kind_of_a_slider_is_cropped_anew_each_time_it_is_gone_through(settings):
    wanted = settings("slider", random_crop=True, enable_bucket=False, max_train_steps=None, epochs=2)
    for folder in (wanted["train_data_dir"], wanted["opposite_dir"]):
        for path in Path(folder).glob("*.png"):
            Image.open(path).resize((208, 96)).save(path)
    result = run(wanted)
    assert result.status == "finished" and result.step == 2 * 4, "four pictures, and one of their opposite"


def test_a_first_pass_warns_of_nothing_that_nobody_set(settings):
    listener = Listener()
    run(settings("copier", max_train_steps=1, copy_steps=1), listener)
    assert not [warning for warning in listener.warnings if "keep_checkpoints" in warning]


def test_prompts_are_encoded_in_turns_and_a_stop_is_heard_between_them(settings, monkeypatch):
    templates = [f"{number} {{}}" for number in range(20)]
    listener, commands = Listener(), TrainCommands()
    phases = []

    def on_phase(name, done, total):
        phases.append((name, done, total))
        if name == "captions" and done == 32:
            commands.stop_and_save()

    monkeypatch.setattr(listener, "on_phase", on_phase)
    result = run(settings("words", prompt_templates=templates), listener, commands)
    assert result.status == "stopped" and not listener.steps
    assert [done for name, done, _ in phases if name == "captions"] == [0, 16, 32]


def test_runs_of_before_there_were_templates_go_on(settings):
    """What a run without them is told apart by, by name."""
    settings = settings("words", max_train_steps=1)
    result = run(settings)
    (state,) = Path(settings["output_dir"]).glob("state/*")
    assert "prompt_templates" not in read_state(state).run_key and result.status == "finished"
