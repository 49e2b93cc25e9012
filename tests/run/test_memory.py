"""Whole runs where memory is short: on the pretended GPU, whose memory ends, and with captions of unequal length."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lora_trainer.config import from_mapping
from lora_trainer.run import file_lender, train
from lora_trainer.training.callbacks import TrainCallbacks
from lora_trainer.training.objectives.diffusion import DiffusionObjective
from tests.devices import assert_alike, pretended_gpu
from tests.pictures import draw_dataset


class Warnings(TrainCallbacks):
    def __init__(self):
        self.texts = []

    def on_warning(self, text):
        self.texts.append(text)


@pytest.fixture
def settings(tmp_path, tiny_base):
    return {
        "train_data_dir": str(draw_dataset(tmp_path / "pictures", 4, lambda index: (64, 64))),
        "base_model": str(tiny_base),
        "output_name": "disc",
        "resolution": 64,
        "lora_rank": 2,
        "batch_size": 4,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "dropout": 0.2,
        "rank_dropout": 0.2,
        "save_precision": "fp32",
        "tensorboard": False,
        "export_diffusers": False,
        "mixed_precision": "no",
    }


def run(settings, folder, **changes):
    config, callbacks = from_mapping({**settings, "output_dir": str(folder), **changes}), Warnings()
    lora = load_file(str(train(config, file_lender(config), callbacks=callbacks).lora))
    return lora, callbacks.texts


def test_a_gpu_that_holds_one_picture_trains_on_four(settings, tmp_path):
    pictures = draw_dataset(tmp_path / "larger", 4, lambda index: (192, 192))
    settings |= {"train_data_dir": str(pictures), "resolution": 192, "cache_dir": str(tmp_path / "cache"),
                 "max_train_steps": 1}  # fmt: skip
    plenty, warnings = run(settings, tmp_path / "plenty", device="cpu")
    assert not warnings
    peaks = {}
    for size in (1, 4):  # all is encoded by now, which took more memory than a step
        with pretended_gpu() as gpu:
            run(settings, tmp_path / f"peak{size}", batch_size=size)
        peaks[size] = gpu.peak
    assert peaks[1] * 1.2 < peaks[4], peaks
    with pretended_gpu(memory=int(peaks[1] * 1.1)) as gpu:
        short, warnings = run(settings, tmp_path / "short")
    assert gpu.peak <= peaks[1] * 1.1
    assert any("at once" in text for text in warnings), warnings
    assert_alike(short, plenty)


@pytest.mark.parametrize("changes", [
    {"train_text_encoder": True}, {"shuffle_tags": True}, {"train_text_encoder": True, "gradient_checkpointing": True},
    {},
], ids=["trained", "varying", "checkpointed", "cached"])  # fmt: skip
def test_captions_of_unequal_length_are_padded_as_in_the_whole_batch(settings, tmp_path, monkeypatch, changes):
    """One caption takes two chunks of 75 tokens, the others one: alone they would be encoded shorter."""
    (tmp_path / "pictures" / "disc 00.txt").write_text(", ".join(f"red star {index}" for index in range(30)))
    expected, warnings = run(settings, tmp_path / "plenty", **changes)
    assert not warnings
    loss, sizes = DiffusionObjective.loss, []

    def fits_two(objective, inputs):
        sizes.append(len(inputs.latents))
        if len(inputs.latents) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return loss(objective, inputs)

    monkeypatch.setattr(DiffusionObjective, "loss", fits_two)
    lora, warnings = run(settings, tmp_path / "short", **changes)
    # the trial finds what fits, and it and the three steps are done in halves
    assert sizes == [4, 4] + [2] * 8 and len(warnings) == 2
    for name, value in lora.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5)
