"""Bytes of GPU memory that a step of FLUX.1's LoRA takes, and that it copies, counted without a GPU.

    python -m tests.benchmarks.flow_memory              bf16, fp8 and nf4, with and without offload, 512 and 1024 px
    python -m tests.benchmarks.flow_memory --form nf4 --side 512 --offload 0 40

The real step runs at FLUX.1 dev's full size on tensors without memory (see ``counting``): batch 1, rank 16 on all
layers of the blocks, gradient checkpointing, AdamW. Offload is the real ``BlockOffload``, on those tensors. Counted are
tensors: what CUDA's context, cuBLAS and the allocator take comes on top.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import TrainConfig
from lora_trainer.models import block_bytes, offload, pinned
from lora_trainer.models import quantize as quantizing
from lora_trainer.models.base import Conditioning, ModelInfo
from lora_trainer.models.blocks import checkpoint
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.families import get_family
from lora_trainer.models.families.flow.model import blocks_of
from lora_trainer.models.families.flow.names import TRANSFORMER
from lora_trainer.models.families.flux.model import FluxModel
from lora_trainer.models.quantize import quantize
from lora_trainer.storage import pack, packing_of
from lora_trainer.training.objectives.flow import FlowObjective
from lora_trainer.training.objectives.pictures import Batch
from lora_trainer.training.precision import Precision
from lora_trainer.training.step import TrainingStep
from tests.benchmarks.count_step import _phases
from tests.benchmarks.counting import Count, as_on_cuda
from tests.streams import Event, Stream

FORMS, SIDES, OFFLOADS = ("bf16", "fp8", "nf4"), (512, 1024), (0, 20, 40, 57)
_BF16, _CPU = torch.bfloat16, torch.device("cpu")
_RANK, _TEXT = 16, 256


@dataclass(frozen=True)
class Counted:
    """Bytes. weights: of the transformer on the device. learning: the LoRA, its bf16 copy and AdamW's state. step:
    activations and gradients at the fullest moment of both passes. waiting: in main memory. moved: to the device in a
    step."""

    weights: int
    learning: int
    step: int
    waiting: int = 0
    moved: int = 0

    @property
    def device(self) -> int:
        return self.weights + self.learning + self.step


def count_weights(form: str, shape=None) -> dict[int, Counted]:
    """Without a step: by the number of blocks that wait."""
    family = get_family("flux")
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer = _weights(family, shape or family.usual.transformer, form)
        plain = Counted(_bytes(transformer), 0, 0)
        return {number: _offloaded(transformer, number, plain) if number else plain for number in OFFLOADS}


def count(form: str, side: int, shape=None) -> dict[int, Counted]:
    """Of one step, by the number of blocks that wait."""
    family = get_family("flux")
    shape = shape or family.usual.transformer
    config = TrainConfig(lora_rank=_RANK, batch_size=1, gradient_checkpointing=True)
    counter = Count(_RANK)
    with as_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True), counter:
        transformer = _weights(family, shape, form)
        model = _model(family, shape, transformer)
        adapters = AdapterSet.build(family.targets(transformer, [], replace(family.usual, transformer=shape)), config)
        with adapters:
            adapters.train()
            objective = FlowObjective(config, model, lambda captions, rows: None)
            step = TrainingStep(config, objective, adapters, Precision(_CPU, _BF16, _BF16), total_steps=1000)
            learning = sum(one.nbytes for one in adapters.parameters())
            copies = sum(one.nbytes for one in step.copies.leaves)
            there = [*_tensors(transformer), *adapters.parameters(), *step.copies.leaves]
            counter._known |= {one.untyped_storage()._cdata: 0 for one in there}  # views of them are nothing new
            peaks: list[int] = []
            update = step._update
            step._update = lambda loss: peaks.append(counter.peak) or update(loss)
            with _phases(counter, step, there):
                step(0, [_batch(shape, side)])
        plain = Counted(_bytes(transformer), 3 * learning + copies, peaks[0])
        return {number: _offloaded(transformer, number, plain) if number else plain for number in OFFLOADS}


def _weights(family, shape, form: str) -> nn.Module:
    """The transformer with bf16 weights, those of the blocks' layers in ``form``."""
    with torch.device("meta"):
        transformer = family.network(shape).requires_grad_(False)
    cast_layers(transformer, _BF16)
    for path, owner in transformer.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            value = torch.empty(parameter.shape, dtype=_BF16)
            if form != "bf16" and family.in_blocks(f"{TRANSFORMER}{path}.{name}") and value.dim() == 2:
                with patch.object(quantizing, "_AT_ONCE", 1 << 40):  # in one piece: there is no memory to save
                    value = quantize(value, form)
            bound = nn.Parameter(value, requires_grad=False)
            if (packing := packing_of(value)) is not None:
                pack(bound, packing)
            owner._parameters[name] = bound
    return transformer


def _model(family, shape, transformer: nn.Module) -> FluxModel:
    model = FluxModel.__new__(FluxModel)  # without text encoders and VAE, which have left when steps begin
    model.unet, model.device, model.compute_dtype, model.residency = transformer, _CPU, _BF16, None
    model.schedule, model.info = family.schedule(shape), ModelInfo("flux", "flow", "counted")
    latents = family.latents
    model.architecture = SimpleNamespace(own_vae=SimpleNamespace(scaling_factor=latents.scale, shift=latents.shift))
    transformer.run = checkpoint
    return model


def _batch(shape, side: int) -> Batch:
    prompts = Conditioning(
        torch.empty(1, _TEXT, shape.context_dim, dtype=_BF16), torch.empty(1, shape.pooled_dim, dtype=_BF16)
    )
    return Batch(torch.empty(1, 32, side // 8, side // 8), ("a picture",), prompts, None, None, torch.ones(1))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for parameter in module.parameters():
        yield parameter
        if (packing := packing_of(parameter)) is not None:
            yield from block_bytes._tensors(packing).values()


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))


def _offloaded(transformer: nn.Module, number: int, plain: Counted) -> Counted:
    """After ``plain``, with so many blocks in main memory; what is copied is that of the second step."""
    cuda = {"Stream": Stream, "Event": Event, "current_stream": lambda device: Stream(),
            "stream": lambda stream: contextlib.nullcontext()}  # fmt: skip
    with patch.multiple(torch.cuda, **cuda), patch.object(pinned, "_pinned", _not_pinned):
        blocks = blocks_of(transformer)
        owners = [owner for block in blocks for owner in block.modules()]
        before = [(owner, name, one) for owner in owners for name, one in owner.named_parameters(recurse=False)]
        waiting = offload.BlockOffload(blocks, number, _CPU)
        for owner, _, _ in before:
            waiting.take(owner)
        for _ in range(2):
            waiting.moved = 0
            for block in (*blocks, *reversed(blocks)):
                waiting.enter(block)
        there = sum(buffer.flat.nbytes for buffer in waiting._buffers)
        there -= sum(block.flat.nbytes for block in waiting._blocks.values())
        found = replace(
            plain, weights=plain.weights + there, waiting=waiting.waiting_bytes, moved=waiting.moved
        )  # fmt: skip
        waiting.clear()
        for owner, name, parameter in before:
            owner._parameters[name] = parameter
    return found


def _not_pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS, nargs="+", default=FORMS)
    parser.add_argument("--side", type=int, nargs="+", default=SIDES, help="of the pictures, in pixels")
    parser.add_argument("--offload", type=int, nargs="+", choices=OFFLOADS, default=OFFLOADS)
    parser.add_argument("--weights", action="store_true", help="count the weights alone, in a minute")
    arguments = parser.parse_args()
    print("GB (10^9 bytes): weights + learning + step = on the GPU; in main memory; copied in a step")
    for side in [0] if arguments.weights else arguments.side:
        for form in arguments.form:
            counted = count(form, side) if side else count_weights(form)
            for number in arguments.offload:
                one = counted[number]
                sizes = (one.weights, one.learning, one.step, one.device, one.waiting, one.moved)
                weights, learning, step, device, waiting, moved = (size / 1e9 for size in sizes)
                print(f"{side:5} px {form:5} {number:3} blocks  {weights:5.1f} + {learning:3.1f} + {step:3.1f} = "
                      f"{device:5.1f}   {waiting:5.1f}   {moved:5.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
