"""The widened base that tests of real WebUIs use computes what the demo's does."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.demo.base import build_base
from lora_trainer.models.checkpoint import FileLender
from tests import full_size


@torch.no_grad()
def answers(path):
    with FileLender(path).borrow() as model:
        prompts = model.encode_prompts(["a big red circle on a grey background", ""])
        draw = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 4, 16, 16, generator=draw)
        blocks = torch.rand(1, 3, 16, 16, generator=draw).repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
        moments = model.encode_images(blocks)
        return {
            "text": prompts.context[..., 0],  # of many equal channels the first
            "noise": model.predict(latents, torch.tensor([700, 40]), prompts, None),
            "mean": moments[:, :4],
            "picture": model.decode_latents(latents),
        }


@pytest.mark.slow
def test_a_wider_model_computes_the_same(tmp_path):
    # Widths at which the usual numbers of heads fit; the real ones take five times as long.
    wide = full_size.build(tmp_path / "wide.safetensors", unet_times=2, text_width=256, text_heads=4)
    small, large = answers(build_base()), answers(wide)
    for name, value in small.items():
        difference = (large[name] - value).abs().max() / value.abs().max()
        assert difference < 1e-3, name  # a share of a weight is rounded to fp16
