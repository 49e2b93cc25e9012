"""What one optimizer step of SD 1.5 (512²) or SDXL (1024²) launches, moves and keeps on a GPU, counted without one.

    python -m tests.benchmarks.count_step                                every adapter, both families
    python -m tests.benchmarks.count_step --family sd1 --kind lora --details
    python -m tests.benchmarks.count_step --side diffusers               diffusers + PEFT, on the same shapes

The training step itself runs, at full size, on tensors without memory (see ``counting``). ``floor`` is the sum over all
kernels of what each takes at least: by its operations, its bytes, or its launch (4 µs).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import TrainConfig
from lora_trainer.models.base import Conditioning, ModelInfo, NoiseSchedule
from lora_trainer.models.detect import detect
from lora_trainer.models.families import get_family, parts
from lora_trainer.models.families.unet import model as assembling
from lora_trainer.models.families.unet.binding import build_unet
from lora_trainer.models.schedule import scaled_linear_alphas_cumprod
from lora_trainer.training.objectives.diffusion import DiffusionObjective
from lora_trainer.training.objectives.pictures import Batch
from lora_trainer.training.precision import Precision
from lora_trainer.training.step import TrainingStep
from tests.benchmarks.counting import GPUS, Count, as_on_cuda
from tests.tiny import SD1_FULL, SDXL_FULL, Shapes, sd1_shapes, sdxl_shapes

RANK = 16
TARGETS = ["attention", "feed_forward", "projection"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora dropout": {"dropout": 0.1},
    "lora rank_dropout": {"rank_dropout": 0.1},
    "locon": {"conv_rank": RANK},
    "locon dropout": {"conv_rank": RANK, "dropout": 0.1},
    "dora": {"dora": True},
    "dora dropout": {"dora": True, "dropout": 0.1},
    "loha": {"adapter": "loha"},
    "lokr": {"adapter": "lokr"},
    "lora quarter checkpointing": {"gradient_checkpointing": 0.25},
    "lora half checkpointing": {"gradient_checkpointing": 0.5},
    "lora checkpointing": {"gradient_checkpointing": True},
}
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """shapes: of the checkpoint. side: of the pictures, in pixels."""

    family: str
    shapes: Shapes
    side: int
    batch: int = 1


CASES = {
    "sd1": Case("sd1", sd1_shapes(**SD1_FULL), 512),
    "sdxl": Case("sdxl", sdxl_shapes(**SDXL_FULL), 1024),
}


def count(
    case: Case, options: dict[str, Any], side: str = "ours", weights: str = "bf16", compute: str = "bf16"
) -> Count:
    """One step, counted. options: of ``TrainConfig``. weights: format of the lent weights."""
    config = replace(TrainConfig(lora_rank=RANK, target_modules=TARGETS, batch_size=case.batch), **options)
    counter = Count(RANK)
    with as_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True), counter:
        SIDES[side](case, config, counter, FORMATS[weights], FORMATS[compute])
    return counter


def _ours(case: Case, config: TrainConfig, counter: Count, weights: torch.dtype, compute: torch.dtype) -> None:
    model = _model(case, weights, compute)
    adapters = AdapterSet.build(model.lora_targets(), config)
    model.set_gradient_checkpointing(config.given_gradient_checkpointing)
    with adapters, _real_tables(model):
        adapters.train()
        objective = DiffusionObjective(config, model, model.encode_prompts)
        precision = Precision(model.device, weights, compute)
        step = TrainingStep(config, objective, adapters, precision, total_steps=1000)
        for _, adapter in adapters.items():
            if config.dora:
                adapter.base_norm_squared()  # in the first step of a run alone
        there = [*model.unet.parameters(), *adapters.parameters(), *step.copies.leaves]
        with _phases(counter, step, there):
            step(0, [_batch(case, model.unet.config, compute)])


@contextlib.contextmanager
def _phases(counter: Count, step: TrainingStep, weights: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the counter is told when ``step`` passes from one phase to the next."""
    draw, loss, update = step.objective.draw, step.objective.loss, step._update

    def drawn(*arguments: Any) -> Any:  # on the host
        found = draw(*arguments)
        counter.phase = "forward"
        return found

    def forward(*arguments: Any) -> torch.Tensor:
        counter.phase = "forward"
        with counter.keeping(weights):
            found = loss(*arguments)
        counter.phase = "backward"
        return found

    def end(total: torch.Tensor) -> Any:
        counter.phase = "clip"
        return update(total)

    step.optimizer.register_step_pre_hook(lambda *arguments: setattr(counter, "phase", "optimizer"))
    with (
        patch.object(step.objective, "draw", drawn),
        patch.object(step.objective, "loss", forward),
        patch.object(step, "_update", end),
    ):
        yield
    counter.phase = None


def _model(case: Case, weights: torch.dtype, compute: torch.dtype) -> assembling.DiffusionModel:
    """The lent model over weights without content; it has no text encoders, and its VAE is released."""
    architecture = replace(detect(case.shapes), text_encoders=())
    tensors = {name: torch.empty(shape, dtype=weights) for name, shape in case.shapes.items()}
    info = ModelInfo(case.family, "epsilon", "counted")
    schedule = NoiseSchedule(scaled_linear_alphas_cumprod(), "epsilon")
    with patch.object(parts, "weights_digest", lambda *arguments: ""):  # there is nothing to look at
        model = get_family(case.family).build(
            tensors,
            architecture,
            None,
            info=info,
            compute_dtype=compute,
            alphas_cumprod=schedule.alphas_cumprod,
        )
    model.release("vae")
    return model


@contextlib.contextmanager
def _real_tables(model: assembling.DiffusionModel) -> Iterator[None]:
    """The noise schedule with its values: the objective looks at them."""
    with _disable_current_modes():
        schedule = NoiseSchedule(scaled_linear_alphas_cumprod(), "epsilon")
    with patch.object(model, "schedule", schedule):
        yield


def _batch(case: Case, unet: Any, dtype: torch.dtype) -> Batch:
    width, added, side = unet.cross_attention_dim, unet.projection_class_embeddings_input_dim, case.side // 8
    pooled = None if added is None else torch.empty(case.batch, added - 6 * 256, dtype=dtype)
    prompts = Conditioning(torch.empty(case.batch, 77, width, dtype=dtype), pooled)
    sizes = None if added is None else torch.ones(case.batch, 6, dtype=torch.int64)
    moments = torch.empty(case.batch, 8, side, side)
    return Batch(moments, ("a picture",) * case.batch, prompts, sizes, None, torch.ones(case.batch))


def _diffusers(case: Case, config: TrainConfig, counter: Count, weights: torch.dtype, compute: torch.dtype) -> None:
    """The loop body of diffusers' train_text_to_image_lora.py, min-SNR and all, with latents and captions encoded."""
    from peft import LoraConfig

    unet, _ = build_unet(detect(case.shapes).unet)
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    with _disable_current_modes(), torch.device("meta"):
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    for module in unet.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=torch.float32 if parameter.requires_grad else weights)
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer, batch, alphas = torch.optim.AdamW(learning, foreach=True), _batch(case, unet.config, compute), 1000
    tables = [torch.empty(alphas) for _ in range(3)]
    counter.phase = "forward"
    latents = batch.moments[:, :4].to(weights)
    noise, timesteps = torch.randn_like(latents), torch.randint(0, alphas, (case.batch,))
    signal, sigma, snr = (table.to(latents.dtype)[timesteps] for table in tables)
    noisy = signal.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise
    added = None if batch.time_ids is None else {"text_embeds": batch.conditioning.pooled, "time_ids": batch.time_ids}
    with counter.keeping(unet.parameters()):
        with torch.autocast("cpu", dtype=compute):
            answer = unet(noisy, timesteps, batch.conditioning.context, added_cond_kwargs=added, return_dict=False)[0]
        loss = nn.functional.mse_loss(answer.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
        loss = (loss * (snr.clamp(max=5) / snr).float()).mean()
    counter.phase = "backward"
    loss.backward()
    counter.phase = "clip"
    nn.utils.clip_grad_norm_(learning, 1.0)
    counter.phase = "optimizer"
    optimizer.step()
    optimizer.zero_grad()
    counter.phase = None


SIDES = {"ours": _ours, "diffusers": _diffusers}


def report(name: str, counter: Count, details: bool) -> None:
    times = "  ".join(f"{gpu} {counter.floor(gpu) * 1e3:6.1f} ms" for gpu in GPUS)
    print(
        f"{name:32} {counter.launches:6} launches  {counter.elementwise_bytes / 1e9:6.2f} GB elementwise  "
        f"{counter.kept / 2**20:6.0f} MiB kept  {counter.peak / 2**20:6.0f} MiB peak  floor {times}  "
        f"{counter.waits} waits",
        flush=True,
    )
    if details:
        limits = ", ".join(f"{gpu} {counter.limit(gpu) * 1e3:.1f} ms" for gpu in GPUS)
        print(f"    frozen sums alone: {limits}")
        for attribute in ("phase", "kind", "operator"):
            print(f"    by {attribute}: {counter.launches_by(attribute)}")
        print("    GB:", {kind: round(size / 1e9, 2) for kind, size in counter.bytes_by_kind().items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(CASES), action="append")
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--side", choices=sorted(SIDES), default="ours")
    parser.add_argument("--weights", choices=sorted(FORMATS), default="bf16", help="format of the lent weights")
    parser.add_argument("--compute", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--details", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    figures = {}
    for family in arguments.family or CASES:
        case = replace(CASES[family], batch=arguments.batch_size)
        for kind in arguments.kind or (KINDS if arguments.side == "ours" else ["lora"]):
            counter = count(case, KINDS[kind], arguments.side, arguments.weights, arguments.compute)
            report(f"{arguments.side} {family} {kind}", counter, arguments.details)
            figures[f"{family} {kind}"] = {
                "launches": counter.launches,
                "elementwise_bytes": counter.elementwise_bytes,
                "kept_bytes": counter.kept,
                "peak_bytes": counter.peak,
                "floor_seconds": {gpu: counter.floor(gpu) for gpu in GPUS},
            }
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
