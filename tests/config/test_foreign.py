"""Other trainers' settings: what each of them becomes here, and that nothing is dropped without a word."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from lora_trainer.config import TrainConfig, from_mapping, load, read_text
from lora_trainer.errors import UserError
from tests.config import foreign_presets as presets

BASE, DATA, OUTPUT = Path("/models/base.safetensors"), Path("/data/discs"), Path("/out")


def read(text: str, folder: Path | None = None):
    """The checked configuration and the report."""
    settings, translation = read_text(text, folder=folder)
    assert translation is not None
    return from_mapping(settings), translation


def changed(config: TrainConfig) -> dict:
    """What differs from the defaults."""
    default = dataclasses.asdict(TrainConfig())
    return {name: value for name, value in dataclasses.asdict(config).items() if value != default[name]}


def unmet(translation) -> set[str]:
    return {one.theirs for one in translation.unmet}


def test_a_preset_of_kohyas_gui():
    config, report = read(presets.kohya_gui(BASE, DATA, OUTPUT))
    assert changed(config) == {
        "base_model": str(BASE), "train_data_dir": str(DATA), "output_dir": str(OUTPUT), "output_name": "from_gui",
        "resolution": "64", "min_bucket_resolution": 64, "max_bucket_resolution": 1024, "bucket_no_upscale": True,
        "caption_dropout": 0.1, "shuffle_tags": True, "max_token_length": 75, "mixed_precision": "no",
        "lora_rank": 4, "alpha": 2.0, "batch_size": 2, "epochs": 2, "learning_rate": 2e-4, "lr_warmup_ratio": 0.1,
        "lr_scheduler": "constant", "optimizer_args": {"weight_decay": 0.02, "betas": [0.9, 0.95]},
        "min_snr_gamma": None, "noise_offset": 0.05, "seed": 1234, "save_epochs": 1, "description": "from a preset",
    }  # fmt: skip
    assert unmet(report) == set()
    assert {"xformers", "cache_latents", "lowram", "max_data_loader_n_workers", "color_aug"} <= set(report.ignored)
    assert any("unet_lr (0.0002) counts" in note for note in report.notes)
    assert any("conv_dim is not active" in note for note in report.notes)
    assert "secret" not in report.to_text() + json.dumps(report.to_json())


@pytest.mark.parametrize(
    ("kind", "adapter", "conv"),
    [("Standard", "lora", 0), ("Kohya LoCon", "lora", 4), ("LyCORIS/LoHa", "loha", 4), ("LyCORIS/LoKr", "lokr", 4)],
)
def test_only_a_kind_that_has_convolutions_trains_them(kind, adapter, conv):
    config, _ = read(presets.kohya_gui(BASE, DATA, OUTPUT, LoRA_type=kind))
    assert (config.adapter, config.conv_rank) == (adapter, conv)
    assert config.conv_alpha == (2.0 if conv else None)


def test_of_a_gui_preset_what_cannot_be_honored_is_said_with_its_value():
    text = presets.kohya_gui(
        BASE, DATA, OUTPUT, LoRA_type="LyCORIS/iA3", color_aug=True, optimizer="DAdaptAdam", lr_scheduler="piecewise",
        caption_dropout_every_n_epochs=2, unheard_of=3, resume="/states/a",
    )  # fmt: skip
    config, report = read(text)
    expected = {"LoRA_type", "color_aug", "optimizer", "lr_scheduler", "caption_dropout_every_n_epochs",
                "unheard_of", "resume"}  # fmt: skip
    assert unmet(report) == expected
    assert config.optimizer == "prodigy" and config.adapter == "lora" and config.lr_scheduler == "constant"
    assert "DAdaptAdam" in report.to_text() and all(name in report.to_text() for name in expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"text_encoder_lr": 5e-5}, {"train_text_encoder": True, "text_encoder_lr": 5e-5, "learning_rate": 2e-4}),
        ({"text_encoder_lr": 0, "unet_lr": 0},
         {"train_text_encoder": True, "text_encoder_lr": 3e-4, "learning_rate": 3e-4}),
        ({"text_encoder_lr": 1e-5, "unet_lr": 0}, {"train_text_encoder": True, "target_modules": []}),
        ({"max_train_steps": 500}, {"max_train_steps": 500}),
        ({"max_train_steps": 500, "max_train_epochs": 4}, {"max_train_steps": None, "epochs": 4}),
        ({"additional_parameters": "--zero_terminal_snr --min_snr_gamma 5"},
         {"zero_terminal_snr": True, "min_snr_gamma": 5.0}),
        ({"network_alpha": 0}, {"alpha": None}),
        ({"max_timestep": 500, "min_timestep": 100}, {"max_timestep": 499, "min_timestep": 100}),
        ({"sample_prompts": "a disc --w 64\nanother, one --n ugly"},
         {"preview_prompts": ["a disc --w 64", "another, one --n ugly"]}),
        ({"down_lr_weight": ",".join(["0.5"] * 12)}, {"block_lr_weights": [0.5] * 12 + [1.0] * 13}),
    ],
)  # fmt: skip
def test_values_of_the_gui_mean_what_they_mean_there(given, expected):
    config, report = read(presets.kohya_gui(BASE, DATA, OUTPUT, **given))
    assert {name: getattr(config, name) for name in expected} == expected
    assert not report.unmet


def test_a_toml_of_sd_scripts():
    config, report = read(presets.sd_scripts(BASE, DATA, OUTPUT))
    assert changed(config) == {
        "base_model": str(BASE), "train_data_dir": str(DATA), "output_dir": str(OUTPUT), "output_name": "from_toml",
        "resolution": "64", "shuffle_tags": True, "lora_rank": 4, "alpha": 1.0, "conv_rank": 2, "conv_alpha": 1.0,
        "rank_dropout": 0.1, "max_train_steps": 3, "learning_rate": 2e-4, "train_text_encoder": True,
        "text_encoder_lr": 5e-5, "lr_scheduler": "cosine_with_restarts", "lr_cycles": 2, "lr_warmup_ratio": 0.25,
        "optimizer_args": {"weight_decay": 0.1, "betas": [0.9, 0.99]}, "mixed_precision": "no",
        "save_precision": "fp32", "min_snr_gamma": None, "enable_bucket": False, "max_token_length": 75,
    }  # fmt: skip
    assert unmet(report) == {"face_crop_aug_range"}
    assert {"xformers", "lowram", "max_data_loader_n_workers", "cache_latents"} <= set(report.ignored)
    assert any("enable_bucket is not given" in note for note in report.notes)


def test_what_is_not_given_is_what_sd_scripts_takes():
    config, _ = read(f'pretrained_model_name_or_path = "{BASE}"\nnetwork_module = "networks.lora"\n')
    assert (config.lora_rank, config.alpha, config.lr_scheduler, config.min_snr_gamma) == (4, 1.0, "constant", None)
    assert config.max_train_steps == 1600 and config.train_text_encoder


def test_lycoris_without_conv_dim_trains_the_convolutions_with_the_same_rank():
    text = 'network_module = "lycoris.kohya"\nnetwork_dim = 8\nnetwork_args = [{}]\n'
    assert read(text.format('"algo=loha"'))[0].conv_rank == 8
    assert read(text.format('"algo=loha", "preset=attn-mlp"'))[0].conv_rank == 0


def test_a_dataset_config_with_subsets(tmp_path):
    config, report = read(presets.dataset_config(Path("/a"), Path("/b"), Path("/reg")))
    assert changed(config) == {
        "train_data_dir": "/a", "repeats": 2, "more_folders": ["3_a disc=/b"], "reg_data_dir": "/reg",
        "resolution": "64", "batch_size": 2, "shuffle_tags": True, "keep_tokens": 1, "max_bucket_resolution": 1024,
    }  # fmt: skip
    assert not report.unmet
    (tmp_path / "data.toml").write_text(presets.dataset_config(Path("/a"), Path("/b"), Path("/reg")))
    config, _ = read(presets.sd_scripts(BASE, DATA, OUTPUT, 'dataset_config = "data.toml"'), folder=tmp_path)
    assert config.train_data_dir == "/a" and config.learning_rate == 2e-4 and config.batch_size == 2


def test_a_page_reads_no_file_of_the_server():
    with pytest.raises(UserError, match="only what is pasted"):
        read(presets.sd_scripts(BASE, DATA, OUTPUT, 'dataset_config = "/etc/passwd"'))


def test_subsets_that_differ_in_what_is_one_for_all_are_told():
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='/a'\nkeep_tokens=1\n[[datasets.subsets]]\nimage_dir='/b'\n"
    assert any("keep_tokens differs" in note for note in read(text)[1].notes)


def test_a_job_of_ai_toolkit():
    config, report = read(presets.ai_toolkit(BASE, DATA, OUTPUT))
    assert changed(config) == {
        "base_model": str(BASE), "train_data_dir": str(DATA), "output_dir": "/out/from_toolkit",
        "output_name": "from_toolkit", "device": "cpu", "trigger_word": "zwx", "lora_rank": 4, "alpha": 2.0,
        "save_steps": 100, "keep_checkpoints": 2, "caption_dropout": 0.05, "resolution": "64", "flip": True,
        "repeats": 2, "batch_size": 2, "max_train_steps": 3, "optimizer_args": {"weight_decay": 0.03},
        "mixed_precision": "no", "ema_decay": 0.9, "min_snr_gamma": None, "lr_scheduler": "constant",
        "preview_steps": 100,
        "preview_prompts": ["[trigger], red --w 64 --h 64 --s 2 --l 4 --d 7 --n blurry"],
    }  # fmt: skip
    assert unmet(report) == {"train.content_or_style"}
    assert {"train.noise_scheduler", "datasets.cache_latents_to_disk", "meta"} <= set(report.ignored)


def test_several_datasets_and_sizes_of_ai_toolkit():
    values = yaml.safe_load(presets.ai_toolkit(BASE, DATA, OUTPUT))
    process = values["config"]["process"][0]
    process["datasets"] += [{"folder_path": "/b", "num_repeats": 3}, {"folder_path": "/reg", "is_reg": True}]
    process["datasets"][0]["resolution"] = [512, 768, 640]
    config, report = read(yaml.safe_dump(values))
    assert config.more_folders == ["3_=/b"] and config.reg_data_dir == "/reg" and config.resolution == "768"
    assert any("largest of 512, 768, 640" in note for note in report.notes)


def test_a_whole_model_is_not_trained_in_a_loras_place():
    values = yaml.safe_load(presets.ai_toolkit(BASE, DATA, OUTPUT))
    del values["config"]["process"][0]["network"]
    with pytest.raises(UserError, match="not a LoRA"):
        read(yaml.safe_dump(values))
    with pytest.raises(UserError, match="FINE_TUNE"):
        read(presets.onetrainer(BASE, DATA, OUTPUT, training_method="FINE_TUNE"))


def test_a_configuration_of_onetrainer():
    config, report = read(presets.onetrainer(BASE, DATA, OUTPUT))
    assert changed(config) == {
        "base_model": str(BASE), "train_data_dir": str(DATA), "output_dir": "/out/from_onetrainer",
        "output_name": "from_onetrainer", "tensorboard": False, "device": "cpu", "mixed_precision": "no",
        "gradient_checkpointing": True, "resolution": "64", "repeats": 2, "flip": True, "shuffle_tags": True,
        "keep_tokens": 2, "lora_rank": 4, "alpha": 2.0, "epochs": 1, "batch_size": 2, "learning_rate": 2e-4,
        "lr_warmup_ratio": 0.1, "min_snr_gamma": 4.0, "noise_offset": 0.02, "save_epochs": 1,
        "conv_rank": 4, "conv_alpha": 2.0,
        "optimizer_args": {"weight_decay": 0.01, "eps": 1e-8, "betas": [0.9, 0.98]},
    }  # fmt: skip
    assert unmet(report) == {"timestep_distribution", "concepts.image.enable_random_hue"}
    assert {"attention_mechanism", "latent_caching", "secrets"} <= set(report.ignored)
    assert "secret" not in report.to_text().replace("secrets", "")


def test_a_flat_preset_of_an_earlier_onetrainer(tmp_path):
    (tmp_path / "concepts.json").write_text(json.dumps([{"path": "/a", "repeats": 3.0}, {"path": "/b"}]))
    flat = {
        "training_method": "LORA", "base_model_name": str(BASE), "concept_file_name": "concepts.json",
        "train_text_encoder": True, "text_encoder_learning_rate": 1e-4, "train_unet": True, "learning_rate": 3e-4,
        "unet_learning_rate": 3e-4, "optimizer": "PRODIGY", "weight_decay": 0.05, "learning_rate_scheduler": "REX",
        "text_encoder_layer_skip": 1, "max_noising_strength": 0.5, "train_dtype": "BFLOAT_16", "resolution": 512,
    }  # fmt: skip
    config, report = read(json.dumps(flat), folder=tmp_path)
    assert (config.train_data_dir, config.repeats, config.more_folders) == ("/a", 3, ["1_=/b"])
    assert (config.train_text_encoder, config.text_encoder_lr, config.clip_skip) == (True, 1e-4, 2)
    assert (config.optimizer, config.optimizer_args, config.max_timestep) == ("prodigy", {"weight_decay": 0.05}, 499)
    assert unmet(report) == {"learning_rate_scheduler"} and config.epochs == 100 and config.lr_warmup_steps == 200


def test_our_own_settings_are_ours_in_every_format(tmp_path):
    for name, text in {
        "a.yaml": "base_model: b\nlora_rank: 8\n",
        "a.json": '{"base_model": "b", "lora_rank": 8}',
        "a.toml": 'base_model = "b"\nlora_rank = 8\n',
    }.items():
        (tmp_path / name).write_text(text)
        assert read_text(text)[1] is None, name
        assert load(tmp_path / name, ["network_dim=2"]).lora_rank == 2


def test_a_yaml_of_ours_may_keep_what_means_nothing_here():
    settings, report = read_text("base_model: b\nepochs: 3\nxformers: true\nunet_lr: 2e-4\nlearning_rate: 1e-4\n")
    config = from_mapping(settings)
    assert (config.learning_rate, config.epochs, config.alpha) == (2e-4, 3, None)
    assert report.ignored == ["xformers"] and "counts" in report.notes[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"min_snr_gamma": 0, "save_steps": 0, "max_train_steps": "0", "alpha": 0, "ema_decay": 0.0},
         {"min_snr_gamma": None, "save_steps": None, "max_train_steps": None, "alpha": None, "ema_decay": None}),
        ({"max_timestep": 1000}, {"max_timestep": 1000}),
        ({"lr_scheduler": "constant_with_warmup", "loss": "l2"}, {"lr_scheduler": "constant", "loss": "mse"}),
        ({"text_encoder_lr": 0}, {"text_encoder_lr": 0.0}),
    ],
)  # fmt: skip
def test_zero_for_off_and_other_words_in_our_own_file(values, expected):
    config = from_mapping(values)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": ', "JSON"), ("a = \n", "TOML"), ("a: [", "YAML")],
)
def test_a_broken_file_is_named_by_its_format(text, message):
    with pytest.raises(UserError, match=message):
        read_text(text)

@pytest.mark.parametrize(
    ("text", "written"),
    [
        (r'train_data_dir: "D:\new\tom"', r"'D:\new\tom'"),
        (r'train_data_dir: "D:\data"', r"'D:\data'"),
        (r'base_model: "..\models\new.safetensors"', r"'..\models\new.safetensors'"),
        (r'vae: "\\server\new\a"', r"'\\server\new\a'"),
        (r'train_data_dir = "D:\new\tom"', r"'D:\new\tom'"),
        (r'more_folders: ["10_dog=a", "D:\new\tom"]', r"'D:\new\tom'"),
        (r'config: {process: [{datasets: [{folder_path: "D:\new\tom"}]}]}', r"'D:\new\tom'"),
        ('{"train_data_dir": "D:\\new"}', '"D:/new"'),
    ],
)
def test_a_windows_path_in_double_quotes_is_told_with_the_remedy(text, written):
    with pytest.raises(UserError, match="double quotes") as caught:
        read_text(text)
    assert written in caught.value.remedy and "line 1" in caught.value.message


@pytest.mark.parametrize(
    "text", [r"train_data_dir: D:\new\tom", r"train_data_dir: 'D:\new\tom'", r'train_data_dir: "D:\\new\\tom"',
             r'{"train_data_dir": "D:\\new\\tom"}', r"train_data_dir = 'D:\new\tom'" "\nlora_rank = 8",
             r"""train_data_dir: '"D:\new\tom"'""", 'description: "one\\ntwo"\ntrain_data_dir: D:\\new\\tom',
             '# "D:\\new"\ntrain_data_dir: D:\\new\\tom'],
)  # fmt: skip
def test_a_windows_path_written_well_is_read(text):
    assert from_mapping(read_text(text)[0]).train_data_dir == r"D:\new\tom"


def test_settings_in_quotes_mean_what_they_mean_without():
    config = from_mapping({
        "epochs": "3", "flip": "true", "target_modules": "[to_q, to_v]", "block_ranks": str([4] * 25), "vae": '"v.pt"',
        "optimizer_args": "{weight_decay: 1e-2}", "learning_rate": "1e-3",
    })  # fmt: skip
    assert (config.epochs, config.flip, config.target_modules, config.vae) == (3, True, ["to_q", "to_v"], "v.pt")
    assert config.block_ranks == [4] * 25 and config.optimizer_args == {"weight_decay": 0.01}
    text = "weight_decay=0.1 betas=0.9,0.99"
    for arguments in (text.split(), text, f"'{text}'"):
        assert from_mapping({"optimizer_args": arguments}).optimizer_args == {"weight_decay": 0.1, "betas": [0.9, 0.99]}
