"""Whole runs on tiny language models: from rows to a folder that PEFT reads, repeatable and safe."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.models.families.causal_lm.families import LANGUAGE_FAMILIES, REMOTE_CODE, transformers_release
from lora_trainer.models.families.causal_lm.lender import LanguageModelLender
from lora_trainer.run import file_lender, summary, train
from lora_trainer.run.workloads import task_of
from lora_trainer.training.callbacks import TrainCallbacks
from tests.language_models import tiny_language_model, write_rows

FIELDS = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
          "bias", "fan_in_fan_out", "inference_mode", "modules_to_save"}  # fmt: skip
BUILDABLE = [name for name, family in LANGUAGE_FAMILIES.items()
             if name != REMOTE_CODE and transformers_release() >= family.since]  # fmt: skip


class Listener(TrainCallbacks):
    def __init__(self):
        self.warnings, self.losses = [], []

    def on_warning(self, text):
        self.warnings.append(text)

    def on_step(self, report):
        self.losses.append(report.loss)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_language_model(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture
def settings(tmp_path, llama):
    return {
        "base_model": str(llama),
        "train_data_dir": str(write_rows(tmp_path / "rows.jsonl")),
        "output_dir": str(tmp_path / "out"),
        "output_name": "ward",
        "lora_rank": 4,
        "alpha": 8,
        "batch_size": 3,
        "epochs": 2,
        "learning_rate": 1e-2,
        "save_precision": "fp32",
        "chat_template": "plain",
        "tensorboard": False,
    }


def run(settings, listener=None, **changes):
    config = from_mapping({**settings, **changes})
    return train(config, file_lender(config), callbacks=listener or Listener())


def peft_logits(base: Path, adapter: Path | None, tokens: torch.Tensor) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(str(base), torch_dtype=torch.float32).eval()
    if adapter is not None:
        network = PeftModel.from_pretrained(network, str(adapter)).eval()
    with torch.no_grad():
        return network(input_ids=tokens).logits


def our_logits(base: Path, settings: dict, adapter: Path | None, tokens: torch.Tensor) -> torch.Tensor:
    from lora_trainer.adapters.initialize import init_from
    from lora_trainer.adapters.lora_file import read_lora

    with LanguageModelLender(base).borrow() as model, torch.no_grad():
        bare = model.network(input_ids=tokens).logits
        if adapter is None:
            return bare
        adapters = AdapterSet.build(model.lora_targets(), from_mapping(settings)).eval()
        assert init_from(adapters, read_lora(adapter)) == []
        with adapters:
            adapted = model.network(input_ids=tokens).logits
        assert torch.equal(model.network(input_ids=tokens).logits, bare), "detaching restores the base"
        return adapted


@pytest.mark.parametrize("model_type", BUILDABLE)
def test_what_a_run_writes_is_what_peft_computes(settings, tmp_path, model_type):
    base = tiny_language_model(tmp_path / "base", model_type)
    result = run(settings, base_model=str(base))
    assert result.status == "finished" and result.lora == tmp_path / "out" / "ward" / "adapter_model.safetensors"
    said = json.loads((result.lora.parent / "adapter_config.json").read_text())
    assert set(said) == FIELDS and said["r"] == 4 and said["lora_alpha"] == 8 and said["task_type"] == "CAUSAL_LM"
    with safe_open(str(result.lora), "pt") as file:
        assert file.metadata()["format"] == "pt"
    tokens = torch.arange(40).view(2, 20) % 300
    ours = our_logits(base, settings, result.lora.parent, tokens)
    theirs = peft_logits(base, result.lora.parent, tokens)
    assert (ours - theirs).abs().max() <= 1e-5
    bare = our_logits(base, settings, None, tokens)
    assert (bare - peft_logits(base, None, tokens)).abs().max() <= 1e-5
    assert (ours - bare).abs().max() > 1e-2, "something was learned"


def test_layers_that_only_some_blocks_train_are_named_whole(settings, tmp_path, llama):
    result = run(settings, target_modules=["/layers.0.self_attn.q_proj/", "v_proj"])
    said = json.loads((result.lora.parent / "adapter_config.json").read_text())
    assert said["target_modules"] == ["model.layers.0.self_attn.q_proj", "v_proj"]
    assert len(load_file(str(result.lora))) == 2 * 3
    settings = {**settings, "target_modules": ["/layers.0.self_attn.q_proj/", "v_proj"]}
    tokens = torch.arange(30)[None]
    ours = our_logits(llama, settings, result.lora.parent, tokens)
    assert (ours - peft_logits(llama, result.lora.parent, tokens)).abs().max() <= 1e-5


def test_the_loss_is_the_mean_over_the_labelled_tokens_of_the_whole_step(settings, llama):
    from transformers import AutoModelForCausalLM

    from lora_trainer.dataset.text.rows import read_rows
    from lora_trainer.run.workloads.text import encoder_of

    listener = Listener()
    run(settings, listener, batch_size=8, epochs=1, learning_rate=1e-3)
    network = AutoModelForCausalLM.from_pretrained(str(llama)).double().eval()
    encoder = encoder_of(from_mapping(settings), llama, "llama")
    total = count = 0
    for row in map(encoder.encode, read_rows(Path(settings["train_data_dir"]))[0]):
        tokens = torch.tensor(row.tokens)[None]
        chances = network(input_ids=tokens).logits[0].log_softmax(-1)
        for place in range(1, len(row)):
            if row.learned[place]:
                total, count = total - chances[place - 1, row.tokens[place]].item(), count + 1
    assert (
        0 < count < sum(len(row.tokens) for row in map(encoder.encode, read_rows(Path(settings["train_data_dir"]))[0]))
    )
    assert listener.losses[0] == pytest.approx(total / count, abs=1e-5)


def test_accumulation_and_batches_of_unequal_lengths_learn_the_same(settings, tmp_path):
    rows = [{"prompt": "who", "response": "cat " * (2 * place + 1)} for place in range(7)]
    settings = {**settings, "train_data_dir": str(write_rows(tmp_path / "unequal.jsonl", rows))}
    together = run(settings, batch_size=4, output_dir=str(tmp_path / "a"))
    divided = run(settings, batch_size=1, gradient_accumulation_steps=4, output_dir=str(tmp_path / "b"))
    assert together.total_steps == divided.total_steps == 4
    one, other = load_file(str(together.lora)), load_file(str(divided.lora))
    assert all((one[name] - other[name]).abs().max() <= 1e-5 for name in one)
    # A mean of means would have weighted the short answers more.
    assert together.loss == pytest.approx(divided.loss, abs=1e-5)


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(settings, tmp_path):
    """Killed at 20 places, of which some are between the parts of a save; the same command goes on."""
    changes = {"save_steps": 2, "batch_size": 2, "dropout": 0.2, "ema_decay": 0.9, "gradient_checkpointing": True}
    settings = {**settings, **changes}
    run(settings, output_dir=str(tmp_path / "whole"))
    wanted = {path.name: (path / "adapter_model.safetensors").read_bytes() for path in folders(tmp_path / "whole")}
    assert len(wanted) == 4
    for place in (*range(1, 39, 2), 38):
        out = tmp_path / f"killed{place}"
        assert killed(settings, out, place), f"it ended before moment {place}"
        run(settings, output_dir=str(out))
        found = {path.name: (path / "adapter_model.safetensors").read_bytes() for path in folders(out)}
        assert found == wanted, f"killed at moment {place}"


def folders(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if (path / "adapter_model.safetensors").exists()]


def killed(settings, out: Path, place: int) -> bool:
    """Run in another process, which is killed at the ``place``-th of the moments that matter. Whether it was."""
    child = os.fork()
    if child == 0:
        try:
            run_until(settings, out, place)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def run_until(settings, out: Path, place: int) -> None:
    from lora_trainer import files

    left, replace = [place], files._replace

    def moment() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def replacing(source, target) -> None:
        moment()
        replace(source, target)
        moment()

    class Killer(TrainCallbacks):
        def on_step(self, report):
            moment()

    files._replace = replacing
    run(settings, Killer(), output_dir=str(out))


def test_a_lora_can_be_gone_on_with(settings, tmp_path, llama):
    first = run(settings)
    listener = Listener()
    run(settings, listener, init_lora=str(first.lora.parent), output_name="more", learning_rate=1e-6)
    assert listener.losses[0] < first.loss and not listener.warnings


def test_the_task_is_what_the_base_model_is(settings, llama, tmp_path):
    assert task_of(from_mapping(settings)) == "text"
    assert task_of(from_mapping({"base_model": str(tmp_path)})) == "image"
    assert task_of(from_mapping({"base_model": "v1-5.safetensors"})) == "image"
    assert task_of(from_mapping({"base_model": str(tmp_path), "task": "text"})) == "text"


def test_settings_of_pictures_are_said_to_have_no_effect(settings):
    listener = Listener()
    run(settings, listener, flip=True, resolution="512", max_train_steps=1)
    assert {text.partition(":")[0] for text in listener.warnings} == {"resolution", "flip", "epochs"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"adapter": "loha"}, "adapter"), ({"dora": True}, "dora"), ({"target_modules": ["to_x"]}, "target_modules")],
)
def test_what_cannot_be_trained_is_refused_with_its_setting(settings, changes, field):
    with pytest.raises(UserError) as caught:
        run(settings, **changes)
    assert caught.value.field == field


def test_held_out_rows_are_measured_and_end_the_run_when_they_get_worse(settings, tmp_path):
    """Answers that have nothing to do with their prompts are learned by heart; held-out ones only get less likely."""
    words = ["cat", "dog", "mat", "who", "far", "ran", "sat", "the"]
    rows = [
        {"prompt": f"who {one}", "response": f"{other} {one * 3}"}
        for one in words
        for other in [words[-1 - words.index(one)]]
    ]
    rows += [rows[0]]
    listener = Listener()
    changes = {"validation_share": 0.25, "validation_steps": 5, "early_stopping": "stop", "early_stopping_patience": 2,
               "epochs": 200, "batch_size": 4, "learning_rate": 3e-2, "lora_rank": 8}  # fmt: skip
    result = run({**settings, "train_data_dir": str(write_rows(tmp_path / "r.jsonl", rows))}, listener, **changes)
    assert any(text.startswith("Not trained, but measured: r.jsonl:") for text in listener.warnings)
    assert result.step < 200, "it stopped early"
    (said,) = [text for text in listener.warnings if "loss of held-out data has risen" in text]
    assert "That of training data fell" in said and "it memorises them" in said
    with pytest.raises(UserError) as caught:
        run({**settings, "train_data_dir": str(write_rows(tmp_path / "few.jsonl", rows[:3]))}, validation_share=0.5)
    assert caught.value.field == "validation_share"


def test_another_runs_folder_is_not_written_over(settings):
    result = run(settings)
    with pytest.raises(UserError) as caught:
        run(settings, learning_rate=2e-2)
    assert caught.value.field == "output_name"
    assert "generate --base" in summary(result)


def test_old_checkpoints_are_deleted_as_folders(settings, tmp_path):
    run(settings, save_steps=1, keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("ward-step"))
    assert names == ["ward-step00000004", "ward-step00000005"]
