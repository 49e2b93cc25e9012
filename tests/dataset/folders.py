"""What the tests of folders and their captions share: making files, and reading the folder they make."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.folder import scan


def picture(path: Path, size: tuple[int, int] = (32, 24), color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, "PNG")
    return path


def scan_folder(root: Path, **settings):
    return scan(TrainConfig(train_data_dir=str(root), output_dir=str(root.parent / "output"), **settings))


def captions(dataset) -> dict[str, str]:
    return {sample.key: sample.caption for sample in dataset.samples}


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path
