"""A data set's captions in another format, beside what is there."""

from __future__ import annotations

from dataclasses import dataclass

from lora_trainer.dataset.writing import CaptionFolder, Written
from lora_trainer.errors import UserError

FORMATS = ("csv", "jsonl", "txt", "caption")


@dataclass(frozen=True)
class Exported:
    """note: a sentence on which of several files counts from now on, empty when there is nothing to know."""

    written: Written
    note: str = ""


def export_captions(folder: CaptionFolder, kind: str) -> Exported:
    """Write every caption as metadata.csv, metadata.jsonl, or a text file beside each picture. Files that hold other
    captions already are backed up; nothing is removed.

    Raises:
        UserError: there is no such format, no caption, or a file cannot be written.
    """
    if kind not in FORMATS:
        raise UserError(f"There is no format {kind!r}.", field="format", remedy=f"One of {', '.join(FORMATS)}.")
    current = folder.read()
    captions = {key: source.text for key, source in current.sources.items()}
    if not captions:
        raise UserError("There are no captions to export.", remedy="Describe the pictures first.")
    output = folder.root / f"metadata.{kind}" if kind in ("csv", "jsonl") else f".{kind}"
    target = CaptionFolder(folder.root, None, folder.caption_extension, output=output, confined=folder.confined)
    written = target.write(captions)
    tables = sorted(path.name for path in {source.path for source in folder.read().sources.values()
                                           if source.kind == "metadata"})  # fmt: skip
    note = ""
    if kind in ("txt", "caption") and tables:
        note = f"{', '.join(tables)} still counts before the text files; remove it if they are to count."
    elif kind == "jsonl" and (folder.root / "metadata.csv").exists():
        note = "metadata.csv still counts before metadata.jsonl; remove it if the new one is to count."
    elif kind == "csv" and any(source.kind == "file" for source in current.sources.values()):
        note = "metadata.csv counts before the text files from now on."
    return Exported(written, note)
