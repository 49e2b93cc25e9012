"""What being a host comes to in every WebUI of this kind: one lock, one list of checkpoints, one LoRA folder."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lora_trainer.adapters.describe import describe
from lora_trainer.devices import indexed
from lora_trainer.errors import UserError
from lora_trainer.host import drawing
from lora_trainer.host.base import (
    AccessPolicy,
    Card,
    Checkpoint,
    Folders,
    Host,
    LenderOptions,
    ModelFiles,
    PreviewRequest,
)
from lora_trainer.host.clearing import ClearedDevice, ClearedLender, OwnModels
from lora_trainer.host.lending import WebuiLender, loaded_model
from lora_trainer.host.loras import HostLoras
from lora_trainer.host.options import (
    FOLDERS_OPTION,
    LANGUAGE_OPTION,
    NAMES_OPTION,
    WebuiOptions,
    access_policy,
    data_folder,
    named_folders,
)
from lora_trainer.host.publishing import place_lora
from lora_trainer.host.turns import Turns
from lora_trainer.models.base import Lender
from lora_trainer.models.families.causal_lm.lender import LanguageModelLender
from lora_trainer.storage import main_dtype

_turns: Turns | None = None
_turns_lock = threading.Lock()


class WebuiHost(Host):
    """See ``Host``. Holds nothing of the user interface, so it outlives "Reload UI".

    webui: the WebUI's modules that we touch, under one name.
    """

    def __init__(self, webui: Any, loras: HostLoras):
        self._webui, self._loras = webui, loras
        self._turns = turns_of(webui.call_queue.queue_lock)

    # Facts --------------------------------------------------------------------------------------------------------

    def folders(self) -> Folders:
        options = self._webui.shared.cmd_opts
        lora = Path(options.lora_dir) if getattr(options, "lora_dir", None) else None
        named = tuple(named_folders(str(self.option(LANGUAGE_OPTION, ""))))
        data = data_folder(options, Path(self._webui.paths.data_path), lora)
        return Folders(data, lora, named or (Path(self._webui.paths.models_path) / "LLM",))

    def access(self) -> AccessPolicy:
        folders, names = (str(self.option(option, "")) for option in (FOLDERS_OPTION, NAMES_OPTION))
        return access_policy(self._webui.shared.cmd_opts, folders, names)

    def option(self, key: str, default: object) -> object:
        # With --nowebui there is no settings page, and the options that we added are not known.
        return WebuiOptions(self._webui.shared.opts).get(key, default)

    def device(self) -> torch.device:
        return indexed(self._webui.devices.device)

    def weight_dtype(self) -> torch.dtype | None:
        return main_dtype(self._weights())

    def checkpoints(self) -> list[Checkpoint]:
        selected = self._selected()
        return [
            self._listed(info, info is selected)
            for info in list(self._webui.sd_models.checkpoints_list.values())  # the WebUI may refresh it meanwhile
        ]

    def selected(self) -> Checkpoint | None:
        info = self._selected()
        return None if info is None else self._listed(info, True)

    def _listed(self, info: Any, selected: bool) -> Checkpoint:
        loaded = loaded_model(self._webui)
        there = loaded is not None and loaded.sd_checkpoint_info.filename == info.filename
        return Checkpoint(info.title, Path(info.filename), selected, there)

    def _selected(self) -> Any | None:
        """As the WebUI's ``select_checkpoint``, which prints a line each time when the file is gone."""
        sd_models = self._webui.sd_models
        listed, name = sd_models.checkpoints_list, self._webui.shared.opts.data.get("sd_model_checkpoint")
        return sd_models.checkpoint_aliases.get(name) or listed.get(name) or next(iter(listed.values()), None)

    # Lending and drawing ------------------------------------------------------------------------------------------

    def lender(self, checkpoint: str, options: LenderOptions) -> WebuiLender:
        self._refuse_other_device(options.device)
        if options.base_precision != "stored":
            raise UserError(
                "A WebUI lends its model in the number format that it has loaded it in.",
                field="base_precision",
                remedy="Use stored; Forge has a setting for it, Diffusion in Low Bits.",
            )
        if options.offload_blocks:
            raise UserError(
                "A WebUI decides itself what of its model is on the GPU.", field="offload_blocks", remedy="Use auto."
            )
        return self._lender(self._checkpoint(checkpoint), options)

    def _refuse_other_device(self, device: torch.device | None) -> None:
        if device not in (None, self.device()):
            raise UserError(
                f"The WebUI's model is on {self.device()}; it cannot be trained on {device}.",
                field="device",
                remedy="Use auto.",
            )

    @abstractmethod
    def _lender(self, checkpoint: Any, options: LenderOptions) -> WebuiLender: ...

    def cleared(self, lender: LanguageModelLender) -> Lender:
        self._refuse_other_device(lender.device)
        return ClearedLender(lender, self._turns, self._own_models())

    def device_left(self) -> AbstractContextManager[ClearedDevice]:
        return ClearedDevice(self._turns, self._own_models()).held()

    @abstractmethod
    def _own_models(self) -> OwnModels: ...

    def model_files(self, checkpoint: str) -> ModelFiles:
        path = Path(self._checkpoint(checkpoint).filename)
        return ModelFiles(path, *self._added_files(path))

    @abstractmethod
    def _added_files(self, path: Path) -> tuple[Path | None, tuple[Path, ...]]:
        """The VAE and the text encoders that the WebUI adds to this checkpoint, as it is set now."""

    def draw(self, request: PreviewRequest) -> Image.Image:
        info = self._checkpoint(request.checkpoint)
        with self._turns.take(), self._loaded(info):
            return drawing.draw(self._webui, self._loras, request)

    def draw_all(
        self, requests: Sequence[PreviewRequest], options: LenderOptions | None = None
    ) -> Generator[Image.Image, None, None]:
        """Each picture has a turn of its own; on a base model that had to be loaded first, until somebody waits."""
        waiting = list(requests)
        info = self._checkpoint(waiting[0].checkpoint)
        while waiting:
            with self._turns.take(), self._loaded(info) as was_there:
                while True:
                    picture = drawing.draw(self._webui, self._loras, waiting.pop(0))
                    if was_there or not waiting or self._turns.somebody_waits:
                        break
                    yield picture
            yield picture

    def _checkpoint(self, name: str) -> Any:
        sd_models = self._webui.sd_models
        if not name:
            if (selected := self._selected()) is None:
                raise UserError(
                    "The WebUI has no base model.", field="base_model",
                    remedy="Put a Stable Diffusion checkpoint into models/Stable-diffusion and refresh the list.",
                )  # fmt: skip
            return selected
        infos = list(sd_models.checkpoints_list.values())
        for info in infos:
            path = Path(info.filename)
            if name in (info.title, info.filename, info.name, path.stem) or Path(name) == path:
                return info
        # A title changes when the WebUI computes the file's hash: "name.safetensors" -> "name.safetensors [12ab…]".
        aliases = sd_models.checkpoint_aliases
        if name in aliases:
            return aliases[name]
        raise UserError(
            f"The WebUI's list has no base model {name!r}.", field="base_model",
            remedy="Choose one of the list, or refresh the list if the file is new.",
        )  # fmt: skip

    def device_turn(self) -> AbstractContextManager[None]:
        return self._turns.take()

    def model_bytes(self) -> int:
        device = self.device()
        return sum(one.numel() * one.element_size() for one in self._weights() if one.device.type == device.type)

    def _weights(self) -> list[Tensor]:
        """Of the WebUI's model; none while there is none, or while it is loaded or moved."""
        sd_model = loaded_model(self._webui)
        try:
            return [] if sd_model is None else [one for part in self._modules(sd_model) for one in part.parameters()]
        except RuntimeError:
            return []

    @abstractmethod
    def _modules(self, sd_model: Any) -> list[nn.Module]:
        """What the weights of the WebUI's model lie in."""

    def spare_turn(self) -> AbstractContextManager[bool]:
        return self._turns.spare()

    # Publishing ---------------------------------------------------------------------------------------------------

    def publish(self, lora: Path, name: str, card: Card, *, overwrite: bool = False) -> Path:
        folder = self.folders().lora
        if folder is None:
            raise UserError("This WebUI has no LoRA folder.", remedy="Switch on its builtin Lora extension.")
        path = place_lora(lora, folder, name, card, overwrite=overwrite)
        with self._turns.take():
            self._forget(name)
            self._loras.announce(name)
        return path

    def forget(self, name: str) -> None:
        with self._turns.take():
            self._forget(name)

    def _forget(self, name: str) -> None:
        loaded = loaded_model(self._webui)
        if loaded is not None:
            self._loras.forget(loaded, name, self._webui.processing)

    def verify(self, lora: Path, prompt: str) -> str | None:
        """On the base model that the LoRA says it was trained on, if the list has it; what was loaded comes back."""
        try:
            with self._turns.take(), self._loaded(self._base_of(lora)):
                return drawing.verify(self._webui, self._loras, lora, prompt)
        except UserError as error:
            return f"The LoRA was not checked in the WebUI. {error}"

    def _base_of(self, lora: Path) -> Any | None:
        name = describe(lora).base_model
        infos = list(self._webui.sd_models.checkpoints_list.values())
        return next((info for info in infos if Path(info.filename).name == name), None)

    @contextmanager
    def _loaded(self, info: Any | None) -> Iterator[bool]:
        """Inside a turn: pictures come from this checkpoint, and afterwards what was loaded before is. None: whichever
        is loaded, or selected. Yields whether it was loaded before."""
        loaded = loaded_model(self._webui)
        if loaded is None:
            info = info or self._checkpoint("")
        is_there = loaded is not None and (
            info is None or Path(loaded.sd_checkpoint_info.filename) == Path(info.filename)
        )
        with nullcontext() if is_there else self._lender(info, LenderOptions()).borrow(), self._model_kept():
            yield is_there

    @abstractmethod
    def _model_kept(self) -> AbstractContextManager[None]:
        """Inside a turn: drawing does not load what is selected."""


def turns_of(queue_lock: Any) -> Turns:
    """One object for the process: who holds the lock must be known to every host object, old and new."""
    global _turns
    with _turns_lock:
        if _turns is None or _turns.lock is not queue_lock:
            _turns = Turns(
                queue_lock,
                waiting=lambda: bool(getattr(queue_lock, "_pending_threads", ())),
                taken=lambda: queue_lock._lock.locked() if hasattr(queue_lock, "_lock") else True,
            )
        return _turns
