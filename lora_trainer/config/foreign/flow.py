"""What other trainers' settings of FLUX.1, Chroma and Stable Diffusion 3 have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lora_trainer.config.foreign.report import Reading, is_on, number

FLUX, CHROMA, SD3 = "flux", "chroma", "sd3"
BLOCKS = {FLUX: 57, CHROMA: 57}
"""Of Stable Diffusion 3 there are models with 24 and with 38."""

NO_MASK = "prompts are read without a mask, as the WebUIs read them"
LENGTH = "prompts are filled up to 256 tokens, as in the WebUIs"
GUIDANCE = "FLUX.1 dev is told of guidance 1"
NO_T5 = "T5 does not learn"
ALIKE = "all noise levels weigh alike"


def set_levels(
    reading: Reading, theirs: str, word: str, *, normal: bool, shift: float, by: str, reason: str = ""
) -> None:
    """``sigma_sampling`` where σ is drawn evenly or (normal) as 1/(1+e^-n) of a normal n, and shifted by ``shift``.

    theirs, word: the setting that says how, and its value. by: the one that says ``shift``. reason: why that is not
    quite what is done here.
    """
    sampling = "shift" if shift != 1 else "logit_normal" if normal else "uniform"
    if shift != 1:
        reading.set(by, "sigma_shift", shift)
        reason = reason or ("" if normal else "even noise levels are not shifted; those of sigma_sampling: shift are")
    if reason:
        reading.translation.settings["sigma_sampling"] = sampling
        reading.unmet(theirs, word, reason)
    else:
        reading.set(theirs, "sigma_sampling", sampling)


def set_offload(reading: Reading, theirs: str, blocks: int | Literal["auto"]) -> None:
    """blocks: auto where theirs does not say how many, or where the number of all of them is not known."""
    if not is_on(reading.translation.settings.get("gradient_checkpointing")):
        reading.unmet(theirs, reading.left.get(theirs), "offload_blocks needs gradient_checkpointing")
    elif blocks:
        reading.left.pop(theirs, None)
        reading.set(theirs, "offload_blocks", blocks)


def unless(reading: Reading, names: Mapping[str, str], usual: Any) -> None:
    """Settings that are as here where they are ``usual``; the others cannot be honored, each with its reason."""
    for name, reason in names.items():
        if name not in reading.left:
            continue
        value = reading.left[name]
        if value is None or value == "" or number(value) == usual:
            reading.ignore(name)
        else:
            reading.unmet(name, value, reason)
