"""Train the embedded base from scratch: `python -m lora_trainer.demo.pretrain --output DIR --minutes 60`.

The UNet and the text encoder learn jointly on pictures that are drawn as they are needed. It runs on two CPU cores in
about an hour, saves its state every two minutes, and goes on from there when it is started again.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from lora_trainer.demo import base, evaluate, networks, sampling, shapes
from lora_trainer.demo.vae import latents_from_reduced
from lora_trainer.files import atomic_path
from lora_trainer.models.tokenizer import Tokenizer, load_tokenizer

BATCH = 32
MASKS_PER_KIND = 2000
PEAK_LR = {"unet": 1.5e-3, "text": 1e-3}
LAST_LR = 0.02
"""Learning rate at the end, as a share of the peak."""
WARMUP_STEPS = 150
CAPTION_DROPOUT = 0.1
UNKNOWN_WORD = 0.06
"""Share of captions whose shape is named by a word without meaning: the base learns to draw *some* shape for it."""
EMA_DECAY = 0.999
TIMESTEP_POWER = 0.7
"""Timesteps are 1000·u^0.7: a picture this small is decided at high noise."""
COLOR_JITTER = 8.0
SAVE_SECONDS = 120
NOISE_OFFSET = 0.1
"""Deviation of a constant per channel that is added to the noise (N. Guttenberg, "Diffusion with Offset Noise", 2023).
A small picture's mean color shows even at the last timestep; this hides it, so that the text has to be read."""


@dataclass
class Masks:
    """Coverage of many drawn shapes at an eighth of the picture's side: [N, 16, 16] in 0…1, and what each shows."""

    coverage: np.ndarray
    kinds: list[tuple[str, str]]


def worker_count() -> int:
    """How many processes share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average(gradients: list[torch.Tensor], progress: float) -> float:
    """Average gradients over the workers, in place; returns the first worker's `progress` for all to agree on."""
    if not dist.is_initialized():
        return progress
    own = torch.tensor([progress * dist.get_world_size() if dist.get_rank() == 0 else 0.0])
    flat = torch.cat([*(g.flatten() for g in gradients), own])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return float(flat[-1])


def draw_masks(count: int, seed: int) -> Masks:
    """`count` masks of each known shape in each size."""
    rng = np.random.default_rng(seed)
    kinds = [(shape, size) for shape in shapes.KNOWN_SHAPES for size in shapes.SIZES for _ in range(count)]
    coverage: np.ndarray = np.empty((len(kinds), 16, 16), np.float32)
    for row, (shape, size) in enumerate(kinds):
        mask = shapes.draw_mask(shapes.random_scene(rng, shape=shape, size=size))
        coverage[row] = np.asarray(mask, np.float32).reshape(16, 8, 16, 8).mean(axis=(1, 3)) / 255
    return Masks(coverage, kinds)


class Vocabulary(torch.nn.Module):
    """A token embedding in which only the words of the captions learn; all others stay as constructed."""

    def __init__(self, known: list[int]) -> None:
        super().__init__()
        table = torch.from_numpy(networks.constructed_embeddings())
        rows = torch.full((networks.VOCABULARY,), -1, dtype=torch.long)
        rows[known] = torch.arange(len(known))
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.learned = torch.nn.Parameter(table[known].clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        row = self.rows[ids]
        return torch.where((row >= 0)[..., None], self.learned[row.clamp(min=0)], self.table[ids])


class Captions:
    """Token ids of captions, remembered, since there are only a few thousand different ones."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """Ids [B, 77] of the captions: BOS, tokens, EOS and EOS padding."""
        for caption in captions:
            if caption not in self._ids:
                words = self._tokenizer.ids(caption)
                padding = [networks.EOS] * (networks.CONTEXT_LENGTH - 1 - len(words))
                self._ids[caption] = [networks.BOS, *words, *padding]
        return torch.tensor([self._ids[caption] for caption in captions])


def known_tokens(captions: Captions) -> list[int]:
    """Every token that a caption of the base can hold, BOS and EOS included, in order."""
    words = {*shapes.KNOWN_SHAPES, *shapes.COLORS, *shapes.BACKGROUNDS, *shapes.SIZES}
    words |= {"a", "an", "on", "with", "of", "picture", "background", ",", "**"}
    found = set(captions(sorted(words)).flatten().tolist())
    return sorted(found)


def make_batch(masks: Masks, captions: Captions, unknown: list[int], rng: np.random.Generator) -> dict[str, Any]:
    """This worker's share of a batch: `latents` [B, 4, 16, 16] (scaled), `ids` [B, 77], `timesteps` [B]."""
    pairs = shapes.color_pairs()
    count = BATCH // worker_count()
    picks = rng.integers(len(masks.kinds), size=count)
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=count)]
    texts = []
    for pick, (color, ground) in zip(picks, chosen, strict=True):
        shape, size = masks.kinds[pick]
        scene = shapes.Scene(shape, color, ground, size)
        texts.append("" if rng.random() < CAPTION_DROPOUT else shapes.random_caption(scene, rng))
    ids = captions(texts)
    for row, pick in enumerate(picks):
        if rng.random() < UNKNOWN_WORD:
            shape_id = captions([masks.kinds[pick][0]])[0, 1]
            ids[row][ids[row] == shape_id] = int(rng.choice(unknown))
    paint = np.array([(shapes.COLORS[c], shapes.BACKGROUNDS[g]) for c, g in chosen], np.float32)
    paint += rng.uniform(-COLOR_JITTER, COLOR_JITTER, paint.shape)
    paint = np.clip(paint, 0, 255)[:, :, None, None, :] / 127.5 - 1
    cover = masks.coverage[picks][..., None]
    latents = latents_from_reduced(cover * paint[:, 0] + (1 - cover) * paint[:, 1])
    spread = (rng.permutation(count) + rng.random(count)) / count
    return {
        "latents": torch.from_numpy(latents.astype(np.float32)).permute(0, 3, 1, 2).contiguous(),
        "ids": ids,
        "timesteps": torch.from_numpy((1000 * spread**TIMESTEP_POWER).astype(np.int64)).clamp(max=999),
    }


def loss_of(unet: Any, text: Any, batch: dict[str, Any], noise: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """Noise-prediction loss weighted by 1/√SNR (Yu et al. 2023, "Debias the Training of Diffusion Models").

    Where noise is strong the text alone says which colors are meant, and the noise-prediction error of ignoring it
    is tiny. Under min-SNR weighting colors stay behind shapes for that reason.
    """
    alpha = alphas[batch["timesteps"]].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * batch["latents"] + (1 - alpha).sqrt() * noise
    with torch.autocast("cpu", torch.bfloat16):
        context = text(batch["ids"]).last_hidden_state
        pred = unet(noisy, batch["timesteps"], context).sample
    snr = (alpha / (1 - alpha)).flatten()
    each = F.mse_loss(pred.float(), noise, reduction="none").mean(dim=(1, 2, 3))
    return (each / snr.sqrt()).mean()


class Pretraining:
    """Networks, their averages, the optimizer, and the clock; everything that `state.pt` holds."""

    def __init__(self, output: Path, tokenizer: Tokenizer, seed: int) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        torch.manual_seed(seed)
        self.output, self.seed = output, seed
        self.captions = Captions(tokenizer)
        self.known = known_tokens(self.captions)
        never = {int(self.captions([shapes.NEW_SHAPE])[0, 1]), *self.known}
        self.unknown = [i for i in range(512, 40000, 37) if i not in never]
        self.unet, self.text = networks.new_unet(), networks.new_text_encoder()
        # Written-out attention is twice as fast on a CPU as the fused kernel at heads this narrow.
        self.unet.set_attn_processor(AttnProcessor())
        networks.text_core(self.text).embeddings.token_embedding = Vocabulary(self.known)
        self.parameters = [*self.unet.parameters(), *self.text.parameters()]
        self.ema = [p.detach().clone() for p in self.parameters]
        groups = [{"params": list(getattr(self, name).parameters()), "peak": lr} for name, lr in PEAK_LR.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.elapsed = 0, 0.0
        self.alphas = sampling.alphas_cumprod()

    def state_file(self) -> Path:
        return self.output / "state.pt"

    def save(self) -> None:
        """Write the state, atomically."""
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "optimizer": self.optimizer.state_dict(),
            "parameters": [p.detach() for p in self.parameters],
            "ema": self.ema,
        }
        partial = self.state_file().with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.state_file())

    def load(self) -> None:
        """Go on from the saved state where there is one."""
        if not self.state_file().exists():
            return
        state = torch.load(self.state_file(), weights_only=True)
        self.step, self.elapsed, self.ema = state["step"], state["elapsed"], state["ema"]
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)

    def swap_ema(self) -> None:
        """Exchange the weights with their averages (and back)."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.ema, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(kept)

    def train_step(self, masks: Masks, progress: float) -> tuple[float, float]:
        """One optimizer step at `progress` (0…1) of the time; returns the loss and the workers' common progress."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        rng = np.random.default_rng((self.seed, self.step, rank))
        batch = make_batch(masks, self.captions, self.unknown, rng)
        noise = torch.from_numpy(rng.standard_normal(batch["latents"].shape, np.float32))
        noise += NOISE_OFFSET * torch.from_numpy(rng.standard_normal((len(noise), 4, 1, 1), np.float32))
        loss = loss_of(self.unet, self.text, batch, noise, self.alphas)
        loss.backward()
        progress = average([p.grad for p in self.parameters], progress)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = min(1.0, (self.step + 1) / WARMUP_STEPS)
        rate *= LAST_LR + (1 - LAST_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
        return loss.item(), progress

    def export(self, path: Path) -> None:
        """Write the averaged weights as the file that is shipped: fp16, LDM names, only the captions' embeddings."""
        from safetensors.numpy import save_file

        self.swap_ema()
        half = {name: p.detach().numpy().astype(np.float16) for name, p in self.unet.named_parameters()}
        tensors = {base.UNET + networks.ldm_unet_key(name): value for name, value in half.items()}
        for name, parameter in networks.text_core(self.text).named_parameters():
            key = base.EMBEDDING_ROWS if name.startswith("embeddings.token_embedding.") else base.TEXT + name
            tensors[key] = parameter.detach().numpy().astype(np.float16)
        tensors[base.EMBEDDING_IDS] = np.array(self.known, np.int64)
        self.swap_ema()
        with atomic_path(path) as partial:
            save_file(tensors, partial, {"steps": str(self.step), "minutes": f"{self.elapsed / 60:.0f}"})

    def evaluate(self, count: int = 56, seed: int = 1) -> str:
        """Sample prompts from the averaged weights into a sheet under `previews/`; the accuracies as a line."""
        scenes = evaluate.prompts(count, seed, shapes.SHAPES)
        ids = self.captions([shapes.plain_caption(scene) for scene in scenes])
        self.swap_ema()
        pictures = sampling.sample(self.unet, self.text, ids, self.captions([""]), seed=seed)
        self.swap_ema()
        wide, side = len(shapes.SHAPES), pictures[0].width
        sheet = Image.new("RGB", (wide * side, math.ceil(count / wide) * side))
        for index, picture in enumerate(pictures):
            sheet.paste(picture, (index % wide * side, index // wide * side))
        folder = self.output / "previews"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"{self.step:06d}.png")
        known = [index for index, scene in enumerate(scenes) if scene.shape != shapes.NEW_SHAPE]
        found = evaluate.accuracy([pictures[i] for i in known], [scenes[i] for i in known])
        return f"{found}; shapes seen: {found.seen}"


def train(rank: int, options: argparse.Namespace) -> None:
    """One worker's training loop; the first one also keeps the clock, saves, and evaluates."""
    torch.set_num_threads(1)
    if options.workers > 1:
        rendezvous = f"file://{options.output.resolve()}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=options.workers)
    run = Pretraining(options.output, load_tokenizer(), options.seed)
    run.load()
    masks = draw_masks(MASKS_PER_KIND, options.seed)
    losses: list[float] = []
    saved = last = time.monotonic()
    progress = 0.0
    while progress < 1:
        loss, progress = run.train_step(masks, run.elapsed / (options.minutes * 60))
        losses.append(loss)
        now = time.monotonic()
        run.elapsed, last = run.elapsed + now - last, now
        if rank > 0:
            continue
        if run.step % 50 == 0:
            print(f"step {run.step} loss {np.mean(losses[-50:]):.4f} minutes {run.elapsed / 60:.1f}", flush=True)
        if run.step % 500 == 0:
            print(f"step {run.step} {run.evaluate()}", flush=True)
            last = time.monotonic()
        if now - saved > SAVE_SECONDS:
            run.save()
            saved = time.monotonic()
    if rank == 0:
        run.save()
        print(f"step {run.step} {run.evaluate()}", flush=True)
        run.export(options.output / base.SHIPPED.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the learning-rate schedule")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each that share a batch")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "rendezvous").unlink(missing_ok=True)
    if options.workers == 1:
        train(0, options)
    else:
        torch.multiprocessing.spawn(train, args=(options,), nprocs=options.workers)


if __name__ == "__main__":
    main()
