"""What stands on the host's settings page under "LoRA trainer"; the host's script makes its kind of option of it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_trainer.host.options import FOLDERS_OPTION, LANGUAGE_OPTION, NAMES_OPTION
from lora_trainer.jobs.execution import HOLD_OPTION, RECOMMENDED_OPTION, RESUME_OPTION, WAIT_OPTION
from lora_trainer.planning.presets import PRESETS

# These three are read by the page: javascript/lora_trainer_main.js, _form.js and _live.js.
KIND_OPTION = "lora_trainer_kind"
DEFAULTS_OPTION = "lora_trainer_defaults"
NOTIFY_OPTION = "lora_trainer_notify"


@dataclass(frozen=True)
class SettingOption:
    """key: its name in the host's options. choices: of a radio, each (what is read, what is kept), as gradio takes
    them; lines: height of a text. Without either it is a checkbox."""

    key: str
    default: bool | str
    label: str
    choices: tuple[tuple[str, str], ...] = ()
    lines: int = 0


OPTIONS = (
    SettingOption(
        KIND_OPTION,
        "character",
        "Kind that a new training begins with",
        choices=tuple((preset.title, kind) for kind, preset in PRESETS.items()),
    ),
    SettingOption(
        DEFAULTS_OPTION,
        "",
        "Settings that every new training begins with, as YAML (one a line, such as optimizer: prodigy)",
        lines=3,
    ),
    SettingOption(NOTIFY_OPTION, True, "Tell by a browser notification when a training is over"),
    SettingOption(
        HOLD_OPTION, False, "Keep the model for the whole training (faster; no pictures can be made meanwhile)"
    ),
    SettingOption(
        WAIT_OPTION,
        False,
        "A base model chosen during a training is loaded when the training is over (instead of pausing it)",
    ),
    SettingOption(
        RESUME_OPTION,
        False,
        "A training that was cut off, because the WebUI ended or crashed, goes on by itself when it starts again",
    ),
    SettingOption(
        RECOMMENDED_OPTION,
        True,
        "Of a training with held-out pictures, the recommended step comes into the Lora tab (instead of the last)",
    ),
    SettingOption(
        FOLDERS_OPTION,
        "",
        "Folders of this computer that may be trained on when the WebUI can be reached from others (one a line)",
        lines=3,
    ),
    SettingOption(
        LANGUAGE_OPTION,
        "",
        "Folders with language models to be trained (one a line; empty: models/LLM)",
        lines=2,
    ),
    SettingOption(
        NAMES_OPTION,
        "",
        "Names under which a proxy makes this WebUI known, when it has no login and no --listen (one a line)",
        lines=2,
    ),
)
"""Every option, in the order in which the page shows them."""
