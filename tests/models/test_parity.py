"""Our models compute what independent implementations compute on the same file."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning
from lora_trainer.models.checkpoint import FileLender
from tests.models import reference
from tests.models.conftest import SIZE_IDS

CAPTION = "a photo of a cat, sitting"
IDS = [49406, 320, 1125, 539, 320, 2368, 267, 4919, 49407]  # CLIP's own; start, words, end


def padded(pad: int) -> torch.Tensor:
    return torch.tensor([IDS + [pad] * (77 - len(IDS))])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_unet_and_vae_equal_diffusers_with_its_own_conversion(checkpoints, family):
    checkpoint = load_file(str(checkpoints[family]))
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 12, generator=generator)
    timesteps = torch.tensor([7, 901])
    pixels = torch.rand(1, 3, 64, 96, generator=generator) * 2 - 1
    with FileLender(checkpoints[family]).borrow() as model:
        width = model.architecture.unet.context_dim
        context = torch.randn(2, 77, width, generator=generator)
        pooled = torch.randn(2, 32, generator=generator)
        added = {"text_embeds": pooled, "time_ids": torch.tensor(SIZE_IDS)} if family == "sdxl" else None
        theirs = reference.unet(family, checkpoint)
        expected = theirs(latents, timesteps, encoder_hidden_states=context, added_cond_kwargs=added).sample
        close(model.predict(latents, timesteps, Conditioning(context, pooled), torch.tensor(SIZE_IDS)), expected)

        their_vae = reference.vae(checkpoint)
        close(model.encode_images(pixels), their_vae.encode(pixels).latent_dist.parameters)
        factor = 0.13025 if family == "sdxl" else 0.18215
        close(model.decode_latents(latents[:1] * factor), their_vae.decode(latents[:1]).sample.clamp(-1, 1))


@torch.no_grad()
def test_latents_are_the_scaled_posterior(checkpoints):
    with FileLender(checkpoints["sdxl"]).borrow() as model:
        moments = torch.randn(2, 8, 4, 4) * 3
        mean, log_variance = moments.chunk(2, dim=1)
        close(model.sample_latents(moments, None), 0.13025 * mean)
        noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
        drawn = model.sample_latents(moments, torch.Generator().manual_seed(5))
        close(drawn, 0.13025 * (mean + torch.exp(log_variance / 2) * noise))
        close(model.sample_latents(model.latent_moments(drawn), torch.Generator().manual_seed(1)), drawn)


def test_a_clip_skip_beyond_the_layers_is_said(checkpoints):
    with FileLender(checkpoints["sd1"], clip_skip=3).borrow() as model, pytest.raises(UserError, match="2 layers"):
        model.encode_prompts(["a cat"])


@torch.no_grad()
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_sd1_text(checkpoints, clip_skip):
    tensors = load_file(str(checkpoints["sd1"]))
    prefix = "cond_stage_model.transformer."
    states = reference.clip_states(tensors, prefix, padded(49407))
    expected = states[-1]
    if clip_skip == 2:
        norm = [tensors[f"{prefix}text_model.final_layer_norm.{part}"] for part in ("weight", "bias")]
        expected = torch.nn.functional.layer_norm(
            states[-3], (32,), *norm
        )  # the layer before the last, then the LayerNorm
    with FileLender(checkpoints["sd1"], clip_skip=clip_skip).borrow() as model:
        prompts = model.encode_prompts([CAPTION])
        assert prompts.pooled is None
        close(prompts.context, expected)


@torch.no_grad()
def test_sd2_text_is_the_last_layer_but_one_and_the_final_norm(checkpoints):
    tensors = load_file(str(checkpoints["sd2"]))
    prefix = "cond_stage_model.model."
    states = reference.clip_states(tensors, prefix, padded(0))
    norm = [tensors[f"{prefix}ln_final.{part}"] for part in ("weight", "bias")]
    with FileLender(checkpoints["sd2"]).borrow() as model:
        close(model.encode_prompts([CAPTION]).context, torch.nn.functional.layer_norm(states[-3], (32,), *norm))


@torch.no_grad()
def test_sdxl_text(checkpoints):
    tensors = load_file(str(checkpoints["sdxl"]))
    first = reference.clip_states(tensors, "conditioner.embedders.0.transformer.", padded(49407))
    second = reference.clip_states(tensors, "conditioner.embedders.1.model.", padded(0))
    pooled = second[-1][:, len(IDS) - 1] @ tensors["conditioner.embedders.1.model.text_projection"]
    with FileLender(checkpoints["sdxl"]).borrow() as model:
        prompts = model.encode_prompts([CAPTION])
        close(prompts.context, torch.cat([first[-3], second[-3]], dim=-1))  # last two: last layer, LayerNorm
        close(prompts.pooled, pooled)
        both = model.encode_prompts(["a dog " * 60, CAPTION])  # a long neighbor changes nothing but the length
        assert both.context.shape == (2, 154, 64)
        close(both.context[1:, :77], prompts.context)
        close(both.context[1:, 77:], model.encode_prompts([""]).context)
        close(both.pooled[1:], pooled)
        one = model.encode_prompts(["a dog " * 60, CAPTION], rows=slice(1, 2))  # alone, as long as with its neighbor
        close(one.context, both.context[1:])
        close(one.pooled, pooled)


@torch.no_grad()
def test_the_pooled_prompt_does_not_depend_on_how_the_projection_lies_in_memory(checkpoints):
    """Files have it transposed, Forge has not; LoRAs trained from either must agree."""
    with FileLender(checkpoints["sdxl"]).borrow() as model:
        pooled = model.encode_prompts([CAPTION]).pooled
        projection = model.text_encoders[1].text_projection
        assert not projection.weight.is_contiguous()
        projection.weight = torch.nn.Parameter(projection.weight.contiguous(), requires_grad=False)
        assert torch.equal(model.encode_prompts([CAPTION]).pooled, pooled)


@torch.no_grad()
def test_a_diffusers_folder_gives_the_same_model(checkpoints, family, tmp_path):
    checkpoint = load_file(str(checkpoints[family]))
    folder = tmp_path / "model"
    reference.unet(family, checkpoint).save_pretrained(folder / "unet")
    reference.vae(checkpoint).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    with FileLender(checkpoints[family]).borrow() as model:
        for part, encoder in zip(("text_encoder", "text_encoder_2"), model.text_encoders):
            stored = copy.deepcopy(encoder)
            for weight in stored.parameters():
                weight.data = weight.data.contiguous()
            stored.save_pretrained(folder / part, safe_serialization=True)  # transformers 4.30 writes a pickle else
        expected_prompts = model.encode_prompts([CAPTION])
        latents, timesteps, sizes = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor(SIZE_IDS[:1])
        expected = model.predict(latents, timesteps, expected_prompts, sizes)
        targets = [(target.kohya_name, target.block) for target in model.lora_targets()]
    lender = FileLender(folder)
    assert lender.describe().prediction_type == "v_prediction"
    assert lender.model_hash() is None
    with lender.borrow() as model:
        prompts = model.encode_prompts([CAPTION])
        close(prompts.context, expected_prompts.context)
        close(model.predict(latents, timesteps, prompts, sizes), expected)
        assert [(target.kohya_name, target.block) for target in model.lora_targets()] == targets
