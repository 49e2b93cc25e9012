"""The settings of a run: ``schema`` names them, ``parse`` reads and checks them, ``docs`` explains them."""

from lora_trainer.config.docs import field_docs
from lora_trainer.config.parse import from_mapping, load, parse_resolution, to_mapping
from lora_trainer.config.schema import FACTS, TrainConfig, settings_where
from lora_trainer.config.yaml_text import parse_yaml, to_yaml

__all__ = [
    "FACTS",
    "TrainConfig",
    "field_docs",
    "from_mapping",
    "load",
    "parse_resolution",
    "parse_yaml",
    "settings_where",
    "to_mapping",
    "to_yaml",
]
