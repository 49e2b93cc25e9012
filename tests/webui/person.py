"""A person at the page: counts clicks, takes the time and, where LORA_TRAINER_SHOTS names a folder, pictures."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_DROP = """(files) => {
    const transfer = new DataTransfer();
    for (const [name, data] of files) {
        transfer.items.add(new File([Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))], name));
    }
    const drop = new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
    loraTrainer.get("drop").dispatchEvent(drop);
}"""


def shot(page: Any, name: str, **options: Any) -> None:
    """A screenshot for people to look at, where they asked for some."""
    if folder := os.environ.get("LORA_TRAINER_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder, f"{name}.png"), **options)


def drop(page: Any, paths: Iterable[Path]) -> None:
    """Drop files onto step 1, as from the desktop."""
    page.evaluate(_DROP, [[path.name, base64.b64encode(path.read_bytes()).decode()] for path in sorted(paths)])


class Walk:
    """One way through the page. ``station`` prints what it took since the one before."""

    def __init__(self, page: Any, name: str):
        self.page, self.name, self.clicks, self.total, self.stations = page, name, 0, 0, 0
        self.begun = self.last = time.monotonic()

    def click(self, selector: str) -> None:
        self.clicks += 1
        self.total += 1
        self.page.click(selector)

    def station(self, name: str) -> None:
        now = time.monotonic()
        print(f"{name}: {self.clicks} clicks, {now - self.last:.1f} s ({self.total} and {now - self.begun:.1f} in all)")
        self.stations += 1
        shot(self.page, f"{self.name}-{self.stations:02}-{name.replace(' ', '-')}", full_page=True)
        self.clicks, self.last = 0, time.monotonic()
