"""What is known of pictures that were looked at before.

Measuring one decodes it to its end. An estimate follows every change of a setting, and that of a thousand pictures must
not decode a thousand pictures each time.
"""

from __future__ import annotations

import threading
from pathlib import Path

from lora_trainer.errors import UserError

MAX_PICTURES = 50_000
"""So many are remembered, the newest; about 300 bytes each."""

Facts = tuple[tuple[int, int], str]
_known: dict[tuple[int, int, int, int], Facts | UserError] = {}
_lock = threading.Lock()


def measure(path: Path) -> Facts:
    """``dataset.images.measure``, once for each version of a file, wherever it is moved; raises what that does."""
    from lora_trainer.dataset.images import measure as look

    try:
        facts = path.stat()
    except OSError:
        return look(path)  # says what is wrong
    key = facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size
    found = _known.get(key)
    if found is None:
        try:
            found = look(path)
        except UserError as error:
            found = error
        with _lock:
            while len(_known) >= MAX_PICTURES:
                del _known[next(iter(_known))]
            _known[key] = found
    if isinstance(found, UserError):
        raise UserError(found.message, field=found.field, remedy=found.remedy)
    return found
