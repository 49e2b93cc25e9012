"""Models without a WebUI."""

from __future__ import annotations

from safetensors.torch import load_file

from lora_trainer.host.base import LenderOptions
from lora_trainer.host.standalone import StandaloneHost
from tests import flux, gguf


def test_a_gguf_is_listed_and_lent(tmp_path):
    base = flux.tiny_flux(tmp_path / "parts")
    weights = load_file(base["base_model"])
    (tmp_path / "models").mkdir()
    stored = {name: gguf.stored_as_published(name, tensor) for name, tensor in weights.items()}
    gguf.write(tmp_path / "models" / "flux.gguf", stored)
    host = StandaloneHost(tmp_path / "data", checkpoints=tmp_path / "models")
    (listed,) = host.checkpoints()
    options = LenderOptions(vae=base["vae"], text_encoders=tuple(base["text_encoders"]))
    info = host.lender(listed.title, options).describe()
    assert (listed.title, info.family) == ("flux.gguf", "flux")
