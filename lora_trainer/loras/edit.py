"""Other metadata for a finished LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_trainer.adapters.merge import check_output
from lora_trainer.adapters.tensor_file import kohya_hashes, open_tensors, serialize, specs_of
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_write

TRIGGER, TITLE, DESCRIPTION = "modelspec.trigger_phrase", "modelspec.title", "modelspec.description"
_HASHES = ("sshs_model_hash", "sshs_legacy_hash")


def edit_metadata(
    lora: str | Path,
    output: str | Path,
    *,
    set: Mapping[str, str] | None = None,
    remove: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, str]:
    """Write a LoRA with other metadata; the tensors are the same bytes. Returns the metadata as written.

    set: entries to add or replace. remove: names of entries to drop. kohya's hashes are computed anew: the WebUIs know
    the file by the first of them, which depends on the tensors alone.

    Raises:
        UserError: an entry to remove is not there, one of the hashes is to be set, or the files cannot be read or
            written.
    """
    lora, output, wanted = Path(lora), Path(output), dict(set or {})
    check_output(output, (lora,), overwrite)
    for name in (*wanted, *remove):
        if name in _HASHES or not name.strip():
            raise UserError(f"{name!r} cannot be set.", field="metadata", remedy="It is computed from the file.")
    with open_tensors(lora) as handle:
        metadata = dict(handle.metadata() or {})
        if absent := [name for name in remove if name not in metadata]:
            raise UserError(
                f"{lora.name} has no entry {absent[0]}.", field="metadata", remedy="`info --json` lists them."
            )
        tensors = {spec.name: handle.get_tensor(spec.name) for spec in specs_of(handle, lora)}
        entries = {**metadata, **wanted}
        entries = {name: value for name, value in entries.items() if name not in (*remove, *_HASHES)}
        complete = {**entries, **kohya_hashes(tensors, entries)}
        atomic_write(output, serialize(tensors, complete))
    return complete
