from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_trainer.host.a1111.host import A1111Host
from lora_trainer.host.base import LenderOptions
from lora_trainer.host.forge.host import ForgeHost
from lora_trainer.host.standalone import StandaloneHost
from lora_trainer.models.checkpoint import FileLender
from tests.host.a1111.fake import FakeA1111
from tests.host.forge.fake import FakeForge
from tests.tiny import tiny_sd1, tiny_sdxl

OPTIONS = LenderOptions()
SMALL = {"mult": (1, 1), "depths": (1, 0), "layers": 2}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with two checkpoints of one layout and one of another."""
    folder = tmp_path_factory.mktemp("models")
    tiny_sd1(folder / "first.safetensors", seed=1, **SMALL)
    tiny_sd1(folder / "second.safetensors", seed=2, **SMALL)
    tiny_sdxl(folder / "third.safetensors", seed=3, mult=(1, 1), depths=(0, 1), layers=2)
    return folder


@pytest.fixture(scope="session")
def layers(models) -> dict[str, str]:
    """Name in a LoRA file -> module in the checkpoint, of all three."""
    found = {}
    for path in models.glob("*.safetensors"):
        with FileLender(path).borrow() as model:
            found |= {t.kohya_name: t.checkpoint_name for t in model.lora_targets() if t.checkpoint_name}
    return found


@pytest.fixture
def lora(models, tmp_path) -> Path:
    """A LoRA for the first checkpoint that changes what it draws."""
    return make_lora(models / "first.safetensors", tmp_path / "source.safetensors", 0.1)


def make_lora(base: Path, path: Path, strength: float, seed: int = 0, base_name: str = "") -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with FileLender(base).borrow() as model:
        for target in model.lora_targets():
            if target.part != "unet" or target.module.weight.dim() not in (2, 4) or "attn1" not in target.kohya_name:
                continue
            rows, columns = target.module.weight.shape[:2]
            tensors[f"{target.kohya_name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) * strength
            tensors[f"{target.kohya_name}.lora_down.weight"] = torch.randn(2, columns, generator=generator)
            tensors[f"{target.kohya_name}.alpha"] = torch.tensor(2.0)
    metadata = {"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora"}
    save_file(tensors, path, metadata | {"ss_sd_model_name": base_name or base.name})
    return path


@pytest.fixture
def webui(models, layers, tmp_path, monkeypatch) -> FakeA1111:
    fake = FakeA1111(tmp_path / "webui", sorted(models.glob("*.safetensors")), layers)
    monkeypatch.setitem(sys.modules, "networks", fake.networks)
    return fake


@pytest.fixture
def a1111(webui) -> A1111Host:
    return A1111Host(webui)


@pytest.fixture
def fake_forge(models, layers, tmp_path, monkeypatch) -> FakeForge:
    fake = FakeForge(tmp_path / "webui", sorted(models.glob("*.safetensors")), layers)
    monkeypatch.setitem(sys.modules, "networks", fake.networks)
    return fake


@pytest.fixture
def forge(fake_forge) -> ForgeHost:
    return ForgeHost(fake_forge)


@pytest.fixture(params=["a1111", "forge", "standalone"])
def host(request, models, tmp_path):
    """Every implementation, with the same three checkpoints in its list."""
    if request.param != "standalone":
        return request.getfixturevalue(request.param)
    return StandaloneHost(tmp_path / "data", checkpoints=models, lora=tmp_path / "loras", device="cpu")


def sha(webui: FakeA1111) -> str:
    """Of every tensor of the fake's model, with its number format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(webui.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def storages(tensors) -> set[int]:
    """Where their memory is: two tensors of one storage are not copies of each other."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
