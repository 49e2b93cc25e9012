"""Pictures along the way, drawn by the lent model itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from lora_trainer.config import parse_prompt
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_path
from lora_trainer.models.base import LentModel
from lora_trainer.models.families import get_family
from lora_trainer.out_of_memory import first_line, is_out_of_memory, release_memory
from lora_trainer.training.objectives.base import generator_for
from lora_trainer.training.protocols import Previewer
from lora_trainer.training.sampling import draw_latents, usual_cfg
from lora_trainer.training.source import Turn


@torch.no_grad()
def sample(
    model: LentModel,
    prompt: str,
    negative: str = "",
    *,
    width: int = 512,
    height: int = 512,
    steps: int = 20,
    cfg: float | None = None,
    seed: int = 0,
) -> Image.Image:
    """One picture by DDIM (η = 0) with classifier-free guidance, ε = ε_neg + cfg·(ε_pos − ε_neg) (Ho & Salimans 2022);
    of a flow model by Euler's method.

    ``width`` and ``height`` in pixels are cut to multiples that the model can draw. The first noise depends on ``seed``
    alone. cfg: None for what is usual. Call it in a turn.
    """
    multiple = get_family(model.info.family).latents.multiple
    size = (width - width % multiple, height - height % multiple)
    cfg = usual_cfg(model.schedule) if cfg is None else cfg
    noise = generator_for(seed, "preview")
    latents = draw_latents(model, model.encode_prompts, prompt, negative, size, noise, steps, cfg)
    return _to_image(model.decode_latents(latents))


def _to_image(pixels: Tensor) -> Image.Image:
    """(1, 3, H, W) in [-1, 1] -> RGB. What is not finite becomes black."""
    levels = ((pixels[0].float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def draw_preview(
    previewer: Previewer,
    prompt: str,
    seed: int,
    step: int,
    adapters: nn.Module,
    averaged: AbstractContextManager[None],
    path: Path,
) -> Image.Image | str:
    """The picture, written to ``path`` as PNG; or why there is none, in one line, where memory is short or the
    previewer raises a UserError: a person may interrupt a host's sampler, or take its model away.

    averaged: inside, the adapters are what is to be seen.
    """
    adapters.eval()
    try:
        with averaged:
            image = previewer.draw(prompt, seed, step, adapters)
        with atomic_path(path) as temporary:
            image.save(temporary, format="PNG")
        return image
    except Exception as error:
        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        problem = first_line(error)
    finally:
        adapters.train()
    release_memory()
    return problem


class ModelPreviewer:
    """The previewer of runs without a WebUI: the lent model in a turn of its own."""

    def __init__(self, model: LentModel, turn: Turn, size: tuple[int, int], steps: int = 20):
        self.model, self.turn = model, turn
        self.width, self.height = size
        self.steps = steps

    def draw(self, prompt: str, seed: int, step: int, adapters: nn.Module) -> Image.Image:
        wanted = parse_prompt(prompt)
        with self.turn():
            return sample(
                self.model,
                wanted.text,
                wanted.negative,
                width=wanted.width or self.width,
                height=wanted.height or self.height,
                steps=wanted.steps or self.steps,
                cfg=wanted.cfg,
                seed=seed if wanted.seed is None else wanted.seed,
            )
