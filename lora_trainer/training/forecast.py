"""What a training step computes and keeps in memory, from the model's architecture alone: see ``models.work``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_trainer.adapters.base import weight_shape
from lora_trainer.adapters.inject import choose, parameter_count
from lora_trainer.config.schema import TrainConfig
from lora_trainer.models.base import LoraTarget, ModelArchitecture, Room
from lora_trainer.models.families import get_family
from lora_trainer.models.family import MetaModel
from lora_trainer.models.offload import BUFFERS, offloaded
from lora_trainer.models.quantize import BYTES
from lora_trainer.models.work import count_recomputable, recomputed
from lora_trainer.training.change_inputs import kept_batches, lessons
from lora_trainer.training.precision import Precision

_OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "lion": 4, "adafactor": 0.25}
"""For each trained number, beside the 4 of itself and the 4 of its gradient. Adafactor's state is a row and a column of
each matrix (measured for rank 16). A plug-in is taken to keep as much as AdamW."""
_ANEW = 1.3
"""What a part takes that is computed anew for its backward pass, for each number that it keeps: the gradients that
come and go beside them (measured)."""
_MARGIN = 1.2
"""So much more than is forecast a step may take beside the weights (as ``tests/gpu/test_forecasts`` has it)."""
_WEIGHT_COPIES = {"lora": 0, "loha": 4, "lokr": 2}
"""Of the largest layer's weight, in fp32, while its gradient is computed (measured)."""


@dataclass(frozen=True)
class Work:
    """One forward and backward pass.

    operations: floating-point operations; a multiplication and an addition count as two.
    kept: numbers in memory at the fullest moment, in the format of the computation.
    """

    operations: float
    kept: float


def work_on_batch(architecture: ModelArchitecture, resolution: tuple[int, int], config: TrainConfig) -> Work:
    """The work on one batch of pictures of ``resolution`` (width, height), whatever layers of the denoiser learn."""
    operations = kept = fullest = 0.0
    further = _further_forwards(config, get_family(architecture.family).takes_negative(architecture))
    parts = list(get_family(architecture.family).parts(architecture, resolution, config))
    anew = recomputed(parts, config.given_gradient_checkpointing)
    for index, part in enumerate(parts):
        operations += part.forwards * ((2 if index in anew else 1) + further) + part.backwards
        if index in anew:
            kept += part.inputs or 0
            fullest = max(fullest, kept + _ANEW * part.kept)  # what was kept after it is gone by then
        else:
            kept += part.kept
    return Work(operations, max(kept, fullest))


def _further_forwards(config: TrainConfig, takes_negative: bool) -> float:
    """Forward passes on a picture beside the one that learns: those whose predictions are targets."""
    if config.task == "words":
        terms = [len(lessons(config)[0][1]), *[1] * kept_batches(config, takes_negative)]
        denoising = (2 if takes_negative else 1) * max(0, config.denoised_steps - 1) / 2  # half of the steps
        return denoising + sum(terms) / len(terms)
    if config.task == "pair":
        return 1.0 if config.pair_method == "alternating" else 0.0
    return config.preserve


def memory_needed(
    model: MetaModel,
    resolution: tuple[int, int],
    config: TrainConfig,
    precision: Precision,
    weights_there: int = 0,
    stored: Mapping[str, int] | None = None,
    together: bool = False,
) -> int:
    """Bytes that a run takes at its fullest moment: prompts or a picture being encoded, or a step; with the base
    model's own, but for the ``weights_there`` (bytes) that are on the device already. ``offload_blocks: auto`` counts
    as 0, ``gradient_checkpointing: auto`` as false.

    stored: see ``ModelInfo``. together: all parts of the base model are always on the device; else, where memory lacks,
    only the one that computes is, as ``models.residency`` has it.

    Raises:
        UserError: no layer of the model would learn.
    """
    base = base_bytes(model, config, precision, stored)
    pictures = get_family(model.architecture.family).encoding_numbers(model.architecture, resolution)
    trained = learning_bytes(model.targets, config)
    in_step = trained + step_bytes(model, resolution, config, precision)
    moments = {
        _read_in_step(config): in_step,
        ("text_encoders",): trained,
        ("vae",): pictures * number_bytes(torch.float32),
    }
    return int(
        max(
            max(0, sum(base.values() if together else (base[part] for part in parts)) - weights_there) + beside
            for parts, beside in moments.items()
        )
    )


def _read_in_step(config: TrainConfig) -> tuple[str, ...]:
    """Parts of the base model that a step reads."""
    return ("unet", "text_encoders") if config.text_encoders_learn else ("unet",)


def parts_to_recompute(
    model: MetaModel,
    resolution: tuple[int, int],
    config: TrainConfig,
    precision: Precision,
    room: Room,
    stored: Mapping[str, int] | None = None,
) -> tuple[int, int]:
    """How many parts have to be computed anew (gradient checkpointing), at the least, for a step to fit into ``room``,
    and of how many; all of them where not even that suffices. stored: see ``ModelInfo``."""
    base = base_bytes(model, config, precision, stored)
    weights = sum(base.values() if room.together else (base[part] for part in _read_in_step(config)))
    free = room.free - max(0, weights - room.there)
    parts = get_family(model.architecture.family).parts(model.architecture, resolution, config)
    learning, total = learning_bytes(model.targets, config), max(1, count_recomputable(list(parts)))
    for count in range(total):
        tried = dataclasses.replace(config, gradient_checkpointing=count / total)
        if _MARGIN * (learning + step_bytes(model, resolution, tried, precision)) <= free:
            return count, total
    return total, total


def blocks_to_offload(
    model: MetaModel,
    resolution: tuple[int, int],
    config: TrainConfig,
    precision: Precision,
    free: int,
    stored: Mapping[str, int] | None = None,
) -> int:
    """How many blocks have to wait in main memory, at the least, for a step to fit into ``free`` bytes of a device; all
    of them where not even that suffices. stored: see ``ModelInfo``."""
    beside = learning_bytes(model.targets, config) + step_bytes(model, resolution, config, precision)
    for count in range(len(model.blocks)):
        base = base_bytes(model, dataclasses.replace(config, offload_blocks=count), precision, stored)
        weights = sum(base[part] for part in _read_in_step(config))
        if weights + _MARGIN * beside <= free:
            return count
    return len(model.blocks)


def base_bytes(
    model: MetaModel, config: TrainConfig, precision: Precision, stored: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Of the parts of the base model, as this run keeps them on the device; "unet" is all but the others where they are
    not told apart. stored: see ``ModelInfo``."""
    each = number_bytes(precision.weight_dtype)
    numbers = {
        "unet": model.weights - model.text_encoders - model.vae,
        "text_encoders": model.text_encoders,
        "vae": model.vae,
    }
    taken = {part: float(number * each if stored is None else stored[part]) for part, number in numbers.items()}
    of_weight = taken["unet"] / numbers["unet"]
    in_blocks = BYTES.get(config.base_precision, of_weight)
    quantized = sum(math.prod(weight_shape(target.module)) for target in model.targets if target.part == "unet")
    taken["unet"] -= quantized * (of_weight - in_blocks)
    if config.given_offload_blocks and model.blocks and precision.device.type == "cuda":
        waiting = [model.blocks[number] for number in offloaded(len(model.blocks), config.given_offload_blocks)]
        taken["unet"] -= in_blocks * (sum(waiting) - min(BUFFERS, len(waiting)) * max(waiting))
    return taken


def step_bytes(model: MetaModel, resolution: tuple[int, int], config: TrainConfig, precision: Precision) -> float:
    """Bytes that come and go within a step."""
    kept = work_on_batch(model.architecture, resolution, config).kept
    kept *= number_bytes(precision.compute_dtype)
    largest = max(math.prod(weight_shape(target.module)) for target, _, _ in choose(model.targets, config))
    return kept + _WEIGHT_COPIES[config.adapter] * largest * number_bytes(torch.float32)


def number_bytes(dtype: torch.dtype) -> int:
    """Of a number in this format."""
    return torch.empty((), dtype=dtype).element_size()  # torch 2.0 has no dtype.itemsize


def learning_bytes(targets: Sequence[LoraTarget], config: TrainConfig) -> float:
    """All that learns: fp32 numbers, their gradients and the optimizer's state for them."""
    per_number = 8 + _OPTIMIZER_BYTES.get(config.optimizer, _OPTIMIZER_BYTES["adamw"]) + (4 if config.ema_decay else 0)
    return parameter_count(targets, config) * per_number
