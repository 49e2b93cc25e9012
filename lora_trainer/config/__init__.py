"""The settings of a run: ``schema`` names them, ``parse`` reads and checks them, ``docs`` explains them."""

from lora_trainer.config.docs import field_docs
from lora_trainer.config.effects import never_reached, unused_by, without_effect
from lora_trainer.config.foreign import Translation, read_text
from lora_trainer.config.parse import (
    from_mapping,
    load,
    parse_folder,
    parse_resolution,
    read_file,
    to_mapping,
    with_folder,
)
from lora_trainer.config.problems import Problems
from lora_trainer.config.prompts import PreviewPrompt, has_trigger, parse_prompt, with_trigger
from lora_trainer.config.schema import FACTS, TrainConfig, settings_where
from lora_trainer.config.yaml_text import parse_yaml, to_yaml

__all__ = [
    "FACTS",
    "PreviewPrompt",
    "Problems",
    "TrainConfig",
    "Translation",
    "field_docs",
    "from_mapping",
    "has_trigger",
    "load",
    "never_reached",
    "parse_folder",
    "parse_prompt",
    "parse_resolution",
    "parse_yaml",
    "read_file",
    "read_text",
    "settings_where",
    "to_mapping",
    "to_yaml",
    "unused_by",
    "with_folder",
    "with_trigger",
    "without_effect",
]
