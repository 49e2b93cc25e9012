from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from lora_trainer.adapters.export import save_lora
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.metadata import RunFacts, build_metadata, network_module
from lora_trainer.models.families import get_family
from tests.adapters.layers import settings, unet_targets

KOHYA = {
    "output_name", "base_model_version", "v2", "network_module", "network_dim", "network_alpha", "network_args",
    "training_started_at", "training_finished_at", "learning_rate", "unet_lr", "text_encoder_lr", "num_train_images",
    "num_epochs", "epoch", "steps", "max_train_steps", "optimizer", "lr_scheduler", "mixed_precision", "seed",
    "clip_skip", "resolution", "bucket_info", "tag_frequency", "dataset_dirs", "sd_model_name", "sd_model_hash",
    "new_sd_model_hash", "vae_name", "min_snr_gamma", "noise_offset", "gradient_accumulation_steps",
    "batch_size_per_device",
}  # fmt: skip
MODELSPEC = {
    "sai_model_spec", "architecture", "title", "resolution", "date", "prediction_type", "trigger_phrase", "thumbnail",
    "tags", "implementation",
}  # fmt: skip
FACTS = {
    "prediction_type": "epsilon",
    "model_name": "base",
    "resolution": (512, 768),
    "started_at": 1790000000.25,
    "finished_at": 1790000900.5,
    "epoch": 2,
    "step": 40,
    "total_epochs": 3,
    "total_steps": 60,
    "num_train_images": 20,
    "num_batches_per_epoch": 20,
    "tag_frequency": {"1_cat": {"猫": 3}},
    "dataset_dirs": {"1_cat": {"n_repeats": 1, "img_count": 20}},
    "bucket_info": {"buckets": {"0": {"resolution": [512, 768], "count": 20}}},
}


def build(config=None, family="sd1", **facts):
    facts = {**FACTS, **facts}
    base = get_family(family).lora_metadata(facts["prediction_type"], None)
    return build_metadata(config or settings(output_name="mine"), RunFacts(base=base, **facts))


def test_every_entry_of_the_recipe_is_there_as_text():
    """The lists of the requirements, name by name."""
    metadata = build(settings(output_name="mine", trigger_word="sks"), thumbnail="data:image/png;base64,", tags=["a"])
    assert metadata.keys() >= {f"ss_{name}" for name in KOHYA} | {f"modelspec.{name}" for name in MODELSPEC}
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_resolution"] == "(512, 768)" and metadata["modelspec.resolution"] == "512x768"
    assert metadata["ss_text_encoder_lr"] == "None" and metadata["modelspec.trigger_phrase"] == "sks"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", metadata["modelspec.date"])
    for name in ("network_args", "bucket_info", "tag_frequency", "dataset_dirs"):
        assert isinstance(json.loads(metadata[f"ss_{name}"]), dict)
    assert json.loads(metadata["ss_tag_frequency"]) == {"1_cat": {"猫": 3}}


@pytest.mark.parametrize(
    ("family", "prediction", "version", "v2", "architecture", "short"),
    [
        ("sd1", "epsilon", "sd_v1", "False", "stable-diffusion-v1/lora", "epsilon"),
        ("sd1", "v_prediction", "sd_v1_v", "False", "stable-diffusion-v1/lora", "v"),
        ("sd2", "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora", "epsilon"),
        ("sd2", "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "epsilon"),
    ],
)
def test_versions(family, prediction, version, v2, architecture, short):
    metadata = build(family=family, prediction_type=prediction)
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == (version, v2)
    assert (metadata["modelspec.architecture"], metadata["modelspec.prediction_type"]) == (architecture, short)


@pytest.mark.parametrize(
    ("values", "module", "expected"),
    [
        ({}, "networks.lora", {}),
        ({"conv_rank": 4, "conv_alpha": 2.0}, "networks.lora", {"conv_dim": "4", "conv_alpha": "2.0"}),
        ({"dora": True}, "lycoris.kohya", {"algo": "lora", "dora_wd": "True"}),
        ({"adapter": "loha"}, "lycoris.kohya", {"algo": "loha"}),
        ({"adapter": "lokr", "lokr_factor": 8}, "lycoris.kohya", {"algo": "lokr", "factor": "8"}),
        ({"block_ranks": [1] * 25}, "networks.lora", {"block_dims": ",".join("1" * 25)}),
        ({"block_lr_weights": [0.5] * 25}, "networks.lora", {"mid_lr_weight": "0.5"}),
    ],
)
def test_network(values, module, expected):
    config = settings(**values)
    metadata = build(config)
    assert network_module(config) == metadata["ss_network_module"] == module
    assert expected.items() <= json.loads(metadata["ss_network_args"]).items()


def test_base_model_hashes(tmp_path):
    path: Path = tmp_path / "base.safetensors"
    path.write_bytes(bytes(range(256)) * 5000)
    metadata = build(model_path=path, model_hash="ab" * 32)
    assert metadata["ss_sd_model_hash"] == hashlib.sha256(path.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert (metadata["ss_new_sd_model_hash"], metadata["ss_sd_model_name"]) == ("ab" * 32, "base.safetensors")


def test_the_models_hash_does_not_depend_on_metadata(tmp_path):
    adapters = AdapterSet.build(unet_targets(), settings())
    first = save_lora(adapters, tmp_path / "a.safetensors", build())
    second = save_lora(adapters, tmp_path / "b.safetensors", build(step=41))
    assert first["sshs_model_hash"] == second["sshs_model_hash"] and first["ss_steps"] != second["ss_steps"]
