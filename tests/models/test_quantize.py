"""``base_precision``: fp8 and nf4 by their definitions, gradients, and a FLUX.1 that is quantized as it is read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_trainer.adapters.lora import LoraAdapter
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.quantize import BLOCK, BYTES, NF4, fp8, nf4, quantize
from lora_trainer.storage import dense_weight, packing_of
from tests import flux as tiny


def test_the_numbers_of_nf4_are_those_of_its_paper():
    """QLoRA, appendix E: quantiles of the normal distribution, 8 on one side of 0 and 7 on the other, up to 1."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    expected = expected / expected.max()
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(24, 64), (5, 30)])
def test_nf4_takes_the_nearest_number_in_each_block(shape, monkeypatch):
    monkeypatch.setattr("lora_trainer.models.quantize._AT_ONCE", 2)  # in several pieces
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02
    weight[0] = 0
    stored = nf4(weight)
    assert stored.dtype == torch.uint8 and stored.numel() == -(-weight.numel() // BLOCK) * BLOCK // 2
    expected = []
    for block in weight.flatten().split(BLOCK):
        largest = float(block.abs().max())
        for number in block.tolist():
            expected.append(min((abs(value * largest - number), value * largest) for value in NF4)[1])
    torch.testing.assert_close(dense_weight(stored, torch.float32), torch.tensor(expected).view(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_stored_and_read_as_by_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(4)).to(dtype)
    theirs, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    stored = nf4(weight)
    assert torch.equal(packing_of(stored).absmax, state.absmax)
    assert (stored != theirs.flatten()).float().mean() < 1e-3  # where a number lies in the middle between two
    ours = packing_of(stored).unpack(theirs.flatten(), dtype)
    torch.testing.assert_close(ours, functional.dequantize_4bit(theirs, state), rtol=0, atol=0)


def test_fp8_loses_what_its_three_bits_lose_and_its_scales_nothing():
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(5)) * torch.logspace(-6, 3, 6)[:, None]
    weight[2] = 0
    stored = fp8(weight)
    assert stored.dtype == torch.float8_e4m3fn and packing_of(stored).scale.shape == (6, 1)
    dense = dense_weight(stored, torch.float32)
    largest = weight.abs().amax(1, keepdim=True)
    assert ((dense - weight).abs() <= weight.abs() / 16 + largest * 2**-15).all() and not torch.equal(dense, weight)
    assert torch.equal(dense_weight(stored, torch.bfloat16).float(), dense)


@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_gradients_are_those_of_the_dense_weight_and_nothing_of_its_size_is_kept(form):
    layer, dense = (nn.Linear(128, 96).requires_grad_(False) for _ in range(2))
    stored = quantize(layer.weight.data, form)
    parameter = nn.Parameter(stored.detach(), requires_grad=False)
    parameter.packing = packing_of(stored)
    layer._parameters["weight"] = parameter
    dense.weight.data, dense.bias.data = dense_weight(stored, torch.float32), layer.bias.data
    cast_layers(layer, torch.float32)
    adapter, reference = (LoraAdapter(one, 4, 4.0, seed=1) for one in (layer, dense))
    for one in (adapter, reference):
        one.lora_up.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    for module, other in ((layer, dense), (adapter, reference)):
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(6)).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        kept: dict[int, torch.Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):  # noqa: B023
            loss = module(x).square().sum()
        assert not [t.shape for t in kept.values() if t.numel() >= 96 * 64 and t.data_ptr() != parameter.data_ptr()]
        loss.backward()
        other(twin).square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.lora_down.grad, reference.lora_down.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.lora_up.grad, reference.lora_up.grad, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.tiny_flux(tmp_path_factory.mktemp("flux"), dtype=torch.bfloat16)


def lend(base, **options) -> FileLender:
    return FileLender(base["base_model"], vae=base["vae"], text_encoders=base["text_encoders"], **options)


@torch.no_grad()
@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_the_layers_of_the_blocks_are_quantized_as_they_are_read(base, form, tmp_path):
    latents, sigmas = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(7)), torch.tensor([0.4])
    weights = load_file(base["base_model"])
    layers = [name for name, tensor in weights.items() if "_blocks." in name and tensor.dim() == 2]
    dense = {name: tensor.float() for name, tensor in weights.items()}
    dense |= {name: dense_weight(quantize(weights[name], form), torch.float32) for name in layers}
    save_file(dense, str(tmp_path / "dense.safetensors"))
    with lend(base, base_precision=form).borrow() as model:
        parameters = dict(model.unet.named_parameters())
        assert all((name in layers) == (packing_of(parameter) is not None) for name, parameter in parameters.items())
        size = sum(parameters[name].nbytes for name in layers)
        scales = sum(packing_of(parameters[name]).absmax.nbytes for name in layers) if form == "nf4" else 0
        assert size + scales == BYTES[form] * sum(weights[name].numel() for name in layers)
        texts = [parameter.dtype for encoder in model.text_encoders for parameter in encoder.parameters()]
        assert set(texts) == {torch.float32}, "the text encoders stay as they are"
        conditioning, key = model.encode_prompts(["a red circle"]), model.network_key
        prediction = model.predict(latents, sigmas, conditioning, None)
    with lend({**base, "base_model": tmp_path / "dense.safetensors"}).borrow() as model:
        torch.testing.assert_close(prediction, model.predict(latents, sigmas, conditioning, None))
    with lend(base).borrow() as model:
        assert model.network_key != key
        assert not torch.equal(prediction, model.predict(latents, sigmas, conditioning, None))


def test_what_is_quantized_already_stays_as_it_is_or_becomes_smaller():
    weight = torch.randn(4, 64)
    eight, four = quantize(weight, "fp8"), quantize(weight, "nf4")
    assert quantize(eight, "fp8") is eight and quantize(four, "nf4") is four and quantize(four, "fp8") is four
    bare = weight.to(torch.float8_e4m3fn)
    assert quantize(bare, "fp8") is bare
    assert quantize(torch.randn(3, 5).to(torch.float8_e4m3fn), "nf4").numel() == 32, "filled up to a whole block"
    expected = dense_weight(nf4(dense_weight(eight, torch.float32)), torch.float32)
    assert torch.equal(dense_weight(quantize(eight, "nf4"), torch.float32), expected)

