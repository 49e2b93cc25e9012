"""The settings of what a run writes and measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_trainer.config.facts import setting


@dataclass(frozen=True)
class OutputSettings:
    output_dir: str = setting("./output", decides=False, path="write", given_by="job")
    """Folder of the results: the LoRA, logs, states, this configuration."""

    output_name: str = setting("", decides=False, given_by="steps")
    """Name of the LoRA, as it will stand in <lora:name:0.8>; empty for the last part of output_dir."""

    overwrite: bool = setting(False, decides=False)
    """Replace a LoRA of this name if there is one."""

    save_steps: int | None = setting(None, minimum=1, decides=False)
    """Save the LoRA and the training state every so many steps."""

    save_epochs: int | None = setting(None, minimum=1, decides=False)
    """Save the LoRA and the training state every so many epochs."""

    keep_checkpoints: int | None = setting(None, minimum=1, decides=False)
    """How many of the LoRAs saved on the way to keep; empty keeps all."""

    save_precision: Literal["fp16", "bf16", "fp32"] = setting("fp16", decides=False)
    """Number format of the saved LoRA."""

    export_diffusers: bool = setting(True, task="image", decides=False)
    """Also write pytorch_lora_weights.safetensors, in diffusers' layout."""

    merge_into_base: str | None = setting(None, decides=False, path="write")
    """Also write the base model with the LoRA merged in, to this path."""

    resume: str = setting("auto", decides=False, path="read", words=("auto", "never"))
    """auto continues an interrupted run with the same settings; never starts anew; a path continues from that
    state."""

    validation_share: float = setting(0.0, minimum=0, maximum=0.5)
    """Share of your pictures, or rows, that is not trained, at least two of them, to measure learning; 0 trains all."""

    validation_steps: int | None = setting(None, minimum=1, decides=False)
    """Measure every so many steps; empty measures as often as takes at most 5 % of the time, first and last in any
    case."""

    early_stopping: Literal["off", "advise", "stop"] = setting("advise", decides=False)
    """What to do when what is held out is learned no better any more: nothing, say so, or stop and save."""

    early_stopping_patience: int = setting(3, minimum=1, maximum=1000, decides=False)
    """So many measurements in a row without a better one mean that it gets no better."""

    preview_prompts: list[str] = setting([], task="image", decides=False, separator="\n")  # a prompt has commas
    """Prompts of the pictures that are drawn during training; --w 768 --h 512 --s 30 --l 6 --d 1 --n blurry behind one
    give width, height, steps, guidance, seed and a negative prompt."""

    preview_steps: int | None = setting(None, task="image", minimum=1, decides=False)
    """Draw the previews every so many steps; empty draws them whenever the LoRA is saved."""

    description: str = setting("", task="image", decides=False)
    """A sentence about the LoRA for its card and its metadata."""

    tensorboard: bool | None = setting(None, decides=False)
    """Write curves for TensorBoard under logs/; empty does it if tensorboard is installed."""
