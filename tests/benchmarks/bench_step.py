"""Our training step against that of diffusers + PEFT, on the same weights and the same batch.

    python -m tests.benchmarks.bench_step                          tiny width, on the GPU if there is one
    python -m tests.benchmarks.bench_step --size full --device cpu --resolution 256

Timed in one process, one step of each in turn, so that both see the same machine. The other side follows diffusers'
``examples/text_to_image/train_text_to_image_lora.py`` with latents and captions already encoded (it encodes them anew
in every step; we never do): only what both do is compared. Peak memory is taken from a process of each side's own,
from loading the weights to the last step: of the GPU's allocator, or on the CPU of the whole process. A ratio below 1
is in our favor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import TrainConfig
from lora_trainer.models.base import Conditioning
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.training.compiling import TIMED_PASSES
from lora_trainer.training.objectives.diffusion import DiffusionObjective
from lora_trainer.training.objectives.pictures import Batch
from lora_trainer.training.precision import resolve
from lora_trainer.training.step import TrainingStep
from tests.benchmarks.sides import autocast
from tests.tiny import SD1_FULL, tiny_sd1

RANK = 16
SIDES = ("ours", "diffusers")
Step = Callable[[int], float]


def batch_of(options: argparse.Namespace, context_width: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    side = options.resolution // 8
    moments = torch.randn(options.batch_size, 8, side, side, generator=generator)
    context = torch.randn(options.batch_size, 77, context_width, generator=generator)
    captions = ("a picture",) * options.batch_size
    return Batch(moments, captions, Conditioning(context), None, None, torch.ones(options.batch_size))


@contextmanager
def our_step(options: argparse.Namespace, folder: Path) -> Iterator[Step]:
    precision = resolve(options.device, options.mixed_precision)
    config = TrainConfig(
        lora_rank=RANK, target_modules=["attention"], gradient_checkpointing=options.gradient_checkpointing
    )
    lender = FileLender(folder / "base.safetensors", precision.device, precision.weight_dtype)
    with lender.borrow() as model:
        model.release("vae", "text_encoders")
        model.sample_latents = _scaled_by(0.18215)
        model.set_gradient_checkpointing(options.gradient_checkpointing)
        with AdapterSet.build(model.lora_targets(), config) as adapters:
            adapters.train()
            objective = DiffusionObjective(config, model, model.encode_prompts)
            step = TrainingStep(config, objective, adapters, precision, total_steps=1000)
            if options.compile:  # whatever it costs and brings
                step.compiled.least_seconds, step.compiled.min_gain = 0.0, math.inf
                step.compiled.use(model.compilable())
            batch = batch_of(options, model.unet.config.cross_attention_dim)
            yield lambda number: step(number, [batch])


def _scaled_by(factor: float) -> Callable:
    def sample_latents(moments: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        return (mean + torch.exp(0.5 * log_variance) * noise) * factor

    return sample_latents


@contextmanager
def diffusers_step(options: argparse.Namespace, folder: Path) -> Iterator[Step]:
    """The loop body of train_text_to_image_lora.py (min-SNR as with --snr_gamma=5), without accelerate around it."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import cast_training_params, compute_snr
    from peft import LoraConfig

    precision = resolve(options.device, options.mixed_precision)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
    unet.to(precision.device, precision.weight_dtype)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    cast_training_params(unet, dtype=torch.float32)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=1000)
    scaler = precision.create_scaler()
    batch = batch_of(options, unet.config.cross_attention_dim)
    sample_latents = _scaled_by(0.18215)

    def step(number: int) -> float:
        latents = sample_latents(batch.moments.to(precision.device), torch.Generator().manual_seed(number))
        latents = latents.to(precision.weight_dtype)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device).long()
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        encoder_hidden_states = batch.conditioning.context.to(latents)
        with autocast(precision):
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        snr = compute_snr(noise_scheduler, timesteps)
        weights = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
        loss = torch.nn.functional.mse_loss(model_pred.float(), noise.float(), reduction="none")
        loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        lr_scheduler.step()
        optimizer.zero_grad()
        return loss.detach().item()

    yield step


MAKERS = {"ours": our_step, "diffusers": diffusers_step}


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """The same random weights as a single file and as diffusers' folder."""
    widths = SD1_FULL if options.size == "full" else {}
    dtype = resolve(options.device, options.mixed_precision).weight_dtype
    path = tiny_sd1(folder / "base.safetensors", dtype=dtype, **widths)
    with FileLender(path, weight_dtype=dtype).borrow() as model:
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            plain = UNet2DConditionModel.from_config(model.unet.config)
        plain.load_state_dict(model.unet.state_dict(), assign=True)
        plain.save_pretrained(folder / "unet")


def time_steps(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each timed step, by side; sides alternate and change who goes first."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with our_step(options, folder) as ours, diffusers_step(options, folder) as theirs:
        steps = dict(zip(SIDES, (ours, theirs)))
        for number in range(options.warmup + options.steps):
            for side in SIDES if number % 2 else reversed(SIDES):
                _synchronize(options)
                started = time.perf_counter()
                steps[side](number)
                _synchronize(options)
                if number >= options.warmup:
                    seconds[side].append(time.perf_counter() - started)
    return seconds


def _synchronize(options: argparse.Namespace) -> None:
    if resolve(options.device, options.mixed_precision).device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(side: str, folder: Path) -> int:
    """Bytes at the peak, from a process of its own that loads the weights and makes three steps."""
    arguments = [*sys.argv[1:], "--measure", side, "--folder", str(folder)]
    command = [sys.executable, "-m", "tests.benchmarks.bench_step", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(answer.splitlines()[-1])["bytes"]


def measure(options: argparse.Namespace) -> None:
    """The child's part of ``peak_memory``."""
    import diffusers
    import peft  # noqa: F401 - both sides import the same libraries, so that these do not count

    del diffusers
    with MAKERS[options.measure](options, Path(options.folder)) as step:
        for number in range(3):
            step(number)
    if resolve(options.device, options.mixed_precision).device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _peak_resident()
    print(json.dumps({"bytes": peak}))


def _peak_resident() -> int:
    """Bytes of this process at its peak (Linux). getrusage would tell the parent's where that was larger."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mixed-precision", default="auto", choices=("auto", "no", "fp16", "bf16"))
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="our blocks compiled, which happens in the warm-up")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        options.warmup = max(options.warmup, 2 * (1 + TIMED_PASSES))
    if options.measure:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(options, folder)
        seconds = time_steps(options, folder)
        memory = {side: peak_memory(side, folder) for side in SIDES}
    report(options, seconds, memory)


def report(options: argparse.Namespace, seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    precision = resolve(options.device, options.mixed_precision)
    on_gpu = precision.device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    run = f"{options.resolution} px, batch {options.batch_size}, rank {RANK}, {precision.name}"
    print(f"SD1 {options.size}, {run}, {where}")
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    for side in SIDES:
        spread = statistics.quantiles(seconds[side], n=4)
        print(
            f"  {side:<10} median {medians[side] * 1000:8.1f} ms  (quartiles {spread[0] * 1000:.1f} … "
            f"{spread[2] * 1000:.1f})  peak {memory[side] / 2**20:8.0f} MiB"
        )
    ratios = [values["ours"] / values["diffusers"] for values in (medians, memory)]
    print(f"  ratio      time {ratios[0]:.3f}  memory {ratios[1]:.3f}")


if __name__ == "__main__":
    main()
