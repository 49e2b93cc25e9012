"""Parts of a model that is read from a file make room for each other where the device's memory lacks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import TrainConfig
from lora_trainer.errors import UserError
from lora_trainer.host.base import PreviewRequest
from lora_trainer.host.standalone import StandaloneHost
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families.parts import PARTS
from lora_trainer.models.families.unet.binding import Binding
from tests.tiny import tiny_sd1


class Memory:
    """Counts the bytes of all bound weights, and refuses more than ``capacity`` as a GPU's allocator does."""

    def __init__(self, monkeypatch):
        self.capacity, self.used, self.peak = float("inf"), {}, 0
        bind, unbind = Binding.bind, Binding.unbind

        def bound(binding, tensors, device):
            bind(binding, tensors, device)
            parameter = binding.owner._parameters[binding.name]
            self.used[id(binding)] = parameter.numel() * parameter.element_size()
            if self.total > self.capacity:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            self.peak = max(self.peak, self.total)

        def unbound(binding):
            unbind(binding)
            self.used.pop(id(binding), None)

        monkeypatch.setattr(Binding, "bind", bound)
        monkeypatch.setattr(Binding, "unbind", unbound)

    @property
    def total(self) -> int:
        return sum(self.used.values())


def compute(model):
    """What all parts compute, part by part and back."""
    moments = model.encode_images(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))
    latents = model.sample_latents(moments, None)
    with torch.no_grad():
        conditioning = model.encode_prompts(["a photo"])
        prediction = model.predict(latents, torch.tensor([500]), conditioning, None)
    return [moments, conditioning.context, prediction, model.decode_latents(prediction)]


def test_parts_leave_for_each_other_and_compute_the_same(tiny_base, monkeypatch):
    memory = Memory(monkeypatch)
    with FileLender(tiny_base).borrow() as model:
        sizes = dict.fromkeys(PARTS, 0)
        for part, module in (("unet", model.unet), ("vae", model.vae), ("text_encoders", model.text_encoders[0])):
            sizes[part] = sum(weight.numel() * weight.element_size() for weight in module.parameters())
        expected, whole = compute(model), memory.total
    memory.capacity, memory.peak = max(sizes.values()), 0
    with FileLender(tiny_base).borrow() as model:
        assert all(torch.equal(one, other) for one, other in zip(compute(model), expected))
    assert memory.peak <= memory.capacity < whole


def test_parts_that_come_back_have_the_lora_that_is_drawn_with(tiny_base, tmp_path, monkeypatch):
    """Pictures of a finished run, on a device that holds one part at a time: parts leave and come back."""
    config = TrainConfig(lora_rank=2, train_text_encoder=True)
    with FileLender(tiny_base).borrow() as model:
        adapters = AdapterSet.build(model.lora_targets(), config)
        for _, adapter in adapters.items():
            adapter.lora_up.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        save_file(adapters.export(), str(tmp_path / "lora.safetensors"))
    request = PreviewRequest(prompt="a disc", width=64, height=64, steps=2, checkpoint=str(tiny_base))
    requests = [replace(request, lora=tmp_path / "lora.safetensors"), request] * 2
    memory, host = Memory(monkeypatch), StandaloneHost(tmp_path, device="cpu")
    expected = [picture.tobytes() for picture in host.draw_all(requests)]
    memory.capacity, memory.peak = 0.6 * memory.peak, 0
    assert [picture.tobytes() for picture in host.draw_all(requests)] == expected and memory.peak > 0
    assert expected[0] == expected[2] != expected[1] == expected[3]


def test_a_part_that_does_not_fit_alone_is_a_sentence(tiny_base, monkeypatch):
    Memory(monkeypatch).capacity = 1000
    with pytest.raises(UserError, match="memory does not suffice") as caught, FileLender(tiny_base).borrow():
        pass
    assert caught.value.field == "device" and "cpu" in caught.value.remedy


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
], ids=["CUDA", "MPS", "cuBLAS"])  # fmt: skip
def test_memory_that_lacks_while_computing_is_made_by_the_other_parts(tiny_base, monkeypatch, error):
    memory = Memory(monkeypatch)
    with FileLender(tiny_base).borrow() as model:
        encoder, tries = model.vae.encoder.conv_in, []
        forward = encoder.forward

        def short(x):
            tries.append(memory.total)
            if len(tries) == 1:
                raise error
            return forward(x)

        encoder.forward = short
        model.encode_images(torch.zeros(1, 3, 64, 64))
    assert len(tries) == 2 and tries[1] < tries[0]


def test_with_gradients_the_caller_decides(tiny_base):
    with FileLender(tiny_base).borrow() as model:

        def short(*arguments, **named):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

        conditioning = model.encode_prompts(["a photo"])
        model.unet.conv_in.forward = short
        with pytest.raises(torch.cuda.OutOfMemoryError):
            model.predict(torch.zeros(1, 4, 8, 8), torch.tensor([500]), conditioning, None)
        model.make_room()
        assert model.vae.encoder.conv_in.weight.is_meta and not model.unet.conv_in.weight.is_meta


def test_a_vae_that_comes_back_has_the_precision_it_had(tmp_path):
    """Other latents would be trained on, and cached under the old key."""
    path = tiny_sd1(tmp_path / "base.safetensors", mult=(1, 1), depths=(1, 0), layers=1)
    with FileLender(path, weight_dtype=torch.bfloat16).borrow() as model:
        pixels = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
        before = model.encode_images(pixels)
        model.make_room()
        assert torch.equal(model.encode_images(pixels), before)


def test_text_encoders_that_learn_stay(tiny_base):
    """A backward pass reads them again."""
    with FileLender(tiny_base).borrow() as model:
        model.hold("unet", "text_encoders")
        model.make_room()
        assert not any(weight.is_meta for weight in model.text_encoders[0].parameters())
        assert model.vae.encoder.conv_in.weight.is_meta


def test_parts_that_must_stay_and_do_not_fit_together_are_a_sentence(tiny_base, monkeypatch):
    memory = Memory(monkeypatch)
    with FileLender(tiny_base).borrow() as model:
        unet = sum(weight.numel() * weight.element_size() for weight in model.unet.parameters())
        text = sum(weight.numel() * weight.element_size() for weight in model.text_encoders[0].parameters())
        model.make_room()
        memory.capacity = unet + text - 1
        with pytest.raises(UserError, match="memory does not suffice"):
            model.hold("unet", "text_encoders")
