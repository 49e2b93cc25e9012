"""Forward passes on a pretended GPU for which the CPU does not wait."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.devices import to_device
from lora_trainer.models.checkpoint import FileLender
from tests import chroma, flux, sd3
from tests.devices import pretended_gpu

BASES = {"flux": flux.tiny_flux, "chroma": chroma.tiny_chroma, "sd3": sd3.tiny_sd3}


@pytest.mark.parametrize("family", BASES)
def test_the_cpu_does_not_wait_for_a_forward_pass(family, tmp_path):
    base = BASES[family](tmp_path)
    with pretended_gpu() as gpu:
        lender = FileLender(
            base["base_model"], "cuda:0", vae=base.get("vae"), text_encoders=base.get("text_encoders", ())
        )
        with lender.borrow() as model, torch.no_grad():
            conditioning = model.encode_prompts(["a red circle"])
            latents, sigmas = (to_device(one, model.device) for one in (torch.ones(1, 16, 4, 4), torch.tensor([0.4])))
            gpu.waits.clear()
            model.predict(latents, sigmas, conditioning, None)
            assert gpu.waits == []
