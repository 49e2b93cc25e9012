"""What a LoRA file is, for ``info`` and for a results page."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.adapters.lora_file import LoraFile, ModuleWeights, read_lora
from lora_trainer.files import sha256_file

_PARTS = (
    (("lora_unet", "unet."), "unet"),
    (("lora_te2", "text_encoder_2."), "text_encoder_2"),
    (("lora_te", "text_encoder."), "text_encoder"),
)


@dataclass(frozen=True)
class LoraDescription:
    """kinds: "lora", "loha", "lokr", "dora" … ranks and alphas: value -> number of layers (rank None: no rank).

    problems: what is wrong with it, in sentences; empty for a LoRA that does something.
    """

    path: Path
    size_bytes: int
    sha256: str
    kinds: tuple[str, ...]
    modules: dict[str, int]
    ranks: dict[int | None, int]
    alphas: dict[float | None, int]
    dtypes: tuple[str, ...]
    name: str | None
    base_version: str | None
    base_model: str | None
    base_precision: str | None  # that it was quantized to for the training
    trigger: str | None
    steps: int | None
    epochs: int | None
    network_module: str | None
    model_hash: str | None
    problems: tuple[str, ...]


def describe(path: str | Path) -> LoraDescription:
    """Read a LoRA and say what it is. Raises UserError as ``read_lora`` does."""
    lora = read_lora(path)
    modules = lora.modules.values()
    meta = lora.metadata
    precision = meta.get("ss_base_precision", "stored")
    kinds = {module.kind for module in modules} | {"dora" for module in modules if module.dora_scale is not None}
    return LoraDescription(
        path=lora.path,
        size_bytes=lora.path.stat().st_size,
        sha256=sha256_file(lora.path),
        kinds=tuple(sorted(kinds)),
        modules=dict(Counter(_part(name) for name in lora.modules)),
        ranks=dict(Counter(module.rank for module in modules)),
        alphas=dict(Counter(module.alpha for module in modules)),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for m in modules for t in m.tensors.values()})),
        name=meta.get("ss_output_name"),
        base_version=meta.get("ss_base_model_version"),
        base_model=meta.get("ss_sd_model_name"),
        base_precision=None if precision == "stored" else precision,
        trigger=meta.get("modelspec.trigger_phrase") or _most_frequent_tag(meta),
        steps=_number(meta.get("ss_steps")),
        epochs=_number(meta.get("ss_epoch")),
        network_module=meta.get("ss_network_module"),
        model_hash=meta.get("sshs_model_hash"),
        problems=tuple(_problems(lora)),
    )


def _problems(lora: LoraFile) -> list[str]:
    problems = []
    if broken := [module.name for module in lora.modules.values() if not module.is_finite()]:
        problems.append(f"{len(broken)} layers hold values that are not numbers ({broken[0]}): pictures will be black.")
    neutral: dict[str, list[bool]] = {}
    for module in lora.modules.values():
        neutral.setdefault(_part(module.name), []).append(_is_zero(module))
    if all(all(flags) for flags in neutral.values()):
        problems.append("This LoRA changes nothing: all its layers are zero.")
    else:
        zero = (part for part, flags in neutral.items() if all(flags))
        problems += [f"Its {part} layers are all zero and change nothing." for part in zero]
    return problems + lora.left_out()


def _is_zero(module: ModuleWeights) -> bool:
    """Whether a product of the factors is zero because one of them is; DoRA's magnitudes change a layer even then."""
    if module.dora_scale is not None:
        return False
    return module.alpha == 0 or any(not bool(tensor.float().any()) for tensor in module.tensors.values())


def _part(name: str) -> str:
    return next((part for prefixes, part in _PARTS if name.startswith(prefixes)), "unet")


def _most_frequent_tag(metadata: dict[str, str]) -> str | None:
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag.strip(): int(count) for tag, count in tags.items()})
    except (ValueError, AttributeError, TypeError):
        return None  # written by another program, in a form of its own
    if not counts:
        return None
    tag, count = counts.most_common(1)[0]
    return None if count == 1 and len(counts) > 1 else tag  # captions that are all different have no trigger word


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None
