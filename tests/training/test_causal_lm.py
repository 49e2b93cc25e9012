"""The chunked cross-entropy of language models: equal to the plain one, with a part of its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from lora_trainer.models.families.causal_lm.model import Head
from lora_trainer.training.objectives.causal_lm import TokenBatch, cross_entropy


def plain(hidden, head, targets):
    logits = functional.linear(hidden, head.weight, head.bias)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_chunks_give_the_loss_and_the_gradient_of_the_whole(softcap, bias, chunk):
    torch.manual_seed(0)
    hidden = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    head = Head(
        torch.randn(97, 24, dtype=torch.float64), torch.randn(97, dtype=torch.float64) if bias else None, softcap
    )
    targets = torch.randint(97, (50,))
    wanted = plain(hidden, head, targets)
    (gradient,) = torch.autograd.grad(wanted / 31, hidden)
    found = cross_entropy(hidden, head, targets, chunk)
    (ours,) = torch.autograd.grad(found / 31, hidden)
    assert abs(found.item() - wanted.item()) <= 1e-9
    assert (ours - gradient).abs().max() <= 1e-9
    assert cross_entropy(hidden.detach(), head, targets, chunk).item() == found.item()


def test_low_precision_is_summed_in_fp32():
    torch.manual_seed(0)
    hidden = torch.randn(200, 16).to(torch.bfloat16).requires_grad_()
    head, targets = Head(torch.randn(50, 16).to(torch.bfloat16)), torch.randint(50, (200,))
    found = cross_entropy(hidden, head, targets)
    exact = plain(hidden.detach().double(), Head(head.weight.double()), targets)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=2e-3)
    found.backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_a_batch_is_divided_without_changing_what_is_labelled():
    batch = TokenBatch(torch.arange(12).view(3, 4), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]]).bool())
    assert len(batch) == 3 and batch.count == 4 == batch[:1].count + batch[1:].count


PEAK = """
import re, sys, torch
from torch.nn import functional
from lora_trainer.models.families.causal_lm.model import Head
from lora_trainer.training.objectives.causal_lm import cross_entropy
how, rows = sys.argv[1], int(sys.argv[2])
hidden = torch.randn(rows, 64, requires_grad=True)
head, targets = Head(torch.randn(32000, 64)), torch.randint(32000, (rows,))
def peak():  # of this process alone: getrusage's also counts the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
if how == "plain":
    functional.cross_entropy(hidden @ head.weight.T, targets, reduction="sum").backward()
else:
    cross_entropy(hidden, head, targets).backward()
print((peak() - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted in KiB on Linux")
def test_the_peak_is_a_part_of_the_plain_one(capsys):
    def peak(*arguments: str) -> int:
        command = [sys.executable, "-c", PEAK, *arguments]
        return int(subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2]).stdout)

    whole, chunked, labelled = peak("plain", "2048"), peak("chunked", "2048"), peak("chunked", "614")
    with capsys.disabled():
        print(f"\nN 2048, V 32,000, fp32: {whole} MiB plain, {chunked} MiB chunked, {labelled} MiB with 30 % labelled")
    assert chunked < 0.3 * whole and labelled <= chunked
