"""Memory of a device: asked for as torch wants it, and never a reason for a run or a page to fail."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_trainer.planning.memory import free_memory, kept_for_later, memory_in_use
from tests.devices import pretended_gpu


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpus_memory_is_told_with_and_without_an_index(name):
    """torch 2.1 to 2.3 refuse torch.device("cuda") in mem_get_info."""
    device = torch.device(name)
    with pretended_gpu(memory=8 << 30) as gpu:
        tensor = torch.zeros(1 << 20, device="cuda")
        assert memory_in_use(device) == gpu.allocated == tensor.numel() * 4
        assert kept_for_later(device) == 0
        assert free_memory(SimpleNamespace(device=lambda: device)) == gpu.memory - gpu.allocated


def test_a_driver_that_does_not_answer_is_no_reason_to_fail(monkeypatch):
    def raises(device=None):
        raise RuntimeError("CUDA error: unknown error")

    device = torch.device("cuda:0")
    with pretended_gpu():
        monkeypatch.setattr(torch.cuda, "mem_get_info", raises)
        assert memory_in_use(device) is None and kept_for_later(device) == 0
        assert free_memory(SimpleNamespace(device=lambda: device)) is None


@pytest.mark.parametrize("name", ["mps:0", "cuda:0", "xpu:0"])
def test_the_memory_of_the_process_is_not_told_as_that_of_a_gpu(name):
    assert not torch.cuda.is_initialized()
    assert memory_in_use(torch.device(name)) is None
    assert memory_in_use(torch.device("cpu")) > 0
