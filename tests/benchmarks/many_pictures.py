"""What many pictures cost before the first step, without a model: CPU seconds, megabytes read, bytes a picture.

    python -m tests.benchmarks.many_pictures 1000 10000

scan: reading the folder, where every tenth picture is excluded. cached: whether the cache has every picture, at the
next start of a run. The pictures and what the cache holds of them are small, so that bytes read say what is read.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.cache import TensorCache, cache_key
from lora_trainer.dataset.folder import scan
from lora_trainer.dataset.picture_edits import PictureEdit, save_edits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=int, nargs="+", help="numbers of pictures")
    print("| pictures | what | CPU s | MB read | bytes a picture |\n|---|---|---|---|---|")
    for count in parser.parse_args().counts:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), count)


def measure(folder: Path, count: int) -> None:
    data, cache = folder / "data", folder / "cache"
    data.mkdir()
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    names = [f"{number:06}.png" for number in range(count)]
    for number, name in enumerate(names):
        (data / name).write_bytes(file.getvalue() + number.to_bytes(4, "big"))  # another picture each
        (data / name).with_suffix(".txt").write_text(f"a red square, number {number}")
    save_edits(data, {name: PictureEdit(excluded=True) for name in names[::10]})
    config = TrainConfig(train_data_dir=str(data), output_dir=str(folder / "out"))
    row(count, "scan", lambda: scan(config))

    keys = [cache_key(kind="benchmark", number=number) for number in range(count)]
    first = TensorCache(cache, user=data)
    for key in keys:
        first.put(key, {"moments": torch.zeros(8, 8, 8)})
    time.sleep(2.1)  # younger files are read
    row(count, "cached", lambda: all(map(TensorCache(cache, user=data).__contains__, keys)))


def row(count: int, what: str, work: Callable[[], Any]) -> None:
    read, started = _bytes_read(), time.process_time()
    work()
    seconds, read = time.process_time() - started, _bytes_read() - read
    tracemalloc.start()
    kept = work()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept
    print(f"| {count:,} | {what} | {seconds:.2f} | {read / 1e6:.1f} | {size / count:.0f} |", flush=True)


def _bytes_read() -> int:
    """By this process, from the disk's cache as well; 0 where the system does not tell."""
    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return 0
    return int(counts["rchar"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
