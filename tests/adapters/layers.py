"""Layers and targets for the tests of the adapters, without any model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.config.schema import TrainConfig

LAYERS = {
    "linear": (lambda: nn.Linear(24, 36), (2, 5, 24)),
    "linear_no_bias": (lambda: nn.Linear(24, 36, bias=False), (3, 24)),
    "conv_1x1": (lambda: nn.Conv2d(12, 20, 1), (2, 12, 7, 6)),
    "conv_3x3": (lambda: nn.Conv2d(12, 20, 3, padding=1), (2, 12, 7, 6)),
    "conv_stride_2": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1), (2, 12, 8, 6)),
}


@dataclass(frozen=True)
class FakeTarget:
    """The attributes of models.base.LoraTarget."""

    kohya_name: str
    diffusers_name: str
    checkpoint_name: str | None
    part: str
    group: str
    block: int | None
    module: nn.Module
    also_named: tuple[str, ...] = ()
    split: tuple[tuple[str, int], ...] = ()
    swapped: bool = False
    alpha: bool = True


def layer_and_input(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A frozen layer and an input for it, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make, shape = LAYERS[kind]
        layer = make().requires_grad_(False)
        return layer, torch.randn(shape)


def randomize(adapter: nn.Module, seed: int = 1, deviation: float = 0.3) -> None:
    """Give every trained tensor a value that matters (a new adapter changes nothing)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(adapter.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device) * deviation
            if name.endswith("dora_scale"):
                parameter.mul_(noise.exp())
            else:
                parameter.add_(noise)


def unet_targets() -> list[FakeTarget]:
    """A UNet's kinds of layer: two blocks of everything that select_targets knows."""
    shapes: dict[str, Any] = {
        "proj_in": ("projection", lambda: nn.Conv2d(8, 8, 1)),
        "transformer_blocks.0.attn1.to_q": ("attention", lambda: nn.Linear(8, 8, bias=False)),
        "transformer_blocks.0.attn1.to_k": ("attention", lambda: nn.Linear(8, 8, bias=False)),
        "transformer_blocks.0.attn1.to_v": ("attention", lambda: nn.Linear(8, 8, bias=False)),
        "transformer_blocks.0.attn1.to_out.0": ("attention", lambda: nn.Linear(8, 8)),
        "transformer_blocks.0.attn2.to_q": ("attention", lambda: nn.Linear(8, 8, bias=False)),
        "transformer_blocks.0.attn2.to_k": ("attention", lambda: nn.Linear(6, 8, bias=False)),
        "transformer_blocks.0.ff.net.0.proj": ("feed_forward", lambda: nn.Linear(8, 64)),
        "transformer_blocks.0.ff.net.2": ("feed_forward", lambda: nn.Linear(32, 8)),
        "proj_out": ("projection", lambda: nn.Conv2d(8, 8, 1)),
    }
    targets = []
    for stem, block in (("down_blocks.0", 1), ("up_blocks.1", 16)):
        for path, (group, make) in shapes.items():
            targets.append(_target(f"{stem}.attentions.0.{path}", group, block, make()))
        targets.append(_target(f"{stem}.resnets.0.conv1", "conv", block, nn.Conv2d(8, 8, 3, padding=1)))
        targets.append(_target(f"{stem}.resnets.0.time_emb_proj", "conv_linear", block, nn.Linear(8, 8)))
    return targets


def text_targets() -> list[FakeTarget]:
    targets = []
    for layer in range(2):
        for name, group in (
            ("self_attn.q_proj", "attention"),
            ("self_attn.v_proj", "attention"),
            ("mlp.fc1", "feed_forward"),
        ):
            path = f"text_model.encoder.layers.{layer}.{name}"
            target = _target(path, group, None, nn.Linear(8, 8))
            kohya = "lora_te_" + path.replace(".", "_")
            targets.append(
                replace(target, kohya_name=kohya, diffusers_name=f"text_encoder.{path}", part="text_encoder")
            )
    return targets


def _target(path: str, group: str, block: int | None, module: nn.Module) -> FakeTarget:
    kohya = "lora_unet_" + path.replace(".", "_")
    return FakeTarget(kohya, f"unet.{path}", f"base.{path}", "unet", group, block, module.requires_grad_(False))


def settings(**values: Any) -> TrainConfig:
    return replace(TrainConfig(), **values)
