"""The lender's tensors are used where they lie."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.config import TrainConfig
from lora_trainer.models.base import Conditioning, ModelInfo
from lora_trainer.models.blocks import block_forward
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.detect import detect
from lora_trainer.models.families import get_family
from lora_trainer.models.families.unet.blocks import recomputable
from lora_trainer.models.tokenizer import load_tokenizer
from lora_trainer.models.work import recomputed
from tests.models.conftest import SIZE_IDS
from tests.tiny import tiny_sd1, tiny_sd2


def build(tensors, **options):
    architecture = detect({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    info = ModelInfo(architecture.family, "epsilon", "test")
    return get_family(architecture.family).build(tensors, architecture, load_tokenizer(), info=info, **options)


def run(model, latents=None):
    generator = torch.Generator().manual_seed(0)
    if latents is None:
        latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 77, model.architecture.unet.context_dim, generator=generator)
    prompts = Conditioning(context, torch.randn(2, 32, generator=generator))
    return model.predict(latents, torch.tensor([3, 800]), prompts, torch.tensor(SIZE_IDS))


def test_every_parameter_lies_in_the_given_memory(checkpoints, family):
    tensors = load_file(str(checkpoints[family]))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    memory = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors.values()]
    model = build(tensors)

    copied = 0
    for parameter in model.bound().values():
        start = parameter.untyped_storage().data_ptr() + parameter.storage_offset() * parameter.element_size()
        inside = any(low <= start and start + parameter.nbytes <= high for low, high in memory)
        copied += 0 if inside else parameter.nbytes
        assert not parameter.requires_grad
    assert copied == 0

    with torch.no_grad():
        run(model)
        model.decode_latents(model.sample_latents(model.encode_images(torch.zeros(1, 3, 64, 64)), None))
        model.encode_prompts(["(a:1.2) cat"], weighted=True)
    for name, tensor in tensors.items():
        assert tensor._version == 0
        assert torch.equal(tensor, before[name])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_weights_of_the_right_format_are_the_file_itself(checkpoints, family):
    with FileLender(checkpoints[family]).borrow() as model, open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(checkpoints[family].name)]
        ranges = [(int(start, 16), int(stop, 16)) for start, stop in ranges]
        for name, parameter in model.bound().items():
            assert any(start <= parameter.data_ptr() < stop for start, stop in ranges), name


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_sd1, tiny_sd2])  # SD 2's UNet has run once before, as stored
def test_other_formats_are_converted_one_by_one(tmp_path, make, stored):
    path = make(tmp_path / "half.safetensors", dtype=stored)
    with FileLender(path, weight_dtype=torch.float32).borrow() as model:
        dtypes = {(name.startswith("vae."), parameter.dtype) for name, parameter in model.bound().items()}
        assert dtypes == {(False, torch.float32), (True, stored)}, "a VAE keeps the precision that it is stored in"
        with torch.no_grad():
            converted = run(model)
    with FileLender(path, weight_dtype=None, compute_dtype=torch.float32).borrow() as model:
        assert {parameter.dtype for parameter in model.bound().values()} == {stored}
        with torch.no_grad():
            assert torch.equal(run(model), converted)  # cast layer by layer: the same arithmetic


def test_gradients_flow_through_layers_that_cast(tmp_path):
    path = tiny_sd1(tmp_path / "half.safetensors", dtype=torch.float16)
    gradients = []
    for weight_dtype in (torch.float32, None):
        with FileLender(path, weight_dtype=weight_dtype, compute_dtype=torch.float32).borrow() as model:
            latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
            run(model, latents).square().mean().backward()
            gradients.append(latents.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-7, rtol=1e-4)


def test_frozen_layers_keep_no_cast_copy_for_the_backward_pass(tmp_path):
    path = tiny_sd1(tmp_path / "half.safetensors", dtype=torch.float16)
    with FileLender(path, weight_dtype=None, compute_dtype=torch.float32).borrow() as model:
        layer = model.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff.net.2")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            layer(torch.ones(1, layer.in_features, requires_grad=True))
        assert [tensor.data_ptr() for tensor in saved] == [layer.weight.data_ptr()]


def test_binding_again_follows_moved_weights_and_keeps_the_modules(checkpoints, family):
    tensors = load_file(str(checkpoints[family]))
    model = build(tensors)
    layer = model.lora_targets()[0].module
    frozen = layer.forward
    layer.forward = lambda x: frozen(x) + 0.25  # what an adapter does
    with torch.no_grad():
        expected = run(model)
        moved = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}  # the host cast its weights
        tensors.clear()
        model.bind(moved)
        assert model.lora_targets()[0].module is layer
        assert {parameter.dtype for parameter in model.bound().values()} == {torch.bfloat16}
        torch.testing.assert_close(run(model), expected, atol=0.1, rtol=0.1)
        model.encode_prompts(["still works"])
        assert model.decode_latents(torch.zeros(1, 4, 4, 4)).isfinite().all()


def test_mixed_formats_as_forge_has_them(checkpoints):
    tensors = load_file(str(checkpoints["sdxl"]))
    with torch.no_grad():
        expected = build(dict(tensors)).encode_prompts(["a cat"])
        for name in tensors:
            if "layers" in name or "resblocks" in name:
                tensors[name] = tensors[name].half()  # layers fp16, embeddings fp32
        prompts = build(tensors).encode_prompts(["a cat"])
    assert prompts.context.dtype == torch.float32
    torch.testing.assert_close(prompts.context, expected.context, atol=0.05, rtol=0.05)


def test_inference_tensors_are_accepted(checkpoints):
    loaded = load_file(str(checkpoints["sdxl"]))
    with torch.inference_mode():
        tensors = {name: tensor.clone() for name, tensor in loaded.items()}
    assert all(tensor.is_inference() for tensor in tensors.values())
    with torch.no_grad():
        model = build(tensors)
        assert run(model).isfinite().all()
        model.encode_prompts(["a cat"])


def test_keys_follow_the_weights_and_the_clip_skip(checkpoints, tmp_path):
    tensors = load_file(str(checkpoints["sd1"]))
    one = build(tensors)
    assert (build(dict(tensors)).vae_key, build(dict(tensors)).text_key) == (one.vae_key, one.text_key)
    skipped = build(tensors, clip_skip=2)
    assert skipped.vae_key == one.vae_key and skipped.text_key != one.text_key
    name = "first_stage_model.encoder.mid.attn_1.q.weight"
    other = build({**tensors, name: tensors[name] * 1.001})
    assert other.vae_key != one.vae_key and other.text_key == one.text_key
    name = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.weight"
    other = build({**tensors, name: tensors[name] * 1.001})
    assert other.vae_key == one.vae_key and other.text_key != one.text_key


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_gradient_checkpointing_changes_memory_and_not_the_gradients(checkpoints, family):
    model = build(load_file(str(checkpoints[family])))

    def gradient():
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        calls.clear()
        run(model, latents).square().mean().backward()
        return latents.grad

    def text_gradient():
        layer = next(target for target in model.lora_targets() if target.part == "text_encoder").module
        scale = torch.ones((), requires_grad=True)
        frozen = layer.forward
        layer.forward = lambda x: frozen(x) * scale
        model.encode_prompts(["a cat"]).context.square().sum().backward()
        layer.forward = frozen
        return scale.grad

    calls: list[int] = []
    watched = model.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    watched.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, plain_text, plain_calls = gradient(), text_gradient(), len(calls)
    model.set_gradient_checkpointing(True)
    checkpointed, checkpointed_text, checkpointed_calls = gradient(), text_gradient(), len(calls)
    model.set_gradient_checkpointing(False)
    again, again_calls = gradient(), len(calls)
    assert (plain_calls, checkpointed_calls, again_calls) == (1, 2, 1)
    assert not any(module.training for module in model.unet.modules())
    torch.testing.assert_close(checkpointed, plain)
    torch.testing.assert_close(checkpointed_text, plain_text)
    assert plain_text.abs() > 0
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_share_of_the_parts_is_computed_anew_those_that_the_forecast_counts(checkpoints, family):
    model = build(load_file(str(checkpoints[family])))
    parts, ran, gradients = recomputable(model.unet), [], {}
    hooks = [part.register_forward_pre_hook(lambda part, inputs: ran.append(part)) for part in parts]
    with torch.no_grad():
        run(model)
    for hook in hooks:
        hook.remove()
    counted = [part for part in get_family(family).parts(model.architecture, (64, 64), TrainConfig()) if part.inputs]
    assert len(counted) == len(ran) == len(parts)
    for share in (0, 0.2, 0.5, 0.8, 1):
        model.set_gradient_checkpointing(share)
        expected = {ran[index] for index in recomputed(counted, share)}
        assert {part for part in parts if block_forward(part).anew} == expected
        assert len(expected) == round(share * len(parts))
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        run(model, latents).square().mean().backward()
        gradients[share] = latents.grad
    assert all(torch.equal(found, gradients[0]) for found in gradients.values())


def test_the_outermost_transformer_blocks_come_first_and_the_innermost_resnets_last(checkpoints):
    unet = build(load_file(str(checkpoints["sd1"]))).unet
    names = {module: name for name, module in unet.named_modules()}
    order = [names[part] for part in recomputable(unet)]
    assert order[0] == "down_blocks.0.attentions.0.transformer_blocks.0" and order[-1].startswith("up_blocks.0.resnets")
    kinds = ["resnets" in name for name in order]
    assert kinds == sorted(kinds) and True in kinds


def test_released_parts_are_let_go(checkpoints):
    with FileLender(checkpoints["sd1"]).borrow() as model:
        model.release("vae")
        with pytest.raises(RuntimeError, match="released"):
            model.encode_images(torch.zeros(1, 3, 64, 64))
        model.bind(load_file(str(checkpoints["sd1"])))
        assert not any(name.startswith("vae.") for name in model.bound())
        assert len([target for target in model.lora_targets() if target.part == "text_encoder"]) == 12
        model.release("text_encoders")
        assert {target.part for target in model.lora_targets()} == {"unet"}
        with torch.no_grad():
            assert run(model).isfinite().all()
