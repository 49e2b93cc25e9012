"""diffusers' blocks without their idle work compute what diffusers' do, and keep less."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from lora_trainer.models.casting import CastConv2d, cast_layers
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families.unet.blocks import SlimAttention, SlimGEGLU, SlimResnet
from tests.tiny import SD1, SDXL, tiny_sd1, tiny_sdxl

SMALL = {"mult": (1, 2), "layers": 1}
BASES = {
    "sd1": (tiny_sd1, {**SD1, **SMALL, "depths": (1, 0)}),
    "sdxl": (tiny_sdxl, {**SDXL, **SMALL, "depths": (0, 2)}),
}


@pytest.fixture(params=BASES)
def model(request, tmp_path):
    make, sizes = BASES[request.param]
    with FileLender(make(tmp_path / "base.safetensors", **sizes)).borrow() as model:
        yield model


def answer(unet: torch.nn.Module, learning: Sequence[torch.nn.Parameter] = ()) -> tuple[torch.Tensor, ...]:
    """The output for some input, the input's gradient, and those of what learns."""
    generator, config = torch.Generator().manual_seed(0), unet.config
    latents = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    context = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    added = None
    if config.addition_embed_type:
        pooled = torch.randn(2, config.projection_class_embeddings_input_dim - 6 * 256, generator=generator)
        added = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    output = unet(latents, torch.tensor([3, 700]), context, added_cond_kwargs=added, return_dict=False)[0]
    return output.detach(), *torch.autograd.grad(output.square().sum(), [latents, *learning])


def test_the_answer_is_diffusers_own(model):
    with torch.device("meta"):
        plain = UNet2DConditionModel.from_config(model.unet.config)
    plain.load_state_dict(model.unet.state_dict(), assign=True)
    slim = [type(part) for part in model.unet.modules()]
    assert all(kind in slim for kind in (SlimResnet, SlimAttention, SlimGEGLU))
    (ours, our_gradient), (theirs, their_gradient) = answer(model.unet), answer(plain.requires_grad_(False).eval())
    # not torch.equal: where the memory begins decides which kernel of the same product is taken
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)


def test_another_attention_processor_is_used(model):
    expected, _ = answer(model.unet)
    model.unet.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(answer(model.unet)[0], expected, rtol=1e-4, atol=1e-5)
    called = []

    class Seen(AttnProcessor):
        def __call__(self, *arguments, **options):
            called.append(1)
            return super().__call__(*arguments, **options)

    model.unet.set_attn_processor(Seen())
    answer(model.unet)
    assert len(called) == len(model.unet.attn_processors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_convolution_keeps_its_weight_alone(dtype):
    layer, kept = torch.nn.Conv2d(4, 6, 3, padding=1).to(dtype).requires_grad_(False), []
    expected = torch.nn.Conv2d.forward
    cast_layers(layer, dtype)
    assert isinstance(layer, CastConv2d)
    x = torch.randn(2, 4, 5, 5, dtype=dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(x)
    assert [tensor.shape for tensor in kept] == [layer.weight.shape]
    plain = expected(layer, x)
    assert torch.equal(output, plain)
    weights = torch.randn_like(plain)
    for ours, theirs in zip(torch.autograd.grad(output, x, weights), torch.autograd.grad(plain, x, weights)):
        assert torch.equal(ours, theirs)
