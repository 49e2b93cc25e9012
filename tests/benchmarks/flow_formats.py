"""What a LoRA of FLUX.1 learns on weights in few bits, beside what it learns on bf16.

    python -m tests.benchmarks.flow_formats                       bf16, fp8 files, base_precision fp8 and nf4, GGUF Q8_0
    python -m tests.benchmarks.flow_formats --form nf4 --steps 50

Each run is a whole one, on a tiny FLUX.1 with random weights, and sees the same pictures, noise and noise levels. Two
runs on bf16 tell what is noise: one with another seed, and one in which only the numbers of the computation are
rounded (bf16). Printed are the loss at the end (mean of the last quarter), how much of the loss of the first quarter
is gone, and the cosine of the whole change of the weights with that of the first run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.config import from_mapping
from lora_trainer.run import file_lender, train
from lora_trainer.training.callbacks import StepReport, TrainCallbacks
from tests import flux as tiny
from tests.gguf import F32, Q8_0, quantized, write
from tests.pictures import draw_dataset

NOISE = {"another seed": {"seed": 7}, "computed in bf16": {"mixed_precision": "bf16"}}
FORMS = ("fp8", "scaled fp8", "base_precision fp8", "base_precision nf4", "GGUF Q8_0")


@dataclass(frozen=True)
class Learned:
    """losses: of the steps. change: of all weights, as one vector."""

    losses: list[float]
    change: Tensor

    @property
    def start(self) -> float:
        return fmean(self.losses[: max(1, len(self.losses) // 4)])

    @property
    def end(self) -> float:
        return fmean(self.losses[-max(1, len(self.losses) // 4) :])

    def cosine(self, other: Learned) -> float:
        return float(torch.nn.functional.cosine_similarity(self.change, other.change, dim=0))


class _Losses(TrainCallbacks):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step(self, report: StepReport) -> None:
        assert report.loss is not None
        self.seen.append(report.loss)


def learn(settings: Mapping[str, Any], folder: Path) -> Learned:
    config, losses = from_mapping({**settings, "output_dir": str(folder)}), _Losses()
    lora = train(config, file_lender(config), callbacks=losses).lora
    assert lora is not None
    modules = read_lora(lora).modules
    parts = []
    for name in sorted(modules):
        down, up = (modules[name].tensors[f"lora_{part}.weight"].float() for part in ("down", "up"))
        parts.append((up @ down).flatten())
    return Learned(losses.seen, torch.cat(parts))


def settings_of(folder: Path, steps: int) -> dict[str, Any]:
    return {
        **tiny.tiny_flux(folder / "base", dtype=torch.bfloat16),
        "train_data_dir": str(draw_dataset(folder / "pictures", 6, lambda index: (64, 64))),
        "cache_dir": str(folder / "cache"), "output_name": "learned", "resolution": "64", "lora_rank": 4,
        "learning_rate": 1e-3, "lr_scheduler": "constant", "max_train_steps": steps, "save_precision": "fp32",
        "mixed_precision": "no", "device": "cpu", "tensorboard": False, "export_diffusers": False,
    }  # fmt: skip


def changes_of(form: str, base: Path) -> dict[str, Any]:
    """The settings of a run on weights in this form; a file in it is written beside ``base``."""
    if form.startswith("base_precision"):
        return {"base_precision": form.split()[1]}
    tensors = load_file(str(base))
    matrices = {name for name, tensor in tensors.items() if tensor.dim() == 2 and "_blocks." in name}
    if form == "GGUF Q8_0":
        of_file = {
            name: (Q8_0, tuple(tensor.shape), quantized(tensor.float())) if name in matrices
            else (F32, tuple(tensor.shape), tensor.float().numpy().tobytes())
            for name, tensor in tensors.items()
        }  # fmt: skip
        return {"base_model": str(write(base.with_suffix(".gguf"), of_file))}
    stored = dict(tensors)
    for name in matrices:
        scale = tensors[name].float().abs().max() / 448 if form == "scaled fp8" else torch.tensor(1.0)
        stored[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        if form == "scaled fp8":
            stored[name.replace(".weight", ".scale_weight")] = scale.view(1)
    path = base.with_name(form.replace(" ", "_") + ".safetensors")
    save_file(stored, str(path))
    return {"base_model": str(path)}


def compare(forms: tuple[str, ...], steps: int, folder: Path) -> dict[str, tuple[float, float, float]]:
    """By what the weights are: the loss at the end, the share of the loss that is gone, and the cosine."""
    settings = settings_of(folder, steps)
    runs = {"bf16": {}, **NOISE, **{form: changes_of(form, Path(settings["base_model"])) for form in forms}}
    found, first = {}, None
    for name, changes in runs.items():
        learned = learn({**settings, **changes}, folder / name.replace(" ", "_"))
        first = first or learned
        found[name] = end, gone, cosine = learned.end, 1 - learned.end / learned.start, learned.cosine(first)
        print(f"{name:20} {end:8.4f} {gone:8.3f} {cosine:8.4f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS, nargs="+", default=FORMS)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    print(f"{'weights':20} {'loss':>8} {'gone':>8} {'cosine':>8}")
    with tempfile.TemporaryDirectory() as folder:
        compare(tuple(arguments.form), arguments.steps, Path(folder))


if __name__ == "__main__":
    main()
