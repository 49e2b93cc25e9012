"""The bytes of a step of FLUX.1 are counted with the code that runs, at a tiny size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_trainer.config import TrainConfig
from lora_trainer.devices import torch_version
from lora_trainer.models.families import get_family
from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.offload import offloaded
from lora_trainer.training.forecast import base_bytes
from lora_trainer.training.precision import Precision
from tests.benchmarks.flow_memory import count, count_weights

pytestmark = pytest.mark.skipif(torch_version() < (2, 4), reason="fake tensors of this torch take no generators")

WIDTH, HIDDEN = 256, 1024
META, CARD = get_family("flux"), Precision(torch.device("cuda", 0), torch.bfloat16, torch.bfloat16)
SHAPE = FluxShape(1, 2, WIDTH, 4, HIDDEN, 64, 48, 32, (16, 24, 24), guidance=True)
DOUBLE = 2 * (6 + 3 + 1) * WIDTH**2 + 4 * WIDTH * HIDDEN
SINGLE = (3 + 3 + 1) * WIDTH**2 + 2 * WIDTH * HIDDEN
BYTES = {"bf16": 2.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64}


@pytest.mark.parametrize("form", BYTES)
def test_weights_learning_and_what_is_copied(form):
    found = count(form, 64, SHAPE)
    plain, waiting = found[0], found[40]
    blocks = [number * BYTES[form] for number in (DOUBLE, SINGLE, SINGLE)]
    assert [found[20], found[57]] == [waiting, waiting], "there are three blocks"
    assert offloaded(3, 40) == [0, 1, 2]
    assert plain.weights - waiting.weights == pytest.approx(sum(blocks) - 2 * max(blocks), abs=0.1 * max(blocks))
    assert waiting.moved == pytest.approx(blocks[2] + blocks[0], rel=0.05), "of three, two are there already each way"
    assert waiting.waiting >= sum(blocks) and plain.moved == plain.waiting == 0
    assert plain.step == waiting.step > 0 and plain.learning == waiting.learning
    double = 2 * (7 + 4 + 2) * WIDTH + 4 * (WIDTH + HIDDEN)  # modulation, qkv and proj of each side; its MLP
    single = (4 + 2 + 4) * WIDTH + 2 * HIDDEN  # linear1, linear2, modulation
    ranks = 16 * (double + 2 * single)
    assert plain.learning == ranks * (3 * 4 + 2), "fp32, AdamW's two, and a copy in bf16"
    assert count_weights(form, SHAPE)[0].weights == plain.weights
    model = META.meta_model(replace(META.usual, transformer=SHAPE, t5=None, clips=()))
    for number, counted in found.items():  # what offload_blocks: auto goes by
        config = TrainConfig(base_precision="stored" if form == "bf16" else form, offload_blocks=number)
        assert base_bytes(model, config, CARD)["unet"] == pytest.approx(counted.weights, rel=0.03)
