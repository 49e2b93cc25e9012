"""A forecast against what torch itself counts: operations by its counter, memory by its profiler."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import TrainConfig
from lora_trainer.devices import torch_version
from lora_trainer.errors import UserError
from lora_trainer.models.base import Room
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.detect import detect
from lora_trainer.models.families import get_family, meta_model
from lora_trainer.models.families.flow.names import TRANSFORMER
from lora_trainer.models.families.unet.architecture import VAEShape
from lora_trainer.models.families.unet.work import piece_operations, pieces
from lora_trainer.training import throughput as throughput_module
from lora_trainer.training.forecast import (
    Work,
    base_bytes,
    blocks_to_offload,
    learning_bytes,
    memory_needed,
    parts_to_recompute,
    step_bytes,
    work_on_batch,
)
from lora_trainer.training.objectives.diffusion import DiffusionObjective
from lora_trainer.training.objectives.pictures import Batch
from lora_trainer.training.precision import Precision, resolve
from tests import flux
from tests.tiny import SD1, SD1_FULL, SDXL, SDXL_FULL, sd1_shapes, sdxl_shapes, tiny_sd1, tiny_sdxl

SIDE, BATCH = 128, 2
KINDS = [
    {},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": 0.4},
    {"conv_rank": 4},
    {"dora": True},
    {"train_text_encoder": True},
    pytest.param({"adapter": "loha"}, marks=pytest.mark.slow),
    pytest.param({"adapter": "lokr", "gradient_checkpointing": True}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    # Text encoders deep and wide enough to be seen beside the UNet.
    folder = tmp_path_factory.mktemp("bases")
    return {
        "sd1": tiny_sd1(folder / "sd1.safetensors", channels=64, text=((256, 6),)),
        "sdxl": tiny_sdxl(folder / "sdxl.safetensors", channels=64, text=((128, 3), (256, 6))),
    }


@contextlib.contextmanager
def trained(base, config, dtype=torch.float32):
    """A model that trains: (model, one forward pass to a loss)."""
    with FileLender(base, weight_dtype=dtype).borrow() as model:
        model.set_gradient_checkpointing(config.given_gradient_checkpointing)
        sizes = None if model.architecture.unet.added_channels is None else torch.zeros(BATCH, 6)
        latents, times = torch.randn(BATCH, 4, SIDE // 8, SIDE // 8), torch.full((BATCH,), 500)

        def encoded():
            with torch.set_grad_enabled(config.train_text_encoder):
                return model.encode_prompts(["a"] * BATCH)

        prepared = None if config.train_text_encoder else encoded()

        def loss():
            return model.predict(latents, times, prepared or encoded(), sizes).square().mean()

        with AdapterSet.build(model.lora_targets(), config) as adapters:
            adapters.train()
            yield model, loss


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != {"dora": True}], ids=str)
def test_operations_are_those_that_torch_counts(bases, family, kind):
    # A LoRA's own products are added in place, which the counter passes over: so it is kept small here.
    small = {name: 1 if name == "conv_rank" else value for name, value in kind.items()}
    config = TrainConfig(lora_rank=1, batch_size=BATCH, **small)
    with trained(bases[family], config) as (model, loss):
        model.unet.set_attn_processor(AttnProcessor())  # written out, as every release of the counter knows it
        with FlopCounterMode(display=False) as counter:
            loss().backward()
        expected = work_on_batch(model.architecture, (SIDE, SIDE), config).operations
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.08)


def test_what_is_preserved_takes_a_forward_pass_more(bases):
    config = TrainConfig(lora_rank=1, batch_size=BATCH)
    with trained(bases["sd1"], config) as (model, _):
        model.unet.set_attn_processor(AttnProcessor())
        objective = DiffusionObjective(config, model, model.encode_prompts)
        moments, prompts = torch.zeros(BATCH, 8, SIDE // 8, SIDE // 8), model.encode_prompts(["a"] * BATCH)
        batch = Batch(moments, ("a",) * BATCH, prompts, None, None, torch.ones(BATCH), torch.tensor([True, False]))
        drawn = objective.draw(batch, torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as counter:  # the base's prediction is made with the inputs
            objective.inputs(drawn)
        half, none = (
            work_on_batch(model.architecture, (SIDE, SIDE), dataclasses.replace(config, preserve=share)).operations
            for share in (0.5, 0.0)
        )
    assert half - none == pytest.approx(counter.get_total_flops(), rel=0.08)


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_memory_is_what_the_allocator_sees(bases, family, kind):
    config = TrainConfig(lora_rank=8, batch_size=BATCH, **kind)
    with trained(bases[family], config) as (model, loss):
        seen = most_allocated(loss)
        expected = step_bytes(meta_model(model.architecture), (SIDE, SIDE), config, resolve("cpu", "no"))
    assert expected == pytest.approx(seen, rel=0.15)


def most_allocated(loss) -> int:
    """Bytes at the fullest moment of a step."""
    loss().backward()  # gradients of the adapters are there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss().backward()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.skipif(torch_version() < (2, 2), reason="this torch crashes in bf16 on the CPU")
@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_memory_in_mixed_precision(bases, family):
    config = TrainConfig(lora_rank=8, batch_size=BATCH)
    with trained(bases[family], config, torch.bfloat16) as (model, loss):
        seen = most_allocated(loss)
        expected = step_bytes(meta_model(model.architecture), (SIDE, SIDE), config, resolve("cpu", "bf16"))
    assert expected == pytest.approx(seen, rel=0.15)


@pytest.mark.parametrize("shapes, trained", [(sd1_shapes(**SD1_FULL), 6.78e6), (sdxl_shapes(**SDXL_FULL), 42.56e6)])
def test_a_full_size_model_is_counted_without_its_weights(shapes, trained):
    model, config = meta_model(detect(shapes)), TrainConfig(lora_rank=16, batch_size=1)

    def needed(optimizer="adamw", **options):
        wanted = dataclasses.replace(config, optimizer=optimizer)
        return memory_needed(model, (64, 64), wanted, resolve("cpu", "no"), **options)

    weights = sum(map(math.prod, shapes.values()))
    unet = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(TRANSFORMER))
    for counted, together in ((unet, False), (weights, True)):
        all_there = needed(weights_there=4 * weights, together=together)
        assert needed(together=together) - all_there == pytest.approx(4 * counted, rel=0.01)
    # Prodigy keeps 16 bytes for each number that learns, Lion 4.
    assert needed("prodigy") - needed("lion") == pytest.approx(12 * trained, rel=0.01)


def test_large_pictures_need_most_while_they_are_encoded():
    model, config = meta_model(detect(sd1_shapes(**SD1_FULL))), TrainConfig(lora_rank=1, gradient_checkpointing=True)
    needed = [
        memory_needed(model, (side, side), config, resolve("cpu", "no"), weights_there=1 << 40) for side in (512, 1024)
    ]
    assert needed[1] == 5 * 4 * 128 * 1024**2 and needed[1] == pytest.approx(4 * needed[0], rel=0.2)


@pytest.mark.parametrize("together", [False, True])
def test_as_many_parts_are_computed_anew_as_must(together):
    model, size = meta_model(detect(sd1_shapes(**SD1_FULL))), (512, 512)
    config, card = TrainConfig(batch_size=4, gradient_checkpointing="auto"), CARD
    base = base_bytes(model, config, card)
    weights = int(sum(base.values()) if together else base["unet"])

    def needed(share):
        tried = dataclasses.replace(config, gradient_checkpointing=share)
        return 1.2 * (learning_bytes(model.targets, config) + step_bytes(model, size, tried, card))

    def parts(free, there=0):
        return parts_to_recompute(model, size, config, card, Room(int(free), there, together))

    assert parts(weights + needed(0) + 1) == (0, 38), "16 transformer blocks and 22 resnets"
    assert parts(0) == parts(weights + needed(1) - 1e6) == (38, 38)
    few, total = parts(weights + needed(0) - (64 << 20))
    assert 1 <= few <= 2
    assert parts(needed(0) - (64 << 20) + 1, there=weights) == (few, total)
    half, total = parts(weights + (needed(0) + needed(1)) / 2)
    assert needed(half / total) <= (needed(0) + needed(1)) / 2 < needed((half - 1) / total) and half < 10


def test_selecting_no_layer_is_an_error():
    model, config = meta_model(detect(sd1_shapes(**SD1))), TrainConfig(target_modules=["nothing_like_it"])
    with pytest.raises(UserError, match="nothing_like_it"):
        memory_needed(model, (64, 64), config, resolve("cpu", "no"))


def test_the_speed_is_that_of_the_piece(monkeypatch):
    architecture, latents = detect(sd1_shapes(**SD1)), get_family("sd1").latents
    laps = iter([3.0, 2.0, 5.0, 0.0])
    monkeypatch.setattr(throughput_module.Stopwatch, "lap", lambda self, computing: next(laps))
    ticks = iter(range(100))  # a clock on which each look takes a second
    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(throughput_module, "_SECONDS", 2.5)
    speed = throughput_module.throughput(architecture, resolve("cpu", "no"), (64, 64))
    operations = piece_operations(architecture.unet, latents, (64, 64), 1)
    assert speed == throughput_module.Speed(pytest.approx(operations / 2))
    assert speed.seconds(Work(operations, 0)) == pytest.approx(operations / speed.operations)


def test_on_a_processor_what_comes_with_each_kernel_is_added(monkeypatch):
    """A pass takes 8 ms whatever the number of pictures, and 2 ms for each."""
    architecture = detect(sd1_shapes(**SD1))
    trial = dataclasses.replace(
        get_family("sd1").trial(architecture, (64, 64), torch.device("cpu"), torch.float32), pieces=19
    )
    monkeypatch.setattr(type(get_family("sd1")), "trial", lambda *_: trial)
    monkeypatch.setattr(throughput_module, "_seconds", lambda _, pictures: 0.008 + 0.002 * pictures)
    speed = throughput_module.throughput(architecture, resolve("cpu", "no"), (64, 64))
    assert speed.operations == pytest.approx(trial.operations / 0.002)
    launching = 2 * 19 * 0.008
    assert speed.seconds(Work(trial.operations, 0)) == pytest.approx(launching + 0.002)
    assert speed.seconds(Work(100 * trial.operations, 0)) == pytest.approx(launching + 0.2)


def test_a_fast_device_is_tried_with_more_pictures_until_it_computes_longer_than_it_launches(monkeypatch):
    """A pass takes 10 ms to launch and 2 ms for each picture to compute."""
    architecture = detect(sd1_shapes(**SD1))
    trial = dataclasses.replace(
        get_family("sd1").trial(architecture, (64, 64), torch.device("cpu"), torch.float32), pieces=19
    )
    monkeypatch.setattr(type(get_family("sd1")), "trial", lambda *_: trial)
    monkeypatch.setattr(throughput_module, "_seconds", lambda _, pictures: max(0.01, 0.002 * pictures))
    card = dataclasses.replace(resolve("cpu", "no"), device=torch.device("cuda", 0))
    speed = throughput_module.throughput(architecture, card, (64, 64))
    assert speed.operations == pytest.approx(trial.operations / 0.002) and speed.launching == pytest.approx(0.19)
    monkeypatch.setattr(throughput_module, "_seconds", lambda _, pictures: 0.1 * pictures)
    assert throughput_module.throughput(architecture, card, (64, 64)).launching == 0


def test_a_step_takes_as_long_as_its_kernels_take_to_launch():
    speed = throughput_module.Speed(1e12, launching=0.1)
    assert speed.seconds(Work(1e10, 0)) == 0.1 and speed.seconds(Work(5e11, 0)) == 0.5


def test_a_unet_has_so_many_pieces():
    """22 resnets and 16 transformer blocks in SD 1; 17 and 70 in SDXL."""
    for name, shapes, count in (("sd1", sd1_shapes(**SD1), 38), ("sdxl", sdxl_shapes(**SDXL), 87)):
        assert pieces(detect(shapes).unet, get_family(name).latents) == count / 2


@pytest.mark.parametrize("form, bits", [("fp8", 8), ("nf4", 4.5)])
def test_a_quantized_base_takes_what_its_layers_take(form, bits):
    shapes = {TRANSFORMER + name: shape for name, shape in flux.transformer_shapes().items()}
    architecture = dataclasses.replace(detect(shapes), t5=None, clips=())
    model, precision = meta_model(architecture), dataclasses.replace(resolve("cpu", "no"), weight_dtype=torch.bfloat16)
    layers = sum(math.prod(shape) for name, shape in shapes.items()
                 if "_blocks." in name and len(shape) == 2)  # fmt: skip
    base = base_bytes(model, TrainConfig(), precision)["unet"]
    assert base == 2 * sum(map(math.prod, shapes.values()))
    quantized = base_bytes(model, TrainConfig(base_precision=form), precision)["unet"]
    assert quantized == base - layers * (2 - bits / 8)


def test_blocks_that_wait_in_main_memory_are_not_on_the_device():
    shapes = {TRANSFORMER + name: shape for name, shape in flux.transformer_shapes(double=2, single=3).items()}
    model = meta_model(dataclasses.replace(detect(shapes), t5=None, clips=()))
    precision = Precision(torch.device("cuda", 0), torch.bfloat16, torch.bfloat16)
    of_block = [sum(math.prod(shape) for name, shape in shapes.items() if f"{kind}_blocks.{number}." in name)
                for kind, count in (("double", 2), ("single", 3)) for number in range(count)]  # fmt: skip
    config = TrainConfig(offload_blocks=5, gradient_checkpointing=True)
    saved = base_bytes(model, TrainConfig(), precision)["unet"] - base_bytes(model, config, precision)["unet"]
    assert saved == 2 * (sum(of_block) - 2 * max(of_block)) > 0
    on_cpu = dataclasses.replace(precision, device=torch.device("cpu"))
    assert base_bytes(model, config, on_cpu) == base_bytes(model, TrainConfig(), on_cpu)


COUNTED = {
    "stored": ((23.8, 16.7, 8.7, 1.5), (25.6, 27.2)), "fp8": ((12.0, 8.4, 4.4, 0.8), (13.9, 15.4)),
    "nf4": ((6.8, 4.8, 2.5, 0.5), (8.6, 10.2)),
}  # fmt: skip
"""GB that ``python -m tests.benchmarks.flow_memory`` counts at FLUX.1 dev's full size: the transformer's weights with
0, 20, 40 and 57 blocks in main memory; then all that a step at 512 and at 1024 px takes with 0."""
CARD = Precision(torch.device("cuda", 0), torch.bfloat16, torch.bfloat16)
SIZES = (24, 16, 12, 8)
FLUX = TrainConfig(lora_rank=16, batch_size=1, gradient_checkpointing=True)


@pytest.fixture(scope="module")
def full_flux():
    family = get_family("flux")
    vae = VAEShape((128, 256, 512, 512), 2, 0.3611, 0.1159, 16, quant=False)
    return family.meta_model(dataclasses.replace(family.usual, vae=vae))


@pytest.mark.parametrize("form", COUNTED)
def test_a_full_size_flux_needs_what_is_counted(full_flux, form):
    config = dataclasses.replace(FLUX, base_precision=form)
    weights, whole = COUNTED[form]
    for blocks, counted in zip((0, 20, 40, 57), weights):
        wanted = dataclasses.replace(config, offload_blocks=blocks)
        assert base_bytes(full_flux, wanted, CARD)["unet"] / 1e9 == pytest.approx(counted, abs=0.1)
    for side, counted in zip((512, 1024), whole):
        beside = (learning_bytes(full_flux.targets, FLUX) + step_bytes(full_flux, (side, side), FLUX, CARD)) / 1e9
        assert 1 <= (beside + 0.1) / (counted - weights[0]) < 1.3


def test_text_is_encoded_before_a_full_size_flux_is_trained(full_flux):
    def needed(**changes):
        return memory_needed(full_flux, (512, 512), dataclasses.replace(FLUX, **changes), CARD) / 1e9

    text = full_flux.text_encoders * 2 / 1e9
    assert text == pytest.approx(9.8, abs=0.1), "T5 and CLIP in bf16"
    assert needed() == pytest.approx(25.6, abs=0.3), "the transformer's step alone, as it is counted"
    assert text < needed(base_precision="nf4", offload_blocks=57) < text + 1.5
    assert needed(train_text_encoder=True) == pytest.approx(needed() + text, abs=0.5), "what learns stays"


def test_as_many_blocks_wait_as_must(full_flux):
    def waiting(gigabytes, side=512, **changes):
        config = dataclasses.replace(FLUX, **changes)
        return blocks_to_offload(full_flux, (side, side), config, CARD, int(gigabytes * 1e9))

    assert waiting(30) == 0 and waiting(1) == 57
    for form in COUNTED:
        numbers = [waiting(size, base_precision=form) for size in SIZES]
        assert numbers == sorted(numbers)
        for size, number in zip(SIZES, numbers):
            config = dataclasses.replace(FLUX, base_precision=form, offload_blocks=number)
            beside = learning_bytes(full_flux.targets, config) + step_bytes(full_flux, (512, 512), config, CARD)
            assert base_bytes(full_flux, config, CARD)["unet"] + beside < size * 1e9
    assert waiting(15, base_precision="fp8") == 0 < waiting(15)
    assert waiting(12, side=1024, base_precision="nf4") < waiting(12, side=1024, base_precision="fp8")
    assert waiting(12, train_text_encoder=True, base_precision="nf4") > waiting(12, base_precision="nf4"), "T5 stays"


def test_a_file_takes_what_is_stored_in_it(full_flux):
    stored = {"unet": 12_000_000_000, "text_encoders": 5_000_000_000, "vae": 160_000_000}
    assert base_bytes(full_flux, FLUX, CARD, stored) == stored
    assert blocks_to_offload(full_flux, (512, 512), FLUX, CARD, 15_000_000_000, stored) == 0
    half = base_bytes(full_flux, dataclasses.replace(FLUX, offload_blocks=40), CARD, stored)["unet"]
    assert half == pytest.approx(4.4e9, rel=0.02)
