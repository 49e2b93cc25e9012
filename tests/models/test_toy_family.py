"""A family that is no UNet, added by nothing but this file, and trained from files on disk to a published LoRA.

Its latents have 3 channels and a factor of 4; its text encoder reads bytes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_trainer.adapters.describe import describe
from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.cli.main import main
from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning, LoraTarget, ModelInfo, NoiseSchedule
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import FAMILIES, family_of_lora, meta_model
from lora_trainer.models.family import Family, LatentFormat, MetaModel, Trial
from lora_trainer.models.schedule import scaled_linear_alphas_cumprod
from lora_trainer.models.work import Learning, Part, lora_work
from lora_trainer.planning.presets import preset
from lora_trainer.run import file_lender, train
from lora_trainer.training.callbacks import TrainCallbacks
from lora_trainer.training.forecast import memory_needed, work_on_batch
from lora_trainer.training.precision import resolve
from lora_trainer.training.throughput import throughput
from tests.tiny import tiny_sd1

PREFIX, STEPS = "toy.", 30
LAYERS = ("to_q", "to_k", "to_v", "to_out")


@dataclass(frozen=True)
class ToyArchitecture:
    width: int
    blocks: int
    family: str = "toy"


class Block(nn.Module):
    """Attention over latents and text together."""

    def __init__(self, width: int):
        super().__init__()
        for name in LAYERS:
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        both = torch.cat([x, text], dim=1)
        mask = torch.cat([mask.new_ones(x.shape[:2]), mask], dim=1)[:, None]
        return x + self.to_out(F.scaled_dot_product_attention(self.to_q(x), self.to_k(both), self.to_v(both), mask))


class Transformer(nn.Module):
    def __init__(self, architecture: ToyArchitecture):
        super().__init__()
        width = architecture.width
        self.proj_in, self.proj_out, self.time = nn.Linear(3, width), nn.Linear(width, 3), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(architecture.blocks))
        self.text = nn.Embedding(256, width)

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        x = self.proj_in(latents.flatten(2).transpose(1, 2)) + self.time(timesteps.view(-1, 1, 1) / 1000)
        for block in self.blocks:
            x = block(x, conditioning.context, conditioning.extra["mask"])
        return self.proj_out(x).transpose(1, 2).view_as(latents)


class ToyModel:
    """See ``LentModel``. The "VAE" averages 4×4 pixels."""

    def __init__(self, tensors: Mapping[str, Tensor], architecture: ToyArchitecture, info: ModelInfo):
        self.info, self.device, self.latents = info, torch.device("cpu"), Toy.latents
        self.compute_dtype = torch.float32
        self.schedule = NoiseSchedule(scaled_linear_alphas_cumprod(), info.prediction_type)
        self.network_key, self.vae_key, self.text_key = "toy", "toy vae", "toy text"
        self.network = Transformer(architecture).requires_grad_(False).eval()
        self.network.load_state_dict({name.removeprefix(PREFIX): tensors[name] for name in tensors})

    def encode_images(self, pixels: Tensor) -> Tensor:
        mean = F.avg_pool2d(pixels, self.latents.factor)
        return torch.cat([mean, torch.full_like(mean, -8.0)], dim=1)

    def sample_latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        if generator is not None:
            mean = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        return (mean - self.latents.shift) * self.latents.scale

    def latent_moments(self, latents: Tensor) -> Tensor:
        mean = latents / self.latents.scale + self.latents.shift
        return torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        pixels = latents / self.latents.scale + self.latents.shift
        return F.interpolate(pixels, scale_factor=self.latents.factor).clamp(-1, 1)

    def encode_prompts(
        self, captions: Sequence[str], max_tokens: int = 225, weighted: bool = False, rows: slice = slice(None)
    ) -> Conditioning:
        encoded = [self._encode(caption, max_tokens) for caption in captions]
        return Toy().collate(encoded, self._encode("", max_tokens))

    def _encode(self, caption: str, max_tokens: int) -> Conditioning:
        ids = torch.tensor([list(b"\0" + caption.encode())[:max_tokens]])
        return Conditioning(self.network.text(ids), extra={"mask": torch.ones(ids.shape, dtype=torch.bool)})

    def count_tokens(self, caption: str) -> int:
        return len(caption.encode())

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, time_ids: Tensor | None
    ) -> Tensor:
        assert time_ids is None
        return self.network(noisy_latents, timesteps.float(), conditioning)

    def lora_targets(self) -> list[LoraTarget]:
        return targets(self.network)

    def addresses(self) -> tuple[int, ...]:
        return tuple(weight.data_ptr() for weight in self.network.parameters())

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        pass

    def hold(self, *parts):
        pass

    def make_room(self):
        pass

    def release(self, *parts: str) -> None:
        pass


def targets(network: Transformer) -> list[LoraTarget]:
    return [
        LoraTarget(f"lora_unet_blocks_{i}_{name}", f"unet.blocks.{i}.{name}", f"{PREFIX}blocks.{i}.{name}", "unet",
                   "attention", None, getattr(block, name))
        for i, block in enumerate(network.blocks)
        for name in LAYERS
    ]  # fmt: skip


class Toy(Family):
    name = "toy"
    title = "Toy"
    card_version = "Toy"
    latents = LatentFormat(channels=3, factor=4, multiple=4, scale=1.5, shift=0.1)
    lora_versions = ("toy_v",)
    roomy_bytes, tight_bytes = 1 << 20, 1 << 10
    presets: Mapping = {"style": {"learning_rate": 3e-3}}

    def claims(self, shapes):
        return f"{PREFIX}proj_in.weight" in shapes

    def architecture(self, shapes, *, dtypes, source, hints):
        blocks = sum(name.endswith(".to_q.weight") for name in shapes)
        return ToyArchitecture(shapes[f"{PREFIX}proj_in.weight"][0], blocks)

    def tokenizer(self, folders):
        return None

    def build(self, tensors, architecture, tokenizer, *, info, device="cpu", compute_dtype=torch.float32, clip_skip=1,
              alphas_cumprod=None, reload=False):  # fmt: skip
        return ToyModel(tensors, architecture, info)

    def collate(self, items, empty):
        length = max(item.context.shape[1] for item in items)

        def pad(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(1, length - tensor.shape[1], *tensor.shape[2:])], dim=1)

        return Conditioning.stack([item.map(pad) for item in items], empty.map(lambda tensor: tensor[:, :1]))

    def default_resolution(self, info):
        return 100

    def meta_model(self, architecture):
        with torch.device("meta"):
            network = Transformer(architecture)
        weights = sum(weight.numel() for weight in network.parameters())
        return MetaModel(architecture, weights, tuple(targets(network)))

    def lora_metadata(self, prediction_type, architecture):
        return {"ss_base_model_version": "toy_v1", "modelspec.architecture": "toy/lora"}

    def parts(self, architecture, resolution, config) -> Iterator[Part]:
        width, height = self.latents.size(*resolution)
        tokens, size = config.batch_size * width * height, architecture.width
        low_rank = 4 * lora_work(size, size, config.lora_rank) * tokens
        forwards, backwards = Learning(config).passes(8 * size**2 * tokens, low_rank)
        for _ in range(architecture.blocks):
            yield Part(forwards, backwards, 6 * size * tokens, size * tokens)

    def encoding_numbers(self, architecture, resolution):
        return 3 * resolution[0] * resolution[1]

    def trial(self, architecture, resolution, device, dtype):
        block = Block(architecture.width).requires_grad_(False).to(device, dtype)
        text, mask = torch.randn(1, 1, architecture.width), torch.ones(1, 1, dtype=torch.bool)
        picture = torch.randn(1, 16, architecture.width, requires_grad=True)

        def forward(x):
            return block(x, text.expand(len(x), -1, -1), mask.expand(len(x), -1))

        return Trial(forward, picture, 16 * 4 * 4 * architecture.width**2, architecture.blocks)


@pytest.fixture()
def base(tmp_path, monkeypatch):
    """The family in the table, and a model of it on the disk."""
    monkeypatch.setitem(FAMILIES, "toy", Toy())
    torch.manual_seed(0)
    network = Transformer(ToyArchitecture(32, 2))
    path = tmp_path / "base.safetensors"
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in network.state_dict().items()}, str(path))
    return path


@pytest.fixture()
def settings(tmp_path, base):
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(6):
        pixels = np.full((80, 80 + 24 * (index % 2), 4), 255, np.uint8)
        pixels[..., :3] = (200, 40 + 10 * index, 30)
        pixels[: 10 * index, :, 3] = 0  # the mask: not learned there
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("red " * index + "picture")
    return {
        "base_model": str(base),
        "train_data_dir": str(folder),
        "output_dir": str(tmp_path / "out"),
        "output_name": "taught",
        "bucket_step": 12,  # a multiple of 4, not of 8
        "min_bucket_resolution": 64,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "max_train_steps": STEPS,
        "use_masks": True,
        "tensorboard": False,
        "save_precision": "fp32",
        "preview_prompts": ["red picture"],
        "preview_steps": STEPS,
    }


class Losses(TrainCallbacks):
    def __init__(self):
        self.losses, self.previews = [], []

    def on_step(self, report):
        self.losses.append(report.loss)

    def on_preview(self, path, step, prompt):
        self.previews.append(path)


def test_it_trains_from_end_to_end(settings, base, tmp_path):
    config = from_mapping({**settings, "merge_into_base": str(tmp_path / "merged.safetensors")})
    seen = Losses()
    result = train(config, file_lender(config), callbacks=seen)
    assert result.status == "finished" and len(seen.losses) == STEPS
    assert np.mean(seen.losses[-8:]) < 0.8 * np.mean(seen.losses[:8]), seen.losses

    # Latents of the buckets have a fourth of their sides, and 3 channels.
    shapes = {tuple(tensors["moments"].shape) for tensors in cached(config) if "moments" in tensors}
    assert {shape[0] for shape in shapes} == {6} and {(25, 25)} < {shape[1:] for shape in shapes}
    assert all((4 * side) % 12 == 0 for shape in shapes for side in shape[1:] if side != 25), shapes
    assert {tuple(tensors["mask"].shape[1:]) for tensors in cached(config) if "moments" not in tensors
            and "context" not in tensors} == {shape[1:] for shape in shapes}  # fmt: skip
    assert Image.open(seen.previews[-1]).size == (100, 100)

    described = describe(result.lora)
    assert described.base_version == "toy_v1" and described.modules == {"unet": 8} and not described.problems
    metadata = read_lora(result.lora).metadata
    assert metadata["modelspec.architecture"] == "toy/lora" and family_of_lora(metadata) == "toy"

    # The merged file computes what the base computes with the LoRA.
    with FileLender(base).borrow() as model, FileLender(result.merged).borrow() as merged:
        latents, times = torch.randn(2, 3, 5, 7), torch.tensor([3, 900])
        conditioning = model.encode_prompts(["red", "red picture"])
        adapters = AdapterSet.build(model.lora_targets(), config, model.device)
        init_from(adapters, read_lora(result.lora))
        bare = model.predict(latents, times, conditioning, None)
        with adapters, torch.no_grad():
            adapters.eval()
            adapted = model.predict(latents, times, conditioning, None)
        torch.testing.assert_close(merged.predict(latents, times, conditioning, None), adapted)
        assert (adapted - bare).abs().max() > 1e-3


def cached(config) -> list[dict[str, Tensor]]:
    files = sorted((Path(config.output_dir) / "cache").rglob("*.cache"))
    assert files
    return [load_file(str(path)) for path in files]


def test_the_command_line_merges_and_refuses_other_families(settings, base, tmp_path, capsys):
    config = from_mapping({**settings, "max_train_steps": 2, "preview_prompts": []})
    lora = train(config, file_lender(config)).lora
    arguments = ["merge", "--base", str(base), "--lora", str(lora), "--output", str(tmp_path / "by-hand.safetensors")]
    assert main(arguments) == 0 and "8 layers merged" in capsys.readouterr().out
    other = tiny_sd1(tmp_path / "sd1.safetensors")
    arguments[2], arguments[-1] = str(other), str(tmp_path / "no.safetensors")
    assert main(arguments) != 0 and "was made for toy, the base is sd1" in capsys.readouterr().err


def test_forecast_presets_and_limits_come_from_the_family(base, settings):
    architecture = FileLender(base).architecture()
    config = from_mapping(settings)
    work = work_on_batch(architecture, (68, 68), config)
    checkpointed = work_on_batch(architecture, (68, 68), from_mapping({**settings, "gradient_checkpointing": True}))
    assert work.operations < checkpointed.operations and work.kept > checkpointed.kept
    precision = resolve("cpu", "no")
    assert memory_needed(meta_model(architecture), (68, 68), config, precision) > 4 * work.kept
    assert throughput(architecture, precision, (68, 68)).operations > 0
    assert preset("style", family="toy")["learning_rate"] == 3e-3 and preset("style")["learning_rate"] == 2e-4
    assert preset("style", family="toy", free=1 << 15)["batch_size"] == 1
    config = from_mapping({**settings, "bucket_step": 10})
    with pytest.raises(UserError, match="multiple of 4"):
        train(config, file_lender(config))


def test_nothing_outside_of_the_table_names_a_family():
    package = Path(__file__).parents[2] / "lora_trainer"
    names = {"sd1", "sd2", "sdxl"}
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "models" / "families"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Constant) and node.value in names), f"{path}:{node.lineno}"
