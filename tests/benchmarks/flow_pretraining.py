"""Pretraining of a small transformer in FLUX.1's layout on the demo's shapes, drawn as they are needed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lora_trainer.config import from_mapping
from lora_trainer.demo import shapes
from lora_trainer.demo.evaluate import Accuracy, accuracy, prompts
from lora_trainer.files import atomic_path
from lora_trainer.models.base import FlowSchedule, LentModel
from lora_trainer.models.families.flux.network import Flux, patches, unpatched
from lora_trainer.run import file_lender
from lora_trainer.training.objectives.flow import shifted
from lora_trainer.training.sampling import EulerSampler
from tests.benchmarks.flow_parts import TEXT, THINGS, attention_bias, flux_shape, latents_of, pictures_of, write_parts

SIDE = 96  # pixels
LATENTS = SIDE // 8
SIZE = "big"  # the others are too small for so few latents
BATCH = 32
MASKS_PER_SHAPE = 1000
PEAK_LR, LAST_LR, WARMUP_STEPS = 1e-3, 0.03, 100
CAPTION_DROPOUT = 0.1
UNKNOWN_WORD = 0.06
"""Share of captions whose shape is named by a word without meaning, as the demo's base learned."""
COLOR_JITTER = 8.0
EMA_DECAY = 0.995
SIGMA_SHIFT = 3.0
SAVE_SECONDS, EVALUATE_MINUTES = 120, 5
GUIDANCE, SAMPLING_STEPS = 3.0, 16


class Texts:
    """Captions as the lent model's text encoders read them, remembered: (B, TEXT, D) and (B, P)."""

    def __init__(self, model: LentModel) -> None:
        self._model = model
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        if new := sorted({caption for caption in captions if caption not in self._known}):
            read = self._model.encode_prompts(new)
            assert read.pooled is not None
            self._known.update(zip(new, zip(read.context[:, :TEXT].clone(), read.pooled)))
        context, pooled = zip(*(self._known[caption] for caption in captions))
        return torch.stack(context), torch.stack(pooled)


def draw_masks(count: int, seed: int) -> np.ndarray:
    """Coverage of known shapes at an eighth of the side, (shapes, count, h, w) in 0…1."""
    rng = np.random.default_rng(seed)
    drawn = [
        shapes.draw_mask(shapes.random_scene(rng, shape, size=SIZE), SIDE).reduce(8)
        for shape in shapes.KNOWN_SHAPES
        for _ in range(count)
    ]
    masks = np.stack([np.asarray(mask, np.float32) for mask in drawn]) / 255
    return masks.reshape(len(shapes.KNOWN_SHAPES), count, LATENTS, LATENTS)


def make_batch(masks: np.ndarray, rng: np.random.Generator, count: int = BATCH) -> tuple[Tensor, list[str]]:
    """Latents (count, 16, h, w) of scenes, and their captions."""
    pairs = shapes.color_pairs()
    kinds = rng.integers(len(masks), size=count)
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=count)]
    captions = []
    for kind, (color, ground) in zip(kinds, chosen):
        shape = shapes.KNOWN_SHAPES[kind]
        caption = shapes.random_caption(shapes.Scene(shape, color, ground, SIZE), rng)
        if rng.random() < UNKNOWN_WORD:
            caption = caption.replace(shape, str(rng.choice(THINGS)))
        captions.append("" if rng.random() < CAPTION_DROPOUT else caption)
    paint = np.array([(shapes.COLORS[color], shapes.BACKGROUNDS[ground]) for color, ground in chosen], np.float32)
    paint += rng.uniform(-COLOR_JITTER, COLOR_JITTER, paint.shape)
    paint = np.clip(paint, 0, 255)[:, :, None, None] / 127.5 - 1
    cover = masks[kinds, rng.integers(masks.shape[1], size=count)][..., None]
    return latents_of(cover * paint[:, 0] + (1 - cover) * paint[:, 1]), captions


def new_network(width: int, double: int, single: int) -> Flux:
    """A transformer whose blocks add nothing at first and whose prediction is 0 (Peebles & Xie 2023, adaLN-Zero)."""
    network = Flux(flux_shape(width, double, single))
    for name, parameter in network.named_parameters():
        if name.endswith("norm.scale"):
            torch.nn.init.ones_(parameter)
        elif "_mod.lin." in name or "modulation" in name or name.startswith("final_layer."):
            torch.nn.init.zeros_(parameter)
    return network


class Pretraining:
    """The network, its averages, the optimizer and the clock: what ``state.pt`` holds."""

    def __init__(self, folder: Path, seed: int = 0, **sizes: int) -> None:
        torch.manual_seed(seed)
        self.folder, self.seed, self.sizes = folder, seed, sizes
        self.network = new_network(**sizes)
        self.parameters = list(self.network.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.seconds = 0, 0.0
        bias = attention_bias(LATENTS**2 // 4)
        self.network.run = lambda block, *inputs: block(*inputs, bias.to(inputs[0].dtype))

    def save(self) -> None:
        state = {
            "sizes": self.sizes,
            "step": self.step,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
            "network": self.network.state_dict(),
            "average": self.average,
        }
        with atomic_path(self.folder / "state.pt") as partial:
            torch.save(state, partial)

    @classmethod
    def resumed(cls, folder: Path, seed: int = 0, **sizes: int) -> Pretraining:
        """From the folder's state; a new one of these sizes where there is none."""
        if not (folder / "state.pt").is_file():
            return cls(folder, seed, **sizes)
        state = torch.load(folder / "state.pt", weights_only=True)
        run = cls(folder, seed, **state["sizes"])
        run.step, run.seconds, run.average = state["step"], state["seconds"], state["average"]
        run.optimizer.load_state_dict(state["optimizer"])
        run.network.load_state_dict(state["network"])
        return run

    def export(self) -> None:
        """Write the averaged weights as the checkpoint that is lent."""
        names = [name for name, _ in self.network.named_parameters()]
        with atomic_path(self.folder / "flux.safetensors") as partial:
            save_file(dict(zip(names, self.average)), str(partial))

    def swap_average(self) -> None:
        """Exchange the weights with their averages (and back)."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average):
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)

    def predict(self, latents: Tensor, sigmas: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """The velocity ε - x0, (B, 16, h, w)."""
        size = LATENTS // 2, LATENTS // 2
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self.network(patches(latents), *text, sigmas, None, size)
        return unpatched(tokens.float(), size)

    def train_step(self, masks: np.ndarray, texts: Texts, progress: float) -> float:
        """One optimizer step at ``progress`` (0…1) of the time; returns the loss."""
        rng = np.random.default_rng((self.seed, self.step))
        latents, captions = make_batch(masks, rng)
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        spread = torch.from_numpy((rng.permutation(BATCH) + rng.random(BATCH)) / BATCH).float()
        sigmas = shifted(spread, SIGMA_SHIFT)
        share = sigmas.view(-1, 1, 1, 1)
        prediction = self.predict((1 - share) * latents + share * noise, sigmas, texts(captions))
        loss = F.mse_loss(prediction, noise - latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        falling = LAST_LR + (1 - LAST_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        self.optimizer.param_groups[0]["lr"] = PEAK_LR * falling * min(1.0, (self.step + 1) / WARMUP_STEPS)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)
        return loss.item()

    def evaluate(self, texts: Texts, schedule: FlowSchedule, count: int = 24) -> Accuracy:
        """Draw known shapes by the averages into ``folder``/previews, and judge them."""
        scenes = asked(shapes.KNOWN_SHAPES, count, 1)
        text = texts([*[""] * count, *(shapes.plain_caption(scene) for scene in scenes)])

        def velocity(latents: Tensor, level: float) -> Tensor:
            sigmas = torch.full((2 * count,), level)
            negative, positive = self.predict(latents.repeat(2, 1, 1, 1), sigmas, text).chunk(2)
            return negative + GUIDANCE * (positive - negative)

        self.swap_average()
        drawn = draw(velocity, schedule, count, seed=1)
        self.swap_average()
        sheet(drawn, self.folder / f"base_{self.step:06d}.png")
        return accuracy(drawn, scenes)


def asked(
    names: Sequence[str], count: int, seed: int, pairs: Sequence[tuple[str, str]] | None = None
) -> list[shapes.Scene]:
    return [dataclasses.replace(scene, size=SIZE) for scene in prompts(count, seed, names, pairs)]


@torch.no_grad()
def draw(
    velocity: Callable[[Tensor, float], Tensor], schedule: FlowSchedule, count: int, seed: int
) -> list[Image.Image]:
    """``count`` pictures by the trainer's own sampler. velocity: of latents at a noise level."""
    latents = torch.randn((count, 16, LATENTS, LATENTS), generator=torch.Generator().manual_seed(seed))
    sampler = EulerSampler(schedule, SAMPLING_STEPS)
    for index, level in enumerate(sampler.levels):
        latents = sampler.step(velocity(latents, level), index, latents)
    return pictures_of(latents)


def sheet(pictures: Sequence[Image.Image], path: Path, columns: int = 6) -> None:
    side = pictures[0].width
    whole = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side))
    for index, picture in enumerate(pictures):
        whole.paste(picture, (index % columns * side, index // columns * side))
    whole.save(path)


def learn_base(folder: Path, minutes: float, seed: int, **sizes: int) -> None:
    """Train until ``minutes`` of the processor's time are over."""
    settings = write_parts(folder)
    run = Pretraining.resumed(folder, seed, **sizes)
    run.export()
    masks = draw_masks(MASKS_PER_SHAPE, seed)
    with file_lender(from_mapping(settings)).borrow() as model:
        texts, schedule, losses = Texts(model), model.schedule, []
        assert isinstance(schedule, FlowSchedule)
        saved, started, evaluated = time.monotonic(), time.process_time() - run.seconds, run.seconds
        while run.seconds < 60 * minutes:
            losses.append(run.train_step(masks, texts, run.seconds / (60 * minutes)))
            run.seconds = time.process_time() - started
            if run.step % 50 == 0:
                loss = np.mean(losses[-50:])
                print(f"step {run.step} loss {loss:.4f} CPU minutes {run.seconds / 60:.1f}", flush=True)
            if run.seconds - evaluated > 60 * EVALUATE_MINUTES:
                print(f"step {run.step} {run.evaluate(texts, schedule)}", flush=True)
                evaluated = run.seconds
            if time.monotonic() - saved > SAVE_SECONDS:
                run.save()
                saved = time.monotonic()
        run.save()
        found = run.evaluate(texts, schedule)
        print(f"step {run.step} CPU minutes {run.seconds / 60:.1f} {found}; shapes seen: {found.seen}", flush=True)
