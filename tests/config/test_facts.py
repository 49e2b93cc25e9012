"""What the package knows of each setting besides its type: which decide, which are paths, which fill memory."""

from __future__ import annotations

import dataclasses

import pytest

from lora_trainer.config import FACTS, TrainConfig, settings_where
from lora_trainer.config.names import is_text, types
from lora_trainer.config.schema import Facts
from lora_trainer.errors import ConfigError
from lora_trainer.host.base import AccessPolicy
from lora_trainer.workspace.paths import confine_config

LISTS = {"more_folders", "plugins", "text_encoders"}
WORDS = {"device", "resolution", "caption_extension", "trigger_word", "default_caption", "secondary_separator",
         "output_name", "system_prompt", "original_prompt", "target_prompt", "positive_prompt", "negative_prompt",
         "pair_suffix", "description"}  # fmt: skip


def test_every_setting_has_its_facts():
    for field in dataclasses.fields(TrainConfig):
        assert isinstance(field.metadata.get("facts"), Facts), f"{field.name} is not made by setting()"
    assert set(FACTS) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_every_text_is_a_path_or_known_to_be_none():
    paths = set(settings_where(lambda facts: facts.path is not None))
    assert paths | WORDS == {name for name in FACTS if is_text(name)} | LISTS and not paths & WORDS


@pytest.mark.parametrize("name", settings_where(lambda facts: facts.path is not None and facts.given_by != "job"))
def test_no_path_escapes_the_folders_that_a_caller_may_name(name, tmp_path):
    value = ["/etc/hostname"] if types()[name] == list[str] else "/etc/hostname"
    config = dataclasses.replace(TrainConfig(), **{name: value})
    with pytest.raises(ConfigError) as caught:
        confine_config(config, tmp_path, AccessPolicy(roots=(tmp_path,)))
    assert [problem.field for problem in caught.value.problems] == [name]


def test_what_names_a_place_or_concerns_the_files_does_not_decide():
    """A run goes on from its state when these change, so the list is looked at by hand."""
    assert set(settings_where(lambda facts: not facts.decides)) == {
        "base_model", "vae", "device", "train_data_dir", "more_folders", "mask_dir", "default_caption", "metadata_path",
        "reg_data_dir", "caption_extension",
        "caption_mapping", "cache_dir", "init_lora", "output_dir", "output_name", "overwrite", "save_steps",
        "save_epochs", "keep_checkpoints", "save_precision", "export_diffusers", "merge_into_base", "resume",
        "preview_prompts", "preview_steps", "description", "tensorboard", "gradient_checkpointing", "plugins",
        "offload_blocks", "shard_base", "channels_last",
        "cuda_graphs", "compile", "exact", "gpus", "task", "text_encoders", "trust_remote_code", "copied_lora",
        "opposite_dir",
        "validation_steps", "early_stopping", "early_stopping_patience",
    }  # fmt: skip
    assert not [name for name, facts in FACTS.items() if facts.path and facts.decides]
