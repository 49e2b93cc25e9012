"""What equal runs on a CPU need to agree to the bit: with two threads, and in whatever place of memory they compute.

Found by computing each kind of layer, forward and backward, with operands that begin at different bytes: MKL's fp32
product with few columns (those of a LoRA of rank 8 or less) gives other last bits where its left operand does not begin
on a border of 16 bytes, with one thread as with two. All other kernels gave the same in every place, and every kernel
the same when it was repeated.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_trainer.config import from_mapping, to_yaml
from lora_trainer.demo.base import build_base
from tests.pictures import draw_dataset
from tests.run.runs import assert_same_weights, run


@pytest.mark.slow
def test_equal_runs_with_two_threads_agree_to_the_bit(tmp_path):
    settings = {
        "train_data_dir": str(draw_dataset(tmp_path / "data", 2, lambda index: (128, 128))),
        "base_model": str(build_base()),
        "output_name": "disc",
        "resolution": 128,
        "batch_size": 2,
        "lora_rank": 4,
        "conv_rank": 4,
        "train_text_encoder": True,
        "max_train_steps": 2,
        "mixed_precision": "no",
        "device": "cpu",
        "save_precision": "fp32",
        "tensorboard": False,
        "export_diffusers": False,
    }
    # Threads that wait for each other by spinning take minutes where the two cores have other work.
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    loras = []
    for number in range(2):
        config = tmp_path / f"{number}.yaml"
        config.write_text(to_yaml(from_mapping({**settings, "output_dir": str(tmp_path / str(number))})))
        command = [sys.executable, "-m", "lora_trainer", "train", "--config", str(config)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        loras.append(tmp_path / str(number) / "disc.safetensors")
    assert_same_weights(*loras)


class Places(TorchDispatchMode):
    """Where the operands of all matrix products begin, as bytes behind a border of 16."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            operands = [one for one in arguments if isinstance(one, torch.Tensor)]
            self.found.append([(tuple(one.shape), one.data_ptr() % 16) for one in operands])
        return function(*arguments, **keywords or {})


def test_where_operands_begin_is_decided_by_their_shapes(tmp_path, tiny_base):
    settings = {
        "train_data_dir": str(draw_dataset(tmp_path / "data", 3, lambda index: (64, 64))),
        "base_model": str(tiny_base),
        "resolution": 64,
        "batch_size": 2,
        "lora_rank": 4,
        "max_train_steps": 2,
        "train_text_encoder": True,
        "device": "cpu",
        "tensorboard": False,
        "export_diffusers": False,
    }
    places, kept = [], []
    for number in range(2):
        with Places() as mode:
            run(settings, output_dir=str(tmp_path / str(number)))
        places.append(mode.found)
        kept += [bytearray(size) for size in range(1000, 9000, 24)]  # other places are free for the next run
    assert places[0] == places[1] and len(places[0]) > 100
