"""A file of ours, in either layout, does in diffusers what it does here: UNet and text encoders of every family."""

from __future__ import annotations

import contextlib

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import USE_PEFT_BACKEND, convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict

from lora_trainer.adapters.export import DIFFUSERS_FILE_NAME, save_diffusers, save_lora
from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.models.checkpoint import FileLender
from tests import tiny
from tests.adapters.layers import randomize, settings

BASES = {"sd1": tiny.tiny_sd1, "sd2": tiny.tiny_sd2, "sdxl": tiny.tiny_sdxl}
# 6 for each layer of the tiny text encoders: 2; 2 less the last, which SD 2 does not use; 2 + 3.
COUNTS = {"sd1": (192, 12), "sd2": (192, 6), "sdxl": (722, 30)}


@pytest.fixture(scope="module", params=["sd1", pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def model(request, tmp_path_factory):
    base = BASES[request.param](tmp_path_factory.mktemp("base") / "base.safetensors")
    with FileLender(base).borrow() as lent:
        # As in the configuration that diffusers itself has for these models, which its key conversion divides by.
        lent.unet.register_to_config(layers_per_block=2, sample_size=64)
        yield lent


def outputs(model) -> list[torch.Tensor]:
    """What UNet and text encoders answer to fixed inputs."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 49000, (1, 77), generator=generator)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    context = torch.randn(1, 77, model.unet.config.cross_attention_dim, generator=generator)
    conditions = None
    if model.info.family == "sdxl":
        pooled = model.text_encoders[1].config.projection_dim
        conditions = {
            "text_embeds": torch.randn(1, pooled, generator=generator),
            "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]),
        }
    with torch.no_grad():
        answers = [model.unet(latents, torch.tensor([500]), context, added_cond_kwargs=conditions).sample]
        for encoder in model.text_encoders:
            answers.append(encoder(ids, output_hidden_states=True).hidden_states[-1])
    return answers


@contextlib.contextmanager
def plain_layers(model):
    """Layers of torch's own classes: PEFT makes its convolutions of the class that it finds (fp32: same sums)."""
    cast = [m for root in (model.unet, *model.text_encoders) for m in root.modules() if hasattr(m, "compute_dtype")]
    classes = [type(module) for module in cast]
    for module in cast:
        module.__class__ = type(module).__mro__[1]
    try:
        yield
    finally:
        for module, was in zip(cast, classes):
            module.__class__ = was


@contextlib.contextmanager
def loaded_by_diffusers(model, path):
    with plain_layers(model), _loaded(model, path):
        yield


@contextlib.contextmanager
def _loaded(model, path):
    scheduler = EulerDiscreteScheduler()
    if model.info.family == "sdxl":
        first, second = model.text_encoders
        pipe = StableDiffusionXLPipeline(
            model.vae, first, second, None, None, model.unet, scheduler, add_watermarker=False
        )
    else:
        pipe = StableDiffusionPipeline(
            model.vae, model.text_encoders[0], None, model.unet, scheduler, None, None, requires_safety_checker=False
        )
    if not USE_PEFT_BACKEND:
        pytest.skip("diffusers loads LoRAs through PEFT, which needs a newer transformers than this host's")
    # Named in two parts, as diffusers wants it where HF_HUB_OFFLINE is set.
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    try:
        yield
    finally:
        pipe.unload_lora_weights()


def assert_same(first, second, tolerance=1e-5):
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("conv_rank", [0, 2])
def test_both_layouts_give_the_same_outputs(model, tmp_path, conv_rank):
    config = settings(lora_rank=4, alpha=2.0, conv_rank=conv_rank, train_text_encoder=True)
    adapters = AdapterSet.build(model.lora_targets(), config)
    if not conv_rank:
        parts = [target.part == "unet" for target, _ in adapters.items()]
        assert (sum(parts), len(parts) - sum(parts)) == COUNTS[model.info.family]
    randomize(adapters, deviation=0.1)
    bare = outputs(model)
    with adapters:
        ours = outputs(model)
        with adapters.enabled(False):
            assert all(torch.equal(one, other) for one, other in zip(outputs(model), bare))
    assert all(torch.equal(one, other) for one, other in zip(outputs(model), bare)), "detached"
    assert all((one - other).abs().max() > 0.01 for one, other in zip(ours, bare)), "every part must change"

    save_lora(adapters, tmp_path / "ours.safetensors", {}, "fp32")
    save_diffusers(adapters, tmp_path, {}, "fp32")
    for name in ("ours.safetensors", DIFFUSERS_FILE_NAME):
        with loaded_by_diffusers(model, tmp_path / name):
            assert_same(outputs(model), ours)
        again = AdapterSet.build(model.lora_targets(), config)
        assert init_from(again, read_lora(tmp_path / name)) == []
        with again:
            assert_same(outputs(model), ours)


def test_what_diffusers_saves_can_be_continued(model, tmp_path):
    """The layout of diffusers' own save_lora_weights, and the older names it still writes."""
    config = settings(lora_rank=4, train_text_encoder=True)
    adapters = AdapterSet.build(model.lora_targets(), config)
    randomize(adapters, deviation=0.1)
    save_lora(adapters, tmp_path / "ours.safetensors", {}, "fp32")
    with loaded_by_diffusers(model, tmp_path / "ours.safetensors"):
        theirs = outputs(model)
        layers = []
        for module in (model.unet, *model.text_encoders):
            state = get_peft_model_state_dict(module, adapter_name=next(iter(module.peft_config)))
            layers.append(convert_state_dict_to_diffusers(state))
    if model.info.family == "sdxl":
        names = ("unet_lora_layers", "text_encoder_lora_layers", "text_encoder_2_lora_layers")
        StableDiffusionXLPipeline.save_lora_weights(tmp_path / "theirs", **dict(zip(names, layers)))
    else:
        StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs", *layers)
    again = AdapterSet.build(model.lora_targets(), config)
    assert init_from(again, read_lora(tmp_path / "theirs")) == []
    with again:
        assert_same(outputs(model), theirs)
