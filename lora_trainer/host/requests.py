"""What a run's preview prompt asks a host to draw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora_trainer.config import TrainConfig, parse_prompt, parse_resolution
from lora_trainer.host.base import PreviewRequest
from lora_trainer.models.base import ModelInfo
from lora_trainer.models.families import get_family


def preview_request(prompt: str, config: TrainConfig, info: ModelInfo, seed: int) -> PreviewRequest:
    """The picture of a prompt, with its flags, at the training's size, by the base model alone.

    Raises:
        UserError: for a flag that does not exist, or whose value is none.
    """
    size = parse_resolution(config.resolution)
    side = get_family(info.family).default_resolution(info)
    width, height = size if isinstance(size, tuple) else (side, side)
    multiple = get_family(info.family).latents.multiple
    wanted = parse_prompt(prompt)
    request = PreviewRequest(
        wanted.text,
        str(info.path or ""),
        wanted.negative,
        seed=seed if wanted.seed is None else wanted.seed,
        width=_whole(wanted.width or width, multiple),
        height=_whole(wanted.height or height, multiple),
    )
    given: dict[str, Any] = {"steps": wanted.steps, "cfg_scale": wanted.cfg}
    return replace(request, **{name: value for name, value in given.items() if value is not None})


def _whole(side: int, multiple: int) -> int:
    """The largest side of a picture that the model draws, at most ``side``."""
    return max(multiple, side - side % multiple)
