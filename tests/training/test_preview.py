"""What the flags of a preview prompt do to the picture, by both ways of drawing."""

from __future__ import annotations

import numpy as np
import pytest

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import from_mapping
from lora_trainer.host.base import PreviewRequest
from lora_trainer.jobs.previews import HostPreviewer
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.training.preview import ModelPreviewer
from tests import tiny


@pytest.fixture(scope="module")
def lender(tmp_path_factory):
    return FileLender(tiny.tiny_sd1(tmp_path_factory.mktemp("base") / "base.safetensors", depths=(1, 0, 0, 0)))


def test_our_own_sampler_obeys_the_flags(lender):
    with lender.borrow() as model:
        drawer = ModelPreviewer(model, lender.turn, (64, 64), 2)

        def draw(prompt, seed=1):
            return np.asarray(drawer.draw(prompt, seed, 0, None))

        plain = draw("a disc")
        assert draw("a disc --w 64 --h 96 --n blurry").shape == (96, 64, 3)
        np.testing.assert_array_equal(draw("a disc --d 1", seed=5), plain)
        np.testing.assert_array_equal(draw("a disc --w 64 --s 2 --l 7 --ss euler"), plain)
        for flags in ("--n blurry", "--d 2", "--s 3", "--l 2"):
            assert (draw(f"a disc {flags}") != plain).any(), flags


def test_the_hosts_sampler_is_asked_for_the_same(lender, tmp_path):
    asked: list[PreviewRequest] = []

    class Host:
        def draw(self, request):
            asked.append(request)

    config = from_mapping({"resolution": "512", "lora_rank": 2})
    with lender.borrow() as model:
        adapters = AdapterSet.build(model.lora_targets(), config)
        previewer = HostPreviewer(Host(), lender, config, lender.describe(), tmp_path)
        previewer.draw("a disc --w 128 --h 192 --n blurry --s 9 --l 3 --d 4", 1, 0, adapters)
        previewer.draw("a disc", 1, 0, adapters)
    first, second = asked
    assert (first.prompt, first.negative_prompt, first.width, first.height) == ("a disc", "blurry", 128, 192)
    assert (first.steps, first.cfg_scale, first.seed) == (9, 3.0, 4)
    usual = PreviewRequest("a disc", second.checkpoint, width=512, height=512, lora=second.lora)
    assert second == usual
