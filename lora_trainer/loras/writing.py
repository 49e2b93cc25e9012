"""Writing the LoRA that a tool made: kohya's layout, and metadata that stays true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from lora_trainer.adapters.export import DTYPES, save_lora
from lora_trainer.adapters.lora_file import LoraFile
from lora_trainer.adapters.merge import check_output
from lora_trainer.errors import UserError
from lora_trainer.loras.layers import Factors
from lora_trainer.run.outputs import RUN_ENTRY

_OF_THE_NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")


def check_precision(precision: str | None) -> None:
    """Raises UserError for a number format that LoRAs are not saved in."""
    if precision is not None and precision not in DTYPES:
        raise UserError(f"{precision!r} is no number format.", field="precision", remedy=f"Use {', '.join(DTYPES)}.")


def precision_of(lora: LoraFile) -> str:
    """The number format in which most of a file's tensors are stored."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    formats = (tensor.dtype for module in lora.modules.values() for tensor in module.tensors.values())
    counts = Counter(names.get(dtype, "fp16") for dtype in formats)
    return counts.most_common(1)[0][0]


def write_factors(
    layers: Mapping[str, Factors],
    output: Path,
    *,
    without_alpha: Collection[str],
    sources: Sequence[Path],
    metadata: Mapping[str, str],
    comment: str,
    precision: str,
    overwrite: bool,
) -> dict[str, str]:
    """Write factors by kohya name as a LoRA; alpha is each layer's rank. Returns the metadata as written.

    without_alpha: names of layers that get none (``holds_no_alpha``).
    metadata: of the LoRA that it was made from; what it says of the network is replaced, and that it was written by a
    run is not said any more. comment: what was done, added to the training comment.

    Raises:
        UserError: ``output`` cannot be written, exists and ``overwrite`` is not set, or is one of ``sources``.
    """
    check_output(output, sources, overwrite)
    tensors = {}
    for name, factors in layers.items():
        tensors[f"{name}.lora_down.weight"] = factors.down.contiguous()
        tensors[f"{name}.lora_up.weight"] = factors.up.contiguous()
        if name not in without_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(float(factors.rank))
    return save_lora(tensors, output, _metadata(layers, metadata, comment), precision)


def _metadata(layers: Mapping[str, Factors], metadata: Mapping[str, str], comment: str) -> dict[str, str]:
    kept = {name: value for name, value in metadata.items() if name not in (*_OF_THE_NETWORK, RUN_ENTRY)}
    earlier = kept.get("ss_training_comment", "None")
    kept["ss_training_comment"] = comment if earlier in ("", "None") else f"{earlier}; {comment}"
    ranks = {factors.rank for factors in layers.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"  # kohya's word for ranks that differ
    return {**kept, "ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
