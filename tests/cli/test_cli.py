"""The command line as a person meets it: what it prints and how it exits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lora_trainer.cli import main
from lora_trainer.errors import UserError
from tests.pictures import draw_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path, tiny_base):
    values = {
        "train_data_dir": str(draw_dataset(tmp_path / "data")),
        "base_model": str(tiny_base),
        "output_dir": str(tmp_path / "out"),
        "resolution": 64,
        "lora_rank": 2,
        "epochs": 1,
        "learning_rate": 1e-3,
        "tensorboard": False,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def call(capsys, *arguments):
    """Exit code, stdout, stderr of a command; a traceback in it fails the test."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err, err
    return code, out, err


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    bare = [sys.executable, "-S", "-m", "lora_trainer", "info", "x"]  # -S: without any installed package
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and " is not installed. " in done.stderr and "Traceback" not in done.stderr


def test_train_prints_where_the_file_is_and_how_to_use_it(capsys, config, tmp_path):
    code, out, err = call(capsys, "train", "--config", config, "output_name=my face", "trigger_word=zwx")
    assert code == 0, err
    assert str(tmp_path / "out" / "my face.safetensors") in out and "<lora:my face:0.8> zwx" in out


def test_a_damaged_cache_fails_as_what_may_be_tried_again_which_mends_it(capsys, config, tmp_path, monkeypatch):
    command = "train", "--config", config, "resume=never", "max_train_steps=1"
    assert call(capsys, *command)[0] == 0
    path = max((tmp_path / "out" / "cache").rglob("*.cache"), key=lambda path: path.stat().st_size)
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk damages a file
    later = time.time_ns() + 10**10
    monkeypatch.setattr(time, "time_ns", lambda: later)
    code, _, err = call(capsys, *command)
    assert code == 1 and "damaged or removed" in err
    assert call(capsys, *command)[0] == 0


def test_info_and_merge_and_check(capsys, config, tmp_path, tiny_base):
    call(capsys, "train", "--config", config)
    lora = tmp_path / "out" / "out.safetensors"
    code, out, _ = call(capsys, "info", lora)
    assert code == 0 and "sd_v1" in out and "2 ×" in out
    code, out, _ = call(capsys, "info", lora, "--json")
    assert json.loads(out)["metadata"]["ss_network_dim"] == "2"
    merged = tmp_path / "merged.safetensors"
    assert call(capsys, "merge", "--base", tiny_base, "--lora", lora, "--output", merged, "--weight", 0.5)[0] == 0
    without_vae = tmp_path / "no vae.safetensors"  # as WebUIs read it, with a VAE file of its own
    save_file({k: v for k, v in load_file(tiny_base).items() if not k.startswith("first_stage")}, without_vae)
    other = tmp_path / "merged, no vae.safetensors"
    assert call(capsys, "merge", "--base", without_vae, "--lora", lora, "--output", other, "--weight", 0.5)[0] == 0
    assert all(torch.equal(tensor, load_file(merged)[name]) for name, tensor in load_file(other).items())
    before = merged.read_bytes()
    code, _, err = call(capsys, "merge", "--base", tiny_base, "--lora", lora, "--output", merged)
    assert code == 2 and "merged.safetensors" in err and merged.read_bytes() == before
    code, out, _ = call(capsys, "check", tmp_path / "data", "--resolution", 64, "--json")
    report = json.loads(out)
    assert code == 0
    assert all({"file", "kind", "severity", "message"} <= set(finding) for finding in report["findings"])


@pytest.mark.parametrize("arguments, word", [
    (["train"], "--config"),
    (["train", "--config", "no such.yaml"], "no such.yaml"),
    (["train", "epochs"], "name=value"),
    (["train", "train_data_dir=nowhere", "base_model="], "base_model"),
    (["train", "train_data_dir=nowhere", "base_model=none.safetensors"], "none.safetensors"),
    (["train", "learning_rate=fast", "epochs=-1"], "4 settings"),
    (["train", "lora_rnak=3"], "lora_rank"),
    (["info", "nothing.safetensors"], "nothing.safetensors"),
    (["merge", "--base", "a.safetensors", "--lora", "b.safetensors", "--output", "c.safetensors"], "a.safetensors"),
    (["check", "no such folder"], "no such folder"),
    (["frobnicate"], "frobnicate"),
    (["check", ".", "--resolution", "0"], "64 to 8192"),
    (["info", "x" * 300], "x" * 300),
    (["check", "x" * 300], "x" * 300),
    (["caption", "--input", "x" * 300], "x" * 300),
    (["merge", "--base", "x" * 300, "--lora", "a", "--output", "b"], "x" * 300),
    (["train", f"base_model={'x' * 300}", "train_data_dir=."], "x" * 300),
])  # fmt: skip
def test_bad_input_is_one_message_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert code == 2 and word in out + err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("field, value, word", [
    ("train_data_dir", "empty", "empty"), ("metadata_path", "missing.csv", "missing.csv"),
    ("init_lora", "missing.safetensors", "missing.safetensors"), ("vae", "missing.pt", "missing.pt"),
    ("optimizer", "prodigyx", "prodigy"), ("device", "cuda:7", "device"), ("target_modules", "[to_qq]", "to_q"),
    ("output_name", "a/b", "output_name"), ("resume", "nothing.state", "nothing.state"),
    ("reg_data_dir", "nowhere", "nowhere"), ("mixed_precision", "fp16", "mixed_precision"),
])  # fmt: skip
def test_every_wrong_setting_names_itself(capsys, config, tmp_path, monkeypatch, field, value, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, _, err = call(capsys, "train", "--config", config, f"{field}={value}")
    assert code == 2, err
    assert word in err and f"error: {field}:" in err


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("settings", ["right", "wrong", "unreadable"])
def test_settings_base_model_and_pictures_are_complained_of_in_one_answer(capsys, config, tmp_path, command, settings):
    (tmp_path / "empty").mkdir()
    values = yaml.safe_load(config.read_text()) | {
        "base_model": str(tmp_path / "none.safetensors"), "train_data_dir": str(tmp_path / "empty"),
        "init_lora": str(tmp_path / "no lora.safetensors"),
    }  # fmt: skip
    values |= {"epochs": -1} if settings != "right" else {}
    config.write_text(yaml.safe_dump(values) + ("alpha 3\n" if settings == "unreadable" else ""))
    code, out, err = call(capsys, command, "--config", config)
    said = out + err
    assert code == 2 and "none.safetensors" in said and "empty" in said and "no lora.safetensors" in said
    assert ("epochs" in said) == (settings != "right") and ("alpha 3" in said) == (settings == "unreadable")


def test_a_base_model_that_is_none_and_missing_pictures_are_said_together(capsys, config, tmp_path):
    (tmp_path / "base.safetensors").write_bytes(b"not a model")
    changes = (f"base_model={tmp_path / 'base.safetensors'}", "train_data_dir=nowhere")
    code, _, err = call(capsys, "train", "--config", config, *changes)
    assert code == 2 and "base_model" in err and "nowhere" in err


def test_check_of_a_training_reports_on_its_pictures(capsys, config):
    code, out, _ = call(capsys, "check", "--config", config)
    assert code == 0 and "A training can start" in out
    code, out, _ = call(capsys, "check", "--config", config, "--json")
    assert code == 0 and json.loads(out)["problems"] == [] and not json.loads(out)["stops_training"]
    code, _, err = call(capsys, "check")
    assert code == 2 and "--config" in err


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_base_model_is_one_message(capsys, config, tmp_path, tiny_base, seed):
    dice = random.Random(seed)
    data = bytearray(tiny_base.read_bytes()[: dice.choice([0, 1, 7, 8, 9, 100, 5000, 10**9])])
    for _ in range(dice.randrange(4)):
        if data:
            data[dice.randrange(min(len(data), 4000))] = dice.randrange(256)
    path = tmp_path / f"模型 {seed}{dice.choice(['.safetensors', '.ckpt', '.pt', ''])}"
    path.write_bytes(bytes(data))
    code, _, err = call(capsys, "train", "--config", config, f"base_model={path}", "max_train_steps=1")
    assert code in (0, 2) and (code == 0 or "模型" in err)
    assert path.read_bytes() == bytes(data)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_saves_the_state_and_exits_with_130(config, tmp_path):
    command = [sys.executable, "-m", "lora_trainer", "train", "--config", str(config), "epochs=2000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "logs" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "go on from here" in out
    assert list((tmp_path / "out" / "state").glob("*.state"))


def test_a_path_may_begin_at_home(capsys, config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "train", "--config", config, "train_data_dir=~/data", "output_dir=~/my loras")
    assert code == 0, err
    assert (tmp_path / "my loras" / "my loras.safetensors").is_file() and not (tmp_path / "~").exists()


def test_a_message_stands_on_a_line_of_its_own(capsys, config, monkeypatch):
    def fail(*arguments, callbacks, **options):
        callbacks.on_phase("latents", 1, 2)
        raise UserError("Something is wrong.")

    monkeypatch.setattr("lora_trainer.run.train", fail)
    code, _, err = call(capsys, "train", "--config", config)
    assert code == 2 and err.splitlines()[-1] == "error: Something is wrong."


def test_a_full_disk_is_said_and_leaves_what_was_there(capsys, config, tmp_path, monkeypatch):
    import errno

    from lora_trainer import files

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    code, _, err = call(capsys, "train", "--config", config)
    assert code == 2 and "No space left" in err
    assert not list(tmp_path.rglob("*.tmp"))


def test_names_that_the_console_cannot_print_do_not_end_a_training(config, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    draw_dataset(tmp_path / "图片 数据", 2)
    command = [sys.executable, "-m", "lora_trainer", "train", "--config", str(config), "max_train_steps=1",
               f"train_data_dir={tmp_path / '图片 数据'}", f"output_dir={tmp_path / '输出'}"]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "输出" / "输出.safetensors").exists()
