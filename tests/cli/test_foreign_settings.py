"""Other trainers' files on the command line: each trains the demo's base, or becomes a YAML file of ours."""

from __future__ import annotations

import pytest
import yaml

from lora_trainer.adapters.describe import describe
from lora_trainer.cli import main
from lora_trainer.demo.base import build_base
from tests import flux as tiny
from tests.config import foreign_presets as presets
from tests.pictures import draw_dataset

WRITERS = {
    "from_gui": (presets.kohya_gui, "json"),
    "from_toml": (presets.sd_scripts, "toml"),
    "from_toolkit": (presets.ai_toolkit, "yaml"),
    "from_onetrainer": (presets.onetrainer, "json"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_another_trainer_trains_as_it_stands(name, tmp_path, base, capsys):
    writer, ending = WRITERS[name]
    path = tmp_path / f"settings.{ending}"
    path.write_text(writer(base, draw_dataset(tmp_path / "data"), tmp_path / "out"), encoding="utf-8")
    assert main(["train", "--config", str(path), "max_train_steps=1", "device=cpu", "preview_prompts=[]"]) == 0
    told = capsys.readouterr().err
    assert "Taken (" in told and "Mean nothing here" in told
    assert "lora_rank: 4" in told
    (made,) = tmp_path.glob(f"out/**/{name}.safetensors")
    assert set(describe(made).ranks) <= {4, 2} and 4 in describe(made).ranks


def test_a_dataset_config_of_three_folders_trains_them_all(tmp_path, base, capsys):
    first, second = draw_dataset(tmp_path / "a", 2), draw_dataset(tmp_path / "b", 3, caption=lambda index: None)
    text = presets.dataset_config(first, second, draw_dataset(tmp_path / "reg", 1))
    (tmp_path / "data.toml").write_text(text, encoding="utf-8")
    arguments = [f"base_model={base}", f"output_dir={tmp_path / 'out'}", "max_train_steps=1", "device=cpu"]
    assert main(["train", "--config", str(tmp_path / "data.toml"), *arguments]) == 0
    metadata = describe(next(tmp_path.glob("out/out.safetensors")))
    assert metadata.problems == ()


def test_convert_config_writes_a_file_that_means_the_same(tmp_path, capsys):
    from lora_trainer.config import load

    source, target = tmp_path / "preset.json", tmp_path / "run.yaml"
    source.write_text(presets.kohya_gui("base.safetensors", "data", "out", color_aug=True), encoding="utf-8")
    assert main(["convert-config", str(source), str(target)]) == 0
    report = capsys.readouterr().out
    assert "network_dim -> lora_rank: 4" in report and "color_aug" in report and "xformers" in report
    assert load(target) == load(source)
    written = target.read_text(encoding="utf-8")
    assert "# Cannot be honored here (1):" in written and "conv_rank" not in yaml.safe_load(written)
    assert main(["convert-config", str(source), str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_toml_of_flux_train_network_trains_as_it_stands(tmp_path):
    files = tiny.tiny_flux(tmp_path / "base")
    clip_l, t5xxl = files["text_encoders"]
    (tmp_path / "flux.toml").write_text(f"""
pretrained_model_name_or_path = '{files["base_model"]}'
ae = '{files["vae"]}'
clip_l = '{clip_l}'
t5xxl = '{t5xxl}'
train_data_dir = '{draw_dataset(tmp_path / "data", 1)}'
output_dir = '{tmp_path / "out"}'
output_name = "from_flux"
resolution = "64,64"
network_module = "networks.lora_flux"
network_dim = 2
network_args = ["train_blocks=single"]
network_train_unet_only = true
timestep_sampling = "flux_shift"
model_prediction_type = "raw"
guidance_scale = 1.0
gradient_checkpointing = true
blocks_to_swap = 2
fp8_base = true
max_train_steps = 1
mixed_precision = "no"
""", encoding="utf-8")  # fmt: skip
    assert main(["train", "--config", str(tmp_path / "flux.toml"), "device=cpu"]) == 0
    described = describe(next(tmp_path.glob("out/from_flux.safetensors")))
    assert described.modules == {"unet": 6} and described.base_precision == "fp8", "three layers of two single blocks"
