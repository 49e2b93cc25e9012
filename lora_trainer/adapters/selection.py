"""Which layers learn: from the words of ``target_modules`` to the model's layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from lora_trainer.adapters.base import Target
from lora_trainer.errors import UserError
from lora_trainer.patterns import Budget, Pattern

GROUPS = ("attention", "feed_forward", "projection")
CONV_GROUPS = ("conv", "conv_linear")
_UNET_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_TEXT_ENCODER_NAMES = {diffusers: clip for clip, diffusers in _UNET_NAMES.items()}


def select_targets(
    targets: Sequence[Target],
    patterns: Sequence[str],
    conv_rank: int = 0,
    *,
    field: str = "target_modules",
) -> list[Target]:
    """The targets that ``patterns`` name, in the order of ``targets``, each once.

    A pattern is a group (attention, feed_forward, projection), a part of a layer's name between dots or underscores
    (``to_q``, ``ff.net``, ``attn2``, ``ff_net_0_proj``), one of CLIP's names for the UNet's layers (``q_proj``,
    ``k_proj``, ``v_proj``, ``out_proj``; the UNet's names work for text encoders in the same way), or a regular
    expression ``/…/`` that is searched in the layer's diffusers and kohya names.

    Names mean the layers of a transformer. The rest of the UNet (resnets, up- and downsamplers) joins when
    ``conv_rank`` is above 0, as in kohya's LoCon: all of it, or what patterns name that match nothing else.

    Raises:
        UserError: a pattern matches nothing (the nearest name is suggested), is no regular expression, or names 3×3
            convolutions while ``conv_rank`` is 0; or nothing at all is selected.
    """
    chosen: set[int] = set()
    problems: list[str] = []
    named_convs = False
    budget = Budget()
    for pattern in patterns:
        matches = _matches(pattern, targets, field, budget)
        transformer = [index for index in matches if targets[index].group not in CONV_GROUPS]
        if transformer:
            chosen.update(transformer)
        elif matches:
            trainable = [index for index in matches if conv_rank or targets[index].group != "conv"]
            if not trainable:
                problems.append(f"{pattern!r} names 3×3 convolutions, which learn only when conv_rank is above 0.")
            named_convs = True
            chosen.update(trainable)
        elif pattern.strip() not in GROUPS:
            problems.append(_unknown(pattern, targets))
    if problems:
        raise UserError(" ".join(problems), field=field)
    if conv_rank and not named_convs:
        chosen.update(index for index, target in enumerate(targets) if target.group in CONV_GROUPS)
    if not chosen:
        raise UserError("no layer would learn.", field=field, remedy=f"Name at least one group: {', '.join(GROUPS)}.")
    return [target for index, target in enumerate(targets) if index in chosen]


def _matches(pattern: str, targets: Sequence[Target], field: str, budget: Budget) -> list[int]:
    pattern = pattern.strip()
    if len(pattern) > 1 and pattern.startswith("/") and pattern.endswith("/"):
        expression = Pattern(pattern[1:-1], field=field, budget=budget)
        return [
            index
            for index, target in enumerate(targets)
            if expression.search(target.diffusers_name) or expression.search(target.kohya_name)
        ]
    if pattern in GROUPS or pattern in CONV_GROUPS:
        return [index for index, target in enumerate(targets) if target.group == pattern]
    return [index for index, target in enumerate(targets) if _names(pattern, target)]


def _names(pattern: str, target: Target) -> bool:
    """Whether ``pattern`` is a run of whole parts of the target's dotted or kohya name."""
    translate = _UNET_NAMES if target.part == "unet" else _TEXT_ENCODER_NAMES
    parts = [translate.get(part, part) for part in pattern.split(".") if part]
    if not parts:
        return False
    if f".{'.'.join(parts)}." in f".{target.diffusers_name}." or pattern in target.also_named:
        return True
    # One word alone is no kohya name: "to" would be a part of every to_q.
    kohya = "_".join(parts)
    return "_" in kohya and f"_{kohya}_" in f"_{target.kohya_name}_"


def _unknown(pattern: str, targets: Iterable[Target]) -> str:
    known = [*GROUPS, *_UNET_NAMES]
    for target in targets:
        parts = [part for part in target.diffusers_name.split(".") if not part.isdigit()]
        known.extend(part for part in [*parts, ".".join(parts[-2:])] if part not in known)
    nearest = difflib.get_close_matches(pattern.strip().lower(), known, n=1, cutoff=0.5)
    hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Groups are {', '.join(GROUPS)}; names such as to_q."
    return f"{pattern!r} names no layer of this model. {hint}"
