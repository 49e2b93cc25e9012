"""One training step by each trainer that is compared: ours, diffusers with PEFT, and kohya's sd-scripts.

All sides hold the same frozen weights and get the same latents and encoded captions; only what they have in common is
compared. sd-scripts is no package: its own checkout is named by its folder, and without one that side is left out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import TrainConfig
from lora_trainer.demo.base import build_base
from lora_trainer.models.base import Conditioning
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.run.layout import Layout
from lora_trainer.training.objectives.diffusion import DiffusionObjective
from lora_trainer.training.objectives.pictures import Batch
from lora_trainer.training.precision import Precision, resolve
from lora_trainer.training.ranks import ALONE
from lora_trainer.training.step import TrainingStep
from tests.tiny import SD1_FULL, SDXL_FULL, tiny_sd1, tiny_sdxl

RANK = 16
TARGETS = ["attention", "feed_forward", "projection"]
PEFT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
ATTENTION_ONLY = 4  # of PEFT_TARGETS
SCALING_FACTOR = {"sd1": 0.18215, "sdxl": 0.13025}
WRITERS = {"sd1": (tiny_sd1, SD1_FULL), "sdxl": (tiny_sdxl, SDXL_FULL)}
Step = Callable[[int], float]
"""One optimizer step; takes its number, returns the loss."""


@dataclass(frozen=True)
class Work:
    """What is computed.

    size: "full", the real model's; "tiny", the same layers at a tenth of the width; "demo", the base that the package
    ships, which is trained (family "sd1"). The first two have random weights.
    resolution: side of the pictures in pixels. weight_dtype: of the frozen weights; None takes the computation's.
    changes: settings of our side alone (another adapter, say).
    """

    family: str = "sd1"
    size: str = "full"
    resolution: int = 512
    batch_size: int = 1
    device: str = "auto"
    mixed_precision: str = "auto"
    weight_dtype: torch.dtype | None = None
    gradient_checkpointing: float = False
    targets: str = "all"
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def precision(self) -> Precision:
        return resolve(self.device, self.mixed_precision)

    @property
    def stored(self) -> torch.dtype:
        return self.weight_dtype or self.precision.weight_dtype

    @property
    def peft_targets(self) -> list[str]:
        return PEFT_TARGETS if self.targets == "all" else PEFT_TARGETS[:ATTENTION_ONLY]

    @property
    def our_targets(self) -> list[str]:
        return TARGETS if self.targets == "all" else TARGETS[:1]


def write_base(folder: Path, work: Work) -> Path:
    """The checkpoint, written once."""
    if work.size == "demo":
        return build_base()
    path = folder / f"{work.family}-{work.size}-{str(work.stored).removeprefix('torch.')}.safetensors"
    if not path.exists():
        write, full = WRITERS[work.family]
        write(path, dtype=work.stored, device=work.precision.device, **(full if work.size == "full" else {}))
    return path


def batch_of(work: Work, unet: nn.Module, seed: int = 0) -> Batch:
    """Random latents and captions for diffusers' UNet of this configuration."""
    generator = torch.Generator().manual_seed(seed)
    side, count = work.resolution // 8, work.batch_size
    moments = torch.randn(count, 8, side, side, generator=generator)
    prompts = torch.randn(count, 77, unet.config.cross_attention_dim, generator=generator)
    sizes = pooled_prompts = None
    if work.family == "sdxl":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * 256
        pooled_prompts = torch.randn(count, pooled, generator=generator)
        sizes = torch.tensor([[work.resolution, work.resolution, 0, 0, work.resolution, work.resolution]] * count)
    return Batch(moments, ("a picture",) * count, Conditioning(prompts, pooled_prompts), sizes, None, torch.ones(count))


@contextmanager
def our_step(work: Work, folder: Path) -> Iterator[Step]:
    """Our own step, through the file lender."""
    with our_training(work, folder) as step:
        batch = batch_of(work, step.objective.model.unet)
        yield lambda number: step(number, [batch])


def autocast(precision: Precision) -> AbstractContextManager[None]:
    """As the peers compute in mixed precision."""
    enabled = precision.mixed_dtype is not None
    return torch.autocast(precision.device.type, dtype=precision.mixed_dtype or torch.bfloat16, enabled=enabled)


@contextmanager
def our_training(work: Work, folder: Path) -> Iterator[TrainingStep]:
    """A ``TrainingStep`` over a lent base, its adapters attached."""
    precision = work.precision
    config = TrainConfig(
        resolution=str(work.resolution),
        batch_size=work.batch_size,
        lora_rank=RANK,
        target_modules=work.our_targets,
        gradient_checkpointing=work.gradient_checkpointing,
        **dict(work.changes),
    )
    lender = FileLender(
        write_base(folder, work),
        precision.device,
        work.stored,
        compute_dtype=precision.compute_dtype,
    )
    with lender.borrow() as model:
        model.release("vae", "text_encoders")
        model.set_gradient_checkpointing(work.gradient_checkpointing)
        if config.channels_last == "auto":
            Layout(config, model, ALONE, print).choose()
        with AdapterSet.build(model.lora_targets(), config) as adapters:
            adapters.train()
            objective = DiffusionObjective(config, model, model.encode_prompts)
            step = TrainingStep(config, objective, adapters, precision, total_steps=1000)
            if config.compile == "auto":  # whatever it costs and brings
                step.compiled.least_seconds, step.compiled.min_gain = 0.0, math.inf
                step.compiled.use(model.compilable())
            yield step


@contextmanager
def diffusers_step(work: Work, folder: Path) -> Iterator[Step]:
    """The loop body of diffusers' train_text_to_image_lora(_sdxl).py, without accelerate around it.

    min-SNR as with --snr_gamma=5, mixed precision as accelerate sets it up.
    """
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import cast_training_params, compute_snr
    from peft import LoraConfig

    precision = work.precision
    unet = _plain_unet(work, folder).to(precision.device, precision.weight_dtype)
    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=work.peft_targets)
    )
    cast_training_params(unet, dtype=torch.float32)
    if work.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=1000)
    scaler = precision.create_scaler()
    batch = batch_of(work, unet)

    def step(number: int) -> float:
        latents = _sample(batch.moments.to(precision.device), SCALING_FACTOR[work.family])
        latents = latents.to(precision.weight_dtype)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device).long()
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        encoder_hidden_states = batch.conditioning.context.to(latents)
        added = None
        if work.family == "sdxl":
            added = {"text_embeds": batch.conditioning.pooled.to(latents), "time_ids": batch.time_ids.to(latents)}
        with autocast(precision):
            model_pred = unet(
                noisy_latents, timesteps, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
            )[0]
        snr = compute_snr(noise_scheduler, timesteps)
        weights = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
        loss = functional.mse_loss(model_pred.float(), noise.float(), reduction="none")
        loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        lr_scheduler.step()
        optimizer.zero_grad()
        return loss.detach().item()

    yield step


@contextmanager
def sd_scripts_step(work: Work, folder: Path, checkout: Path) -> Iterator[Step]:
    """The loop body of sd-scripts' train_network.py (--sdpa --min_snr_gamma 5), with its UNet and its LoRA."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from diffusers.models.embeddings import get_timestep_embedding
    from networks import lora as kohya

    precision = work.precision
    plain = _plain_unet(work, folder)
    batch = batch_of(work, plain)
    if work.family == "sd1":
        from library.original_unet import UNet2DConditionModel

        width = plain.config.cross_attention_dim
        unet = UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=width)
        unet.load_state_dict(plain.state_dict())
    else:
        from library.sdxl_original_unet import SdxlUNet2DConditionModel
        from safetensors.torch import load_file

        unet = SdxlUNet2DConditionModel()
        prefix = "model.diffusion_model."
        tensors = load_file(write_base(folder, work))
        unet.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    del plain
    unet.set_use_sdpa(True)
    unet.requires_grad_(False).to(precision.device, precision.weight_dtype)
    network = kohya.create_network(1.0, RANK, RANK, None, [], unet)
    network.apply_to([], unet, False, True)
    network.requires_grad_(True).to(precision.device)
    if work.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        network.enable_gradient_checkpointing()
        unet.train()
    network.train()
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    scaler = precision.create_scaler()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0).to(precision.device)
    all_snr = alphas / (1 - alphas)

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if work.family == "sd1":
            return unet(noisy, timesteps, context).sample
        # What its sdxl_train_util.get_size_embeddings computes; that module imports the whole of sd-scripts.
        sizes = get_timestep_embedding(batch.time_ids.to(precision.device).flatten(), 256, flip_sin_to_cos=True)
        pooled = batch.conditioning.pooled.to(precision.device)
        vector = torch.cat([pooled, sizes.reshape(len(pooled), -1)], dim=1)
        return unet(noisy, timesteps, context, vector.to(noisy.dtype))

    def step(number: int) -> float:
        latents = _sample(batch.moments.to(precision.device), SCALING_FACTOR[work.family])
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device="cpu").long().to(precision.device)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).to(precision.weight_dtype).requires_grad_()
        context = batch.conditioning.context.to(precision.device, precision.weight_dtype)
        with autocast(precision):
            model_pred = predict(noisy, timesteps, context)
        loss = functional.mse_loss(model_pred.float(), noise.float(), reduction="none").mean([1, 2, 3])
        snr = torch.stack([all_snr[timestep] for timestep in timesteps])
        loss = (loss * torch.minimum(snr, torch.full_like(snr, 5.0)) / snr).mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach().item()

    yield step


def _plain_unet(work: Work, folder: Path) -> nn.Module:
    """diffusers' UNet with the base's weights, as they are stored."""
    from diffusers import UNet2DConditionModel

    lender = FileLender(write_base(folder, work), work.precision.device, work.stored)
    with lender.borrow() as model:
        with torch.device("meta"):
            plain = UNet2DConditionModel.from_config(model.unet.config)
        plain.load_state_dict({name: value.clone() for name, value in model.unet.state_dict().items()}, assign=True)
    return plain.requires_grad_(False)


def _sample(moments: torch.Tensor, factor: float) -> torch.Tensor:
    mean, log_variance = moments.chunk(2, dim=1)
    return (mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)) * factor
