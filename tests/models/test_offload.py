"""``offload_blocks``: which blocks are on the device when, what is copied, and that the numbers stay the same."""

from __future__ import annotations

import gc

import pytest
import torch

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import from_mapping
from lora_trainer.errors import ConfigError
from lora_trainer.host.standalone import StandaloneHost
from lora_trainer.jobs.execution import drawing_options, lender_options
from lora_trainer.models.base import Conditioning
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.offload import offloaded
from lora_trainer.models.pinned import PinnedMemory
from lora_trainer.storage import mark_of
from tests import flux as tiny
from tests.devices import pretended_gpu
from tests.jobs.fakes import FakeHost
from tests.streams import pretended_streams

SETTINGS = {"base_model": "x", "train_data_dir": "x", "lora_rank": 2, "gradient_checkpointing": True,
            "target_modules": ["feed_forward", "linear2"]}  # fmt: skip
DOUBLE, SINGLE = 1, 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.tiny_flux(tmp_path_factory.mktemp("flux"), double=DOUBLE, single=SINGLE)


def lend(base, **options) -> FileLender:
    return FileLender(
        base["base_model"], "cuda:0", vae=base["vae"], text_encoders=base["text_encoders"], **options
    )  # fmt: skip


def inputs():
    generator = torch.Generator().manual_seed(1)
    context, pooled, latents = (
        torch.randn(1, *shape, generator=generator) for shape in ((4, tiny.TEXT), (tiny.POOLED,), (16, 4, 4))
    )
    return latents, torch.tensor([0.4]), Conditioning(context, pooled)


def attached(model) -> AdapterSet:
    adapters = AdapterSet.build(model.lora_targets(), from_mapping(SETTINGS), model.device)
    for _, adapter in adapters.items():
        adapter.lora_up.data.held.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return adapters


def passes(model, steps=2):
    """Gradients of a few steps, and what is predicted without any in between."""
    found = []
    latents, sigmas, conditioning = inputs()
    with attached(model) as adapters:
        for _ in range(steps):
            loss = model.predict(latents, sigmas, conditioning, None).square().mean()
            loss.backward()
            found += [parameter.grad.cpu() for parameter in adapters.parameters()]
            adapters.zero_grad()
            with torch.no_grad():
                found.append(model.predict(latents, sigmas, conditioning, None).cpu())
    return found


def test_the_blocks_that_wait_are_spread_evenly():
    assert offloaded(57, 3) == [9, 28, 47] and offloaded(4, 4) == offloaded(4, 9) == [0, 1, 2, 3]
    assert all(len(set(offloaded(57, count))) == count for count in range(1, 58))


@pytest.mark.parametrize("form, count", [
    ("stored", 4), ("nf4", 3), pytest.param("stored", 1, marks=pytest.mark.slow),
    pytest.param("fp8", 2, marks=pytest.mark.slow),
])
def test_the_numbers_are_the_same_to_the_last_bit(base, form, count):
    with pretended_gpu(), pretended_streams():
        with lend(base, base_precision=form).borrow() as model:
            key = model.network_key
            model.set_gradient_checkpointing(True)
            expected = passes(model)
        with lend(base, base_precision=form, offload_blocks=count).borrow() as model:
            assert model.network_key == key, "a run goes on with another number of them"
            model.set_gradient_checkpointing(False)
            for one, other in zip(expected, passes(model)):
                assert torch.equal(one, other)


def test_which_blocks_are_there_and_what_is_copied(base):
    latents, sigmas, conditioning = inputs()
    with pretended_gpu() as gpu, pretended_streams():
        sizes = {}
        for count in (0, 4):
            with lend(base, offload_blocks=count).borrow() as model:
                model.release("vae", "text_encoders")
                gc.collect()
                sizes[count] = gpu.allocated
                if not count:
                    continue
                offload, seen = model.blocks, []
                enter = offload.enter

                def watched(block, enter=enter, offload=offload, seen=seen):
                    enter(block)
                    there = [p.device.type for p in block.parameters()]
                    assert set(there) == {"cuda"}
                    seen.append(tuple(offload.resident))

                offload.enter = watched
                blocks = [*model.unet.double_blocks, *model.unet.single_blocks]
                of_block = [sum(p.nbytes for p in block.parameters()) for block in blocks]
                waiting = [of_block[index] for index in offloaded(len(blocks), count)]
                assert sum(waiting) <= offload.waiting_bytes <= 4 * max(waiting) * 2
                with attached(model):
                    model.predict(latents, sigmas, conditioning, None).mean().backward()
                    first, offload.moved = offload.moved, 0
                    model.predict(latents, sigmas, conditioning, None).mean().backward()
        gap = sizes[0] - sizes[4]
        assert abs(gap - (sum(waiting) - 2 * max(waiting))) < 0.1 * sum(waiting)
        up, down = [(0, 1), (1, 2), (2, 3)], [(1, 2), (0, 1)]
        order = [there for before, there in zip([None, *seen], seen) if there != before]
        assert order == [*up, *down, *up[1:], *down]
        # A step begins with the first two, where the one before has ended, and each of the others comes once on the way
        # up; down the last two are there still.
        assert offload.moved == pytest.approx(sum(waiting[2:]) + sum(waiting[:2]), rel=0.1)
        assert first == pytest.approx(sum(waiting) + sum(waiting[:2]), rel=0.1)


def test_what_left_for_other_parts_comes_back(base):
    with pretended_gpu() as gpu, pretended_streams(), lend(base, offload_blocks=4).borrow() as model:
        expected = passes(model, steps=1)
        model.residency.make_room(["vae"])
        gc.collect()
        there = gpu.allocated
        assert model.blocks.waiting_bytes == 0
        found = passes(model, steps=1)
        assert all(torch.equal(one, other) for one, other in zip(expected, found)) and gpu.peak > there


def test_pinned_pieces_share_what_torch_rounds_up():
    """torch pins a power of two of bytes each time: 57 blocks of FLUX.1 alone would take 38 GiB instead of 22."""
    with pretended_gpu():
        memory = PinnedMemory()
        sizes = [640] * 19 + [264] * 38
        pieces = [memory.take(size) for size in sizes]
        assert [piece.numel() for piece in pieces] == sizes and all(piece.is_pinned_here for piece in pieces)
        for number, piece in enumerate(pieces):
            piece.fill_(number)
        assert all(piece.eq(number).all() for number, piece in enumerate(pieces)), "none lies in another"
        assert memory.bytes < 1.2 * sum(sizes) and memory.bytes % 1024 == 0
        memory.clear()
        assert memory.bytes == 0


def test_a_copy_of_a_weight_is_known_as_the_same(base):
    """DoRA keeps the norm of a weight, wherever its block is."""
    with pretended_gpu(), pretended_streams(), lend(base, offload_blocks=4).borrow() as model:
        layer = next(target.module for target in model.lora_targets() if "blocks" in target.kohya_name)
        before = layer.weight
        passes(model, steps=1)
        assert layer.weight is not before and mark_of(layer.weight) is mark_of(before)


def test_a_finished_runs_pictures_are_drawn_with_all_blocks_on_the_device(tmp_path):
    """The LoRA is merged into the weights then, and a block that is bound anew would have none of it."""
    config = from_mapping({**SETTINGS, "offload_blocks": 3, "base_precision": "nf4", "device": "cpu"})
    standalone = StandaloneHost(tmp_path, device="cpu")
    assert lender_options(standalone, config).offload_blocks == 3
    options = drawing_options(standalone, config)
    assert (options.offload_blocks, options.base_precision) == (0, "nf4")
    webui = FakeHost(tmp_path, name="A1111")
    assert drawing_options(webui, config).base_precision == "stored"


def test_it_needs_gradient_checkpointing():
    with pytest.raises(ConfigError) as caught:
        from_mapping({**SETTINGS, "offload_blocks": 3, "gradient_checkpointing": False})
    assert [problem.field for problem in caught.value.problems] == ["offload_blocks"]
