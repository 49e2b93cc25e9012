"""A model of a few hundred weights that keeps ``LentModel``'s contract, and runs over real pictures, plan and cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import TrainConfig
from lora_trainer.dataset.buckets import BatchPlan
from lora_trainer.dataset.cache import TensorCache
from lora_trainer.dataset.folder import scan
from lora_trainer.models.base import Conditioning, LoraTarget, ModelInfo, NoiseSchedule
from lora_trainer.models.schedule import scaled_linear_alphas_cumprod
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.inputs import BatchSource
from lora_trainer.training.loop import Trainer
from lora_trainer.training.objectives.diffusion import DiffusionObjective
from lora_trainer.training.precision import Precision

WIDTH, CONTEXT = 8, 6


class FakeUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, WIDTH, 3, padding=1)
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(CONTEXT, WIDTH)
        self.conv_out = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv_in(latents)) + (timesteps / 1000).view(-1, 1, 1, 1)
        query = self.to_q(hidden.permute(0, 2, 3, 1))
        key = self.to_k(context).mean(1)[:, None, None, :]
        return self.conv_out((query * (1 + key)).permute(0, 3, 1, 2))


class FakeModel:
    """The latents are 8×8 averages of the pictures; a caption's encoding is drawn from its letters."""

    def __init__(self, family: str = "sd1", prediction_type: str = "epsilon", seed: int = 0):
        self.info = ModelInfo(family, prediction_type, "fake")
        self.schedule = NoiseSchedule(scaled_linear_alphas_cumprod(), prediction_type)
        self.device = torch.device("cpu")
        generator = torch.Generator().manual_seed(seed)
        self.unet, self.text_encoder = FakeUNet(), nn.Linear(CONTEXT, CONTEXT)
        for module in (self.unet, self.text_encoder):
            for parameter in module.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
            module.requires_grad_(False).eval()
        self.text_encoders: list[nn.Module] = [self.text_encoder]
        self.network_key, self.vae_key, self.text_key = "unet", "vae", "text"
        self.released: set[str] = set()
        self.encoded_batches: list[int] = []
        self.encoded_captions: list[str] = []
        self.time_ids: list[Tensor | None] = []
        self.checkpointing = False

    def encode_images(self, pixels: Tensor) -> Tensor:
        assert "vae" not in self.released
        self.encoded_batches.append(len(pixels))
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        mean = torch.cat([mean, mean.mean(1, keepdim=True)], dim=1)
        return torch.cat([mean, torch.full_like(mean, -4.0)], dim=1)

    def sample_latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, logvar = moments.chunk(2, dim=1)
        if generator is not None:
            mean = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        return mean * 0.18215

    def latent_moments(self, latents: Tensor) -> Tensor:
        return torch.cat([latents / 0.18215, torch.full_like(latents, -30.0)], dim=1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        assert "vae" not in self.released
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=8).clamp(-1, 1)

    def encode_prompts(
        self, captions: Sequence[str], max_tokens: int = 225, weighted: bool = False, rows: slice = slice(None)
    ) -> Conditioning:
        assert "text_encoders" not in self.released
        self.encoded_captions += captions[rows]
        encoded = []
        for caption in captions[rows]:
            seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "big")
            encoded.append(torch.randn(77, CONTEXT, generator=torch.Generator().manual_seed(seed)))
        return Conditioning(self.text_encoder(torch.stack(encoded)))

    def count_tokens(self, caption: str) -> int:
        return len(caption.split())

    def predict(self, noisy_latents, timesteps, conditioning, time_ids) -> Tensor:
        self.time_ids.append(time_ids)
        return self.unet(noisy_latents, timesteps, conditioning.context).float()

    def lora_targets(self) -> list[LoraTarget]:
        text = LoraTarget(
            "lora_te_fc1", "text_encoder.fc1", None, "text_encoder", "feed_forward", None, self.text_encoder
        )
        unet = [("to_q", "attention", 1), ("to_k", "attention", 2), ("conv_in", "conv", 0), ("conv_out", "conv", 24)]
        return [
            LoraTarget(f"lora_unet_{n}", f"unet.{n}", None, "unet", group, block, getattr(self.unet, n))
            for n, group, block in unet
        ] + [text]

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.checkpointing = enabled

    def hold(self, *parts: str) -> None:
        pass

    def addresses(self) -> tuple[int, ...]:
        return ()

    def release(self, *parts: str) -> None:
        self.released.update(parts)


class Recorder(TrainCallbacks):
    """Keeps what it is told; ``on`` runs after a given step."""

    def __init__(self, on=None):
        self.reports, self.saved, self.previews, self.warnings, self.phases = [], [], [], [], []
        self._on = on or {}

    def on_phase(self, name, done, total):
        self.phases.append((name, done, total))

    def on_step(self, report):
        self.reports.append(report)
        if report.step in self._on:
            self._on[report.step]()

    def on_saved(self, path, step, kind):
        self.saved.append((kind, step, path.name))

    def on_preview(self, path, step, prompt):
        self.previews.append((path, step, prompt))

    def on_warning(self, text):
        self.warnings.append(text)


class Turns:
    """A lender's turn that must not nest; counts how often it was taken."""

    def __init__(self):
        self.taken, self.held = 0, False

    @contextmanager
    def __call__(self):
        assert not self.held, "turns do not nest"
        self.taken, self.held = self.taken + 1, True
        try:
            yield
        finally:
            self.held = False


def draw_pictures(folder: Path, count: int = 5, sizes=((64, 64), (96, 64))) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        width, height = sizes[index % len(sizes)]
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"**thing {index}**, red, blue, *calm*")
    return folder


def configuration(folder: Path, **settings) -> TrainConfig:
    defaults = {
        "base_model": "fake",
        "train_data_dir": str(draw_pictures(folder / "data")),
        "output_dir": str(folder / "out"),
        "resolution": "64",
        "min_bucket_resolution": 64,
        "bucket_step": 32,
        "epochs": 2,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "conv_rank": 2,
        "dropout": 0.1,
        "tensorboard": False,
    }
    return TrainConfig(**{**defaults, **settings})


class Saver:
    """Keeps what is to be saved in ``run.saved``."""

    def __init__(self, run: Run):
        self._run, self._prepared = run, False

    def prepare(self) -> None:
        assert not self._run.turns.held, "what takes long is done outside of turns"
        self._prepared = True

    def __call__(self, step: int, epoch: int, kind: str) -> Path:
        run = self._run
        assert run.turns.held and self._prepared
        run.saved.append((step, kind, {k: v.clone() for k, v in run.adapters.state_dict().items()}))
        return Path(run.config.output_dir) / f"thing-{kind}-{step}.safetensors"


class Run:
    """Everything of one run, put together as ``run.py`` does; ``trainer.run()`` starts it."""

    def __init__(self, config: TrainConfig, model: FakeModel | None = None, on=None, previewer=None, run_key=None):
        self.config = config
        self.model = model or FakeModel()
        self.recorder, self.commands, self.turns = Recorder(on), TrainCommands(), Turns()
        self.dataset = scan(config)
        self.plan = BatchPlan.from_config(self.dataset, config, 64, 8)
        out = Path(config.output_dir)
        self.precision = Precision(torch.device("cpu"), torch.float32, None)
        cache, keep = TensorCache(out / "cache"), previewer is not None
        self.source = BatchSource(config, self.model, self.dataset, self.plan, cache, self.precision, keep)
        if self.source.base_pictures is not None:
            self.source.base_pictures.bare = nullcontext  # no adapters are attached yet
        assert self.source.prepare(self.turns, self.recorder, self.commands)
        self.adapters = AdapterSet.build(self.model.lora_targets(), config)
        bare = partial(self.adapters.enabled, False)
        objective = DiffusionObjective(config, self.model, self.source.encode_prompts, bare)
        self.adapters.attach()
        self.saved: list[tuple[int, str, dict[str, Tensor]]] = []
        self.trainer = Trainer(
            config,
            self.model,
            self.adapters,
            self.source,
            objective,
            self.precision,
            turn=self.turns,
            saver=Saver(self),
            output_dir=out,
            name="thing",
            run_key=run_key if run_key is not None else {"learning_rate": config.learning_rate},
            callbacks=self.recorder,
            commands=self.commands,
            previewer=previewer,
        )

    @property
    def final(self) -> dict[str, Tensor]:
        return self.saved[-1][2]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


OPTIMIZERS = [
    "adamw",
    "adafactor",
    pytest.param(
        "prodigy", marks=pytest.mark.skipif(not importlib.util.find_spec("prodigyopt"), reason="needs prodigyopt")
    ),
    pytest.param(
        "lion", marks=pytest.mark.skipif(not importlib.util.find_spec("lion_pytorch"), reason="needs lion-pytorch")
    ),
]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run's own code gets to answer it."""


def kill():
    raise Killed


def metrics(run: Run) -> list[dict]:
    lines = (run.trainer.output_dir / "logs" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
