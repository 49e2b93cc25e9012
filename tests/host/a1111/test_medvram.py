"""A1111 with --medvram, in the fake: one part of the model on the device at a time, and no copy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_trainer.host.a1111.residence import Residence
from tests.host.a1111.fake import named
from tests.host.conftest import OPTIONS, sha, storages
from tests.host.test_contract import answer


@pytest.fixture
def lender(a1111):
    return a1111.lender("", OPTIONS)


class Part(torch.nn.Module):
    """A part of a model on pretended devices."""

    def __init__(self):
        super().__init__()
        self.where = torch.device("cpu")

    def to(self, device):
        self.where = torch.device(device)
        return self


@torch.no_grad()
def test_with_medvram_one_part_at_a_time_is_on_the_device(lender, webui):
    cuda = torch.device("cuda")
    roots = {name: Part() for name in ("unet", "vae", "text_encoders")}

    def send_everything_to_cpu():
        if webui.lowvram.module_in_gpu is not None:
            webui.lowvram.module_in_gpu.to("cpu")
        webui.lowvram.module_in_gpu = None

    webui.lowvram.send_everything_to_cpu = send_everything_to_cpu
    webui.devices = SimpleNamespace(device=cuda, torch_gc=lambda: None)
    sd_model = SimpleNamespace(lowvram=True)
    host = SimpleNamespace(sd_model=sd_model, roots=roots, devices=lambda part: {roots[part].where})
    moved = []
    residence = Residence(webui, host, cuda, lambda part, is_here: moved.append((part, is_here)))
    residence.enter()
    unet, encoder = torch.nn.Identity(), torch.nn.Identity()
    vae = SimpleNamespace(encoder=SimpleNamespace(conv_in=torch.nn.Identity()), post_quant_conv=torch.nn.Identity())
    residence.attach(SimpleNamespace(unet=unet, vae=vae, text_encoders=[encoder]))
    places = lambda: [name for name, part in roots.items() if part.where == cuda]  # noqa: E731
    assert places() == []
    for module, part in ((vae.encoder.conv_in, "vae"), (encoder, "text_encoders"), (unet, "unet"), (unet, "unet")):
        module(torch.zeros(1))
        assert places() == [part]
        assert webui.lowvram.module_in_gpu is roots[part]
    assert moved[-1] == ("unet", True)
    residence.leave(somebody_waits=False)
    assert places() == ["unet"]
    residence.leave(somebody_waits=True)
    assert places() == []
    unet(torch.zeros(1))
    residence.give_back()
    assert places() == []
    unet(torch.zeros(1))
    assert places() == [], "no hook is left"


def test_with_medvram_weights_are_lent_without_a_copy(a1111, webui):
    webui.model.lowvram = True
    before = sha(webui)
    lender = a1111.lender("", OPTIONS)
    with lender.borrow() as model:
        with lender.turn():
            assert storages(model.bound().values()) <= storages(named(webui.model).values())
            assert torch.isfinite(answer(model)).all()
        webui.unload()
        with lender.turn():
            assert storages(model.bound().values()) <= storages(named(webui.model).values())
    assert sha(webui) == before
