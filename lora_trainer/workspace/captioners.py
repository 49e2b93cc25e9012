"""Where captioners are found on a server: for the editor, for a training without captions, for its estimate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_trainer.captioning.registry import Sources
    from lora_trainer.host.base import Host


def captioner_sources(host: Host) -> Sources:
    """The host's own captioners, and ours with their weights in ``<data>/captioners/<name>/``."""
    from lora_trainer.captioning.registry import Sources

    return Sources(folders=[Path(host.folders().data) / "captioners"], host=host.captioners())
