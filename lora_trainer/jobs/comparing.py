"""What differs between the settings of two jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_trainer.config import FACTS, TrainConfig, parse_yaml, to_mapping
from lora_trainer.jobs.job import Job


@dataclass(frozen=True)
class Difference:
    """name: of the setting. one, other: its values."""

    name: str
    one: Any
    other: Any


def differences(one: Job, other: Job) -> list[Difference]:
    """The settings in which two jobs with their configurations differ, in the order of the form. A job of an earlier
    release has the default of what it does not name."""
    first, second = (to_mapping(TrainConfig()) | parse_yaml(job.effective_config or job.config) for job in (one, other))
    names = [name for name in FACTS if FACTS[name].given_by != "job" and name != "output_name"]
    names += sorted((first.keys() | second.keys()) - FACTS.keys())
    pairs = ((name, first.get(name), second.get(name)) for name in names)
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]
