"""A run that was stopped, killed or finished is started again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_trainer.errors import UserError
from lora_trainer.run import Result, summary
from lora_trainer.training.callbacks import TrainCommands
from tests.run.runs import Listener, assert_same_weights, run, weights


@pytest.mark.parametrize("resume, words", [("auto", "same command"), ("never", "resume: auto")])
def test_what_goes_on_after_a_stop(resume, words):
    assert words in summary(Result("stopped", 3, 9, 1.0, None), resume)


@pytest.mark.parametrize("changes", [
    {}, {"shuffle_tags": True, "tag_dropout": 0.3, "caption_dropout": 0.2},
    {"flip": True, "random_crop": True, "dropout": 0.2, "rank_dropout": 0.2},
    {"train_text_encoder": True, "ema_decay": 0.9}, {"gradient_accumulation_steps": 2, "epochs": 3},
])  # fmt: skip
def test_stopped_after_any_step_and_resumed_it_is_bit_identical(settings, tmp_path, changes):
    undisturbed = run(settings, output_dir=str(tmp_path / "undisturbed"), **changes)
    for _ in range(20):
        commands = TrainCommands()
        result = run(settings, Listener(lambda report, c=commands: c.stop_and_save()), commands, **changes)
        if result.status == "finished":
            break
    assert result.step == undisturbed.step
    assert_same_weights(undisturbed.lora, result.lora)


@pytest.mark.parametrize("text", [False, True])
def test_the_base_draws_what_it_knows_without_the_lora_that_goes_on(settings, tmp_path, text):
    """Of a run that begins with a LoRA, and of one that is resumed after its cache was lost."""
    drawn = {"preserve": 0.5, "preserve_pictures": 3, "trigger_word": "zwx", "train_text_encoder": text}
    folders = {name: {"output_dir": str(tmp_path / name)} for name in ("first", "second", "third")}

    def cached(name):
        return {path.name: path.read_bytes() for path in (tmp_path / name / "cache").rglob("*.cache")}

    first = run(settings, learning_rate=1e-2, **folders["first"], **drawn)
    run(settings, init_lora=str(first.lora), **folders["second"], **drawn)
    assert cached("second") == cached("first")
    commands = TrainCommands()
    stopping = Listener(lambda report: report.step == 2 and commands.stop_and_save())
    run(settings, stopping, commands, learning_rate=1e-2, **folders["third"], **drawn)
    shutil.rmtree(tmp_path / "third" / "cache")
    resumed = run(settings, learning_rate=1e-2, **folders["third"], **drawn)
    assert cached("third") == cached("first")
    assert_same_weights(first.lora, resumed.lora)


def test_a_finished_run_started_again_trains_no_step_and_says_where_the_file_is(settings):
    first = run(settings)
    before = weights(first.lora)
    first.lora.unlink()
    listener = Listener()
    second = run(settings, listener)
    assert second.status == "finished" and second.lora == first.lora and not listener.steps
    after = weights(second.lora)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_going_on_with_one_run_keeps_the_curves_of_another_in_the_folder(settings, tmp_path):
    commands = TrainCommands()
    run(settings, Listener(lambda report: report.step == 2 and commands.stop_and_save()), commands)
    run(settings, output_name="other", lora_rank=2)
    logs = tmp_path / "out" / "logs"
    curve = (logs / "metrics.jsonl").read_text()
    run(settings)
    assert (logs / "metrics-2.jsonl").read_text() == curve
    assert next(json.loads(line)["step"] for line in (logs / "metrics.jsonl").read_text().splitlines()) == 3


def test_continuing_from_a_lora(settings, tmp_path):
    first = run(settings)
    second = run(settings, init_lora=str(first.lora), output_name="more", lora_rank=8, max_train_steps=1)
    name = next(name for name in weights(first.lora) if name.endswith("lora_down.weight"))
    assert weights(second.lora)[name].shape[0] == 8
    with pytest.raises(UserError, match="init_lora"):
        run(settings, init_lora=str(tmp_path / "none.safetensors"), output_name="x")


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_is_bit_identical(settings, tmp_path):
    """SIGKILL twenty times, at random moments of loading, encoding, training and saving.

    The moments are told by what the run itself reports, a clock only says how far into a step:
    a machine whose speed changes meanwhile gets neither to the end of the run nor nowhere.
    """
    if not hasattr(os, "fork"):
        pytest.skip("kills forked children")
    script = tmp_path / "killer.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, random, signal, sys, time
            from pathlib import Path
            from safetensors import safe_open
            from lora_trainer.config import from_mapping
            from lora_trainer.run import file_lender, train
            from lora_trainer.training.callbacks import TrainCallbacks

            class Reporter(TrainCallbacks):
                def on_phase(self, name, done, total):
                    os.write(reports, b"p")

                def on_step(self, report):
                    os.write(reports, b"s")

            def read_until(kind, count):
                "Seconds from one report to the next, at their shortest; until `count` of a kind or the first step."
                shortest, last = 0.1, time.monotonic()
                while count and (report := os.read(heard, 1)):
                    if report == b"s":
                        shortest, last = min(shortest, time.monotonic() - last), time.monotonic()
                    count = 0 if kind == b"p" and report == b"s" else count - (report == kind)
                return shortest

            config = from_mapping(json.loads(sys.argv[1]))
            out, dice, kills, step_seconds = Path(config.output_dir), random.Random(1), 0, 0.1
            while True:
                heard, reports = os.pipe()
                child = os.fork()
                if not child:
                    train(config, file_lender(config), callbacks=Reporter())
                    os._exit(0)
                os.close(reports)
                if kills < int(sys.argv[2]):
                    kind, most = dice.choice([(b"p", 12), (b"s", 3)])
                    step_seconds = min(step_seconds, read_until(kind, dice.randint(0, most)))
                    time.sleep(dice.uniform(0, step_seconds))
                    os.kill(child, signal.SIGKILL)
                os.close(heard)
                status = os.waitpid(child, 0)[1]
                for path in out.rglob("*.safetensors"):  # whatever is visible is whole
                    with safe_open(str(path), "pt") as file:
                        [file.get_tensor(name) for name in file.keys()]
                if status == 0:
                    break
                kills += os.WIFSIGNALED(status)
            print("killed", kills)
            """
        )
    )
    # sums over several threads are rounded differently: both runs use one
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for name, kills in [("undisturbed", 0), ("killed", 20)]:
        config = json.dumps({**settings, "output_dir": str(tmp_path / name), "epochs": 40, "save_steps": 1})
        command = [sys.executable, script, config, str(kills)]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert output.stdout == f"killed {kills}\n", output.stdout + output.stderr
    assert_same_weights(tmp_path / "undisturbed" / "disc.safetensors", tmp_path / "killed" / "disc.safetensors")


def test_another_unet_behind_the_same_settings_is_another_run(settings, tmp_path):
    """Fine-tunes share VAE and text encoder with what they were made from."""
    first = run(settings)
    tensors = load_file(settings["base_model"])
    for name in tensors:
        if name.startswith("model.diffusion_model.") and name.endswith("to_q.weight"):
            tensors[name] = tensors[name] * 1.1
    other = tmp_path / "fine-tune.safetensors"
    with safe_open(settings["base_model"], "pt") as file:
        save_file(tensors, str(other), file.metadata())
    before = weights(first.lora)
    with pytest.raises(UserError, match="not made by this run"):
        run(settings, base_model=str(other))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(first.lora).items())
    listener = Listener()
    run(settings, listener, base_model=str(other), overwrite=True)
    assert len(listener.steps) == 6 and not any("finished before" in warning for warning in listener.warnings)


def test_the_refusal_of_a_longer_run_names_the_way_and_the_way_works(settings):
    short = run(settings, epochs=1)
    with pytest.raises(UserError) as caught:
        run(settings, epochs=2)
    state = re.search(r"resume: (\S+\.state)", caught.value.remedy)[1]
    assert Path(state).is_file() and f"step {short.step}" in caught.value.remedy
    listener = Listener()
    longer = run(settings, listener, epochs=2, resume=state)
    assert longer.step == 2 * short.step and len(listener.steps) == short.step
    assert any("epochs" in warning for warning in listener.warnings)


def test_a_run_that_had_finished_says_how_it_is_made_longer(settings):
    run(settings)
    listener = Listener()
    run(settings, listener)
    assert any("raise epochs and set resume: " in warning for warning in listener.warnings)
