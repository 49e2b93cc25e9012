"""What stands on the host's settings page under "LoRA trainer"; the host's script makes its kind of option of it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_trainer.jobs.execution import HOLD_OPTION, WAIT_OPTION
from lora_trainer.jobs.presets import PRESETS

KIND_OPTION = "lora_trainer_kind"
DEFAULTS_OPTION = "lora_trainer_defaults"
NOTIFY_OPTION = "lora_trainer_notify"
"""The last three are read by the page (``javascript/lora_trainer_form.js``, ``lora_trainer_live.js``)."""


@dataclass(frozen=True)
class SettingOption:
    """key: its name in the host's options. choices: of a radio; None lets the default's type decide
    (checkbox, text). lines: height of a text."""

    key: str
    default: bool | str
    label: str
    explanation: str
    choices: tuple[str, ...] | None = None
    lines: int = 1


def options() -> tuple[SettingOption, ...]:
    """Every option, in the order in which the page shows them."""
    return (
        SettingOption(
            KIND_OPTION, "character", "Kind that a new training begins with", "", choices=tuple(PRESETS)
        ),
        SettingOption(
            DEFAULTS_OPTION,
            "",
            "Settings that every new training begins with",
            "as YAML, one a line, such as optimizer: prodigy; they go before what the kind suggests",
            lines=4,
        ),
        SettingOption(
            HOLD_OPTION,
            False,
            "Keep the model to the training until it is over",
            "faster, but nothing can be generated meanwhile",
        ),
        SettingOption(
            WAIT_OPTION,
            False,
            "Switching the checkpoint waits for the training",
            "otherwise the training pauses until its checkpoint is back",
        ),
        SettingOption(NOTIFY_OPTION, True, "Tell by a browser notification when a training is over", ""),
    )
