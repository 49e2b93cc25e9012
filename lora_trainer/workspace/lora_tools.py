"""Tools on the LoRAs of the host's folder: one at a time, in a thread of its own. Each makes a new LoRA there."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.errors import UserError
from lora_trainer.files import atomic_path
from lora_trainer.workspace.paths import check_name
from lora_trainer.workspace.tasks import Task

if TYPE_CHECKING:
    from PIL import Image

    from lora_trainer.host.base import Card, Host

CONVERTED = "converted"
"""Folder in the data folder for the layouts that a WebUI does not read."""

Made = Mapping[str, Any]


class LoraTools:
    """LoRAs are named by their paths inside the host's LoRA folder, base models by their titles in the host's list: no
    other file is read. Nothing is overwritten."""

    def __init__(self, data: Path, current_host: Callable[[], Host]):
        """current_host: asked each time, as "Reload UI" exchanges the host."""
        self._data, self._current_host = Path(data), current_host
        self._lock = threading.Lock()
        self.task: Task | None = None

    # -- what there is

    def loras(self) -> dict[str, Path]:
        """The .safetensors files of the host's LoRA folder by their names."""
        from lora_trainer.host.publishing import loras_on_disk

        folder = self._current_host().folders().lora
        if folder is None or not Path(folder).is_dir():
            return {}
        paths = (path for path in loras_on_disk(Path(folder)) if path.suffix.lower() == ".safetensors")
        return {path.relative_to(folder).as_posix(): path for path in paths}

    def converted(self) -> dict[str, Path]:
        """The files that ``convert`` has made in layouts of other programs, by their names."""
        folder = self._data / CONVERTED
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        return {path.name: path for path in found if path.is_file() and not path.name.startswith(".")}

    def metadata(self, lora: str) -> dict[str, str]:
        """Raises UserError when there is no such LoRA, or it cannot be read."""
        from lora_trainer.adapters.tensor_file import open_tensors

        with open_tensors(self._lora(lora, "lora")) as handle:
            return dict(handle.metadata() or {})

    # -- what can be done

    def resize(self, lora: str, output: str, *, base: str | None = None, **size: Any) -> Task:
        """See ``loras.resize``; ``base`` is a title. All tools raise UserError at once for what can be known before."""
        from lora_trainer.loras.resize import check_size, resize
        from lora_trainer.loras.writing import check_precision

        path, known, turn = self._lora(lora, "lora"), self._base(base), self._current_host().device_turn
        check_size(size.get("rank"), size.get("share"))
        check_precision(size.get("precision"))

        def make(file: Path, task: Task) -> Made:
            done = resize(path, file, base=known, turn=turn, **size)
            return {"layers": done.layers, "ranks": done.ranks, "kept": done.kept, "left_out": list(done.unmatched)}

        return self._start("resize", output, make, lambda file: self._card(file, path))

    def combine(
        self, loras: Sequence[tuple[str, float]], output: str, *, base: str | None = None, **size: Any
    ) -> Task:
        """See ``loras.combine``. The card prefers the weight 1, at which it does what all of them do."""
        from lora_trainer.loras.combine import combine
        from lora_trainer.loras.writing import check_precision

        parts = [(self._lora(name, "loras"), strength) for name, strength in loras]
        known, turn = self._base(base), self._current_host().device_turn
        check_precision(size.get("precision"))

        def make(file: Path, task: Task) -> Made:
            done = combine(parts, file, base=known, turn=turn, **size)
            return {"layers": done.layers, "ranks": done.ranks, "left_out": list(done.unmatched)}

        def card(file: Path) -> Card:
            words = [word for path, _ in parts if (word := self._card(path, path).activation_text)]
            return self._card(file, None, activation_text=", ".join(dict.fromkeys(words)), preferred_weight=1.0)

        return self._start("combine", output, make, card)

    def extract(self, base: str, tuned: str, output: str, **size: Any) -> Task:
        """See ``loras.extract``. Both are titles of the host's list."""
        from lora_trainer.loras.extract import extract
        from lora_trainer.loras.resize import check_size

        one, other, turn = self._base(base), self._base(tuned, "tuned"), self._current_host().device_turn
        if one is None or other is None or one == other:
            raise UserError("Two base models are needed.", field="tuned", remedy="Choose another one for each.")
        check_size(size["rank"], size.get("share"))

        def make(file: Path, task: Task) -> Made:
            done = extract(one, other, file, on_progress=task.progress, turn=turn, **size)
            return {"layers": done.layers, "ranks": done.ranks, "kept": done.kept, "equal": done.equal}

        return self._start("extract", output, make, lambda file: self._card(file, None, preferred_weight=1.0))

    def convert(
        self, lora: str, output: str, layout: str, *, base: str | None = None, precision: str | None = None
    ) -> Task:
        """See ``loras.convert``. kohya's layout goes into the LoRA folder; what a WebUI does not read can be
        downloaded, PEFT's folder as a .zip."""
        from lora_trainer.loras.convert import LAYOUTS, convert
        from lora_trainer.loras.writing import check_precision

        path, known, turn = self._lora(lora, "lora"), self._base(base), self._current_host().device_turn
        if layout not in LAYOUTS:
            raise UserError(f"{layout!r} is no layout.", field="layout", remedy=f"Use {', '.join(LAYOUTS)}.")
        check_precision(precision)

        def make(file: Path, task: Task) -> Made:
            target = file.with_suffix("") if layout == "peft" else file
            layers, left_out = convert(path, target, layout, base=known, precision=precision, turn=turn)
            return {"layers": layers, "left_out": left_out}

        if layout == "kohya":
            return self._start("convert", output, make, lambda file: self._card(file, path))
        end = ".zip" if layout == "peft" else ".safetensors"
        target = self._data / CONVERTED / f"{check_name(output, 'output_name')}{end}"

        def refuse() -> None:
            if target.exists():
                raise UserError(f"There is a file {target.name} already.", field="output_name", remedy=_ANOTHER)

        def keep(file: Path) -> Made:
            refuse()
            with tempfile.TemporaryDirectory(dir=file.parent) as folder, atomic_path(target) as temporary:
                if layout == "peft":
                    file = Path(shutil.make_archive(str(Path(folder) / "peft"), "zip", file.with_suffix("")))
                shutil.copyfile(file, temporary)
            return {"file": target.name}

        return self._run("convert", make, keep, refuse)

    def edit(
        self,
        lora: str,
        output: str,
        *,
        entries: Mapping[str, str | None],
        set: Mapping[str, str],
        remove: Sequence[str] = (),
    ) -> Task:
        """See ``loras.edit``. entries: ``trigger``, ``title``, ``description``; None leaves one as it is. The card of
        the new LoRA has the trigger and the description."""
        from lora_trainer.loras.edit import DESCRIPTION, TITLE, TRIGGER, edit_metadata
        from lora_trainer.run.outputs import RUN_ENTRY, run_of

        path = self._lora(lora, "lora")
        names = {"trigger": TRIGGER, "title": TITLE, "description": DESCRIPTION}
        given = {name: value for name, value in entries.items() if value is not None}
        wanted = {**set, **{names[name]: value for name, value in given.items()}}
        if not wanted and not remove:
            raise UserError("Nothing is to be changed.", field="trigger", remedy="Change one of its entries.")
        gone = [*remove, *([RUN_ENTRY] if run_of(path) and RUN_ENTRY not in remove else [])]

        def make(file: Path, task: Task) -> Made:
            metadata = edit_metadata(path, file, set=wanted, remove=gone)
            return {"metadata": {name: metadata[name] for name in wanted}}

        def card(file: Path) -> Card:
            words = {"activation_text": given.get("trigger"), "description": given.get("description")}
            return self._card(file, path, **{name: value for name, value in words.items() if value is not None})

        return self._start("edit", output, make, card)

    def strength(self, lora: str, *, base: str | None = None) -> Task:
        """See ``loras.strength``: ``blocks`` of the result."""
        from lora_trainer.loras.strength import strength_by_block

        path, known, turn = self._lora(lora, "lora"), self._base(base), self._current_host().device_turn

        def work(file: Path, task: Task) -> Made:
            blocks = strength_by_block(path, known, turn)
            return {"lora": lora, "blocks": [{"name": name, "strength": one} for name, one in blocks.items()]}

        return self._run("strength", work, lambda file: {}, lambda: None)

    # -- how it is done

    def _start(
        self, kind: str, output: str, make: Callable[[Path, Task], Made], card: Callable[[Path], Card]
    ) -> Task:
        """Make a LoRA and put it into the host's folder under the name ``output``."""
        from lora_trainer.host.publishing import is_taken

        name, host = check_name(output, "output_name"), self._current_host()
        folder = host.folders().lora
        if folder is None:
            raise UserError("There is no LoRA folder to publish to.", remedy="Name one when the trainer is started.")

        def refuse() -> None:
            if is_taken(Path(folder), name):
                raise UserError(f"There is a LoRA {name} already.", field="output_name", remedy=_ANOTHER)

        def keep(file: Path) -> Made:
            refuse()
            host.publish(file, name, card(file))
            return {"published": name}

        return self._run(kind, make, keep, refuse)

    def _run(
        self,
        kind: str,
        make: Callable[[Path, Task], Made],
        keep: Callable[[Path], Made],
        refuse: Callable[[], None],
    ) -> Task:
        refuse()

        def work(task: Task) -> dict[str, Any]:
            self._data.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".tool-", dir=self._data) as folder:
                file = Path(folder) / "made.safetensors"
                return {**make(file, task), **keep(file)}

        with self._lock:
            if self.task is not None and self.task.active:
                raise UserError("Another LoRA is being worked on.", remedy="Wait for it, or cancel it.")
            task = self.task = Task(kind)
        threading.Thread(target=task.run, args=(work,), name=f"lora-trainer-{kind}", daemon=True).start()
        return task

    def _lora(self, name: str, field: str) -> Path:
        path = self.loras().get(name)
        if path is None:
            raise UserError("There is no such LoRA in the list.", field=field, remedy="Load the list again.")
        return path

    def _base(self, title: str | None, field: str = "base") -> Path | None:
        if not title:
            return None
        path = next((one.path for one in self._current_host().checkpoints() if one.title == title), None)
        if path is None:
            raise UserError("There is no such base model in the list.", field=field, remedy="Load the list again.")
        return path

    def _card(self, file: Path, source: Path | None, **given: Any) -> Card:
        """What the source's card says, and where that is silent, what is in the file."""
        from lora_trainer.adapters.tensor_file import open_tensors
        from lora_trainer.host.base import Card
        from lora_trainer.host.publishing import existing_card
        from lora_trainer.loras.edit import TRIGGER
        from lora_trainer.models.families import family_of_lora, find_family

        with open_tensors(file) as handle:
            metadata = handle.metadata() or {}
        family = find_family(family_of_lora(metadata))
        before = existing_card(source.with_suffix(".json")) if source else {}
        comment = metadata.get("ss_training_comment", "None")
        weight = before.get("preferred weight")
        values = {
            "activation_text": str(before.get("activation text") or metadata.get(TRIGGER, "")),
            "preferred_weight": weight if isinstance(weight, (int, float)) and weight else Card.preferred_weight,
            "description": str(before.get("description") or ""),
            "negative_text": str(before.get("negative text") or ""),
            "notes": "\n".join(filter(None, (str(before.get("notes") or ""), "" if comment == "None" else comment))),
            "sd_version": family.card_version if family else "",
            "thumbnail": _thumbnail(source) if source else None,
        }
        return Card(**{**values, **given})


_ANOTHER = "Choose another name."


def _thumbnail(lora: Path) -> Image.Image | None:
    from lora_trainer.dataset.images import open_image

    with suppress(UserError):
        picture = lora.with_name(f"{lora.stem}.preview.png")
        return open_image(picture) if picture.is_file() else None
    return None
