"""What lending the model of a running WebUI comes to, whichever it is: begin, check at every turn, give back."""

from __future__ import annotations

import ctypes
import logging
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_trainer.devices import free_memory, indexed
from lora_trainer.errors import UserError
from lora_trainer.files import sha256_file
from lora_trainer.host.base import LenderOptions
from lora_trainer.host.snapshot import WeightSnapshot
from lora_trainer.host.turns import Turns
from lora_trainer.models.base import Lender, ModelAwayError, ModelInfo, Room
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import get_family
from lora_trainer.models.families.flow.model import FlowModel
from lora_trainer.models.families.unet.folder import add_vae_file
from lora_trainer.models.families.unet.model import DiffusionModel
from lora_trainer.models.families.unet.names import UNET, VAE
from lora_trainer.models.hints import Hints
from lora_trainer.models.schedule import rescale_zero_terminal_snr
from lora_trainer.models.tensors import Tensors
from lora_trainer.storage import main_dtype
from lora_trainer.training.precision import resolve

log = logging.getLogger(__name__)

PARTS = frozenset({"unet", "vae", "text_encoders"})
PartedLentModel = DiffusionModel | FlowModel


class LoadedModel(Protocol):
    """One model object of the WebUI, read by the names of single files."""

    sd_model: Any

    def tensors(self, parts: frozenset[str]) -> dict[str, Tensor]:
        """Single-file name -> the very tensor that the WebUI computes with, of these parts of the model."""
        ...

    def architecture(self, tensors: dict[str, Tensor], hints: Hints) -> Any: ...

    def hints(self) -> Hints:
        """What shapes do not tell."""
        ...

    def tokenizer(self) -> Any: ...

    def alphas_cumprod(self) -> Tensor | None:
        """The noise schedule that the model was trained with, whatever generations made of it; None for a flow model,
        which has none."""
        ...


class WebuiLender(Lender):
    """See ``Lender``. One object per run; all but ``describe`` and ``model_hash`` happens in turns.

    checkpoint: entry of the WebUI's list (a ``CheckpointInfo``), which need not be the loaded one.
    """

    is_shared = True
    _choices: tuple[str, ...] = ()
    """The WebUI's options that decide on the form in which the model is there."""

    def __init__(self, webui: Any, turns: Turns, checkpoint: Any, options: LenderOptions):
        self._webui, self._turns, self._options = webui, turns, options
        self.checkpoint = checkpoint
        self._host: Any = None
        self._model: PartedLentModel | None = None
        self._read_options()

    # Lender -------------------------------------------------------------------------------------------------------

    def describe(self) -> ModelInfo:
        if self._options.text_encoders:
            raise UserError(
                "The WebUI chooses the text encoders that belong to its model.",
                field="text_encoders",
                remedy="Leave it empty, and choose them in the WebUI.",
            )
        sd_model = self._loaded()
        if sd_model is not None and self._is_ours(sd_model) and not self._is_outdated():
            self._refuse_unsuitable(sd_model)
            host = self._read(sd_model)
            return self._info(host, host.architecture(host.tensors(PARTS), host.hints()))
        path = Path(self.checkpoint.filename)
        info = FileLender(path, vae=self._options.vae, v_prediction=self._options.v_prediction,
                          zero_terminal_snr=self._options.zero_terminal_snr, complete=False).describe()  # fmt: skip
        self._refuse_file(info)
        return info

    @contextmanager
    def borrow(self) -> Iterator[PartedLentModel]:
        with self._turns.hold() if self._options.hold else nullcontext():
            try:
                with self._turns.take():
                    self._begin()
                yield self._lent
            finally:
                with self._turns.take():
                    self._give_back()

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._turns.take():
            try:
                self._make_ready()
            except ModelAwayError as away:
                away.returns = self._chosen() != self._chosen_first
                self._step_aside()
                raise
            try:
                yield
            finally:
                self._leave()

    @abstractmethod
    def make_room(self) -> None: ...

    def rest(self) -> AbstractContextManager[None]:
        return self._turns.rest()  # the WebUI generates inside, though the run keeps it otherwise (``hold``)

    def switch_back(self) -> None:
        with self._turns.take():
            data = self._webui.shared.opts.data
            data.update({name: self._chosen_first[name] for name in self._choices if name in self._chosen_first})
            self._select(self.checkpoint.title if self._follows_selection else self._selected().title)

    def device_turn(self) -> AbstractContextManager[None]:
        return self._turns.take()

    def model_hash(self) -> str | None:
        # The WebUI has it already, unless it was told not to hash.
        return self.checkpoint.sha256 or sha256_file(Path(self.checkpoint.filename))

    def room(self) -> Room | None:
        device = self.device
        if device.type != "cuda":
            return None
        with self._turns.take():
            sd_model = self._loaded()
            weights = [] if sd_model is None else self._weights(sd_model)
            there = sum(one.numel() * one.element_size() for one in weights if one.device == device)
            return Room(free_memory(device), there, self._together(sd_model))

    @property
    def device(self) -> torch.device:
        """Where the WebUI computes."""
        return indexed(self._webui.devices.device)

    @property
    def _lent(self) -> PartedLentModel:
        """The model, which is there from the beginning of ``borrow`` to its end."""
        assert self._model is not None
        return self._model

    # What WebUIs do differently -----------------------------------------------------------------------------------

    @abstractmethod
    def _weights(self, sd_model: Any) -> Iterable[Tensor]:
        """Of a model of the WebUI's."""

    def _together(self, sd_model: Any) -> bool:
        """Whether all parts of such a model, None before there is one, are on the device at once."""
        return False

    @abstractmethod
    def _read(self, sd_model: Any) -> LoadedModel: ...

    @abstractmethod
    def _refuse_unsuitable(self, sd_model: Any) -> None:
        """Raises UserError when this model, or the way in which it is run, does not let it be trained."""

    def _refuse_file(self, info: ModelInfo) -> None:
        """Raises UserError for a file that the WebUI would not load as a whole model."""
        return

    @abstractmethod
    def _load_ours(self) -> Any:
        """The WebUI's model, holding our checkpoint. What the user selected stays selected. Raises UserError."""

    @abstractmethod
    def _select(self, title: str) -> None:
        """Make this checkpoint the one that the next picture is drawn with."""

    def _is_outdated(self) -> bool:
        """Whether the loaded model is about to be replaced, because something else was chosen since."""
        return False

    @abstractmethod
    def _settle(self) -> None:
        """``_host``'s weights are where the turn needs them, and free of merged LoRAs."""

    @abstractmethod
    def _assemble(self, tensors: dict[str, Tensor], info: ModelInfo, schedule: Tensor | None) -> PartedLentModel: ...

    @abstractmethod
    def _bind(self, tensors: dict[str, Tensor]) -> None:
        """Have ``_model`` compute with these tensors of ``_host``."""

    @abstractmethod
    def _repaired(self, tensors: dict[str, Tensor], altered: list[str]) -> dict[str, Tensor]:
        """Tensors to go on with, although the WebUI changed the values of some. Raises ModelAwayError."""

    @abstractmethod
    def _leave(self) -> None:
        """A turn ends: whoever waits finds memory."""

    @abstractmethod
    def _restore(self) -> list[Callable[[], None]]:
        """Steps that leave the WebUI as it was, in order."""

    def _compute_dtype(self, tensors: dict[str, Tensor], device: torch.device) -> torch.dtype:
        """The number format that the run asks for; else that in which no layer of the UNet has to cast its weight."""
        if self._options.compute_dtype is not None:
            return self._options.compute_dtype
        lent = main_dtype(tensor for name, tensor in tensors.items() if name.startswith(UNET))
        return resolve(device, "auto", lent).compute_dtype

    def _step_aside(self) -> None:
        """The WebUI needs the room for something else; nothing of its weights is held until the next turn."""
        self._lent.unbind()
        self._snapshot.settle({})

    def _loaded(self) -> Any:
        return loaded_model(self._webui)

    # Beginning ----------------------------------------------------------------------------------------------------

    def _read_options(self) -> None:
        """How the WebUI reads prompts with Stable Diffusion 3; a run keeps what was set when it began."""
        data = self._webui.shared.opts.data
        self._reads_t5 = bool(data.get("sd3_enable_t5"))
        self._layers_skipped = max(1, int(data.get("CLIP_stop_at_last_layers") or 1))

    def _begin(self) -> None:
        self._model = self._host = None
        self._read_options()
        self._own_vae: dict[str, Tensor] = {}  # where the run computes with another than the WebUI's
        self._waiting_switch: str | None = None
        self._hash_option = self._webui.shared.opts.data.get("sd_checkpoint_hash")
        self._follows_selection = self._selected() is self.checkpoint
        self._chosen_first = self._chosen()
        sd_model = self._load_ours()
        self._refuse_unsuitable(sd_model)
        self._follow(sd_model)
        self._settle()
        tensors = self._tensors()
        hints = self._host.hints()
        if self._options.vae:
            tensors.update(vae_file(self._options.vae))
            self._own_vae = {name: tensor for name, tensor in tensors.items() if name.startswith(VAE)}
        info = self._info(self._host, self._host.architecture(tensors, hints))
        schedule = self._host.alphas_cumprod()
        if info.zero_terminal_snr and schedule is not None:
            schedule = rescale_zero_terminal_snr(schedule.float().cpu())
        self._model = self._assemble(tensors, info, schedule)
        self._snapshot = WeightSnapshot(self._tensors())

    def _follow(self, sd_model: Any) -> None:
        """The WebUI's model object from now on."""
        self._host = self._read(sd_model)

    def _info(self, host: LoadedModel, architecture: Any) -> ModelInfo:
        hints, options = host.hints(), self._options
        family = get_family(architecture.family)
        prediction = hints.prediction_type or "epsilon"
        if "v_prediction" in family.unused:
            prediction = family.prediction_type({}, architecture)
        elif options.v_prediction is not None:
            prediction = "v_prediction" if options.v_prediction else "epsilon"
        zero = bool(hints.zero_terminal_snr) if options.zero_terminal_snr is None else options.zero_terminal_snr
        path = Path(self.checkpoint.filename)
        return ModelInfo(architecture.family, prediction, path.stem, path, zero, architecture)

    # Every turn ---------------------------------------------------------------------------------------------------

    def _make_ready(self) -> None:
        """Weights loaded, resident, pristine and bound; or ModelAwayError."""
        sd_model = self._loaded()
        if sd_model is None or not self._is_ours(sd_model):
            self._refuse_when_switched()
            sd_model = self._load_ours()
        try:
            self._refuse_unsuitable(sd_model)
        except UserError as error:
            raise ModelAwayError(f"{error.message} {error.remedy or ''}".strip()) from error
        if self._host is None or sd_model is not self._host.sd_model:
            self._follow(sd_model)
        self._settle()
        tensors = self._tensors()
        moved = self._snapshot.moved(tensors)
        if not moved:
            return
        altered = self._snapshot.altered(tensors, moved)
        if altered:
            tensors = self._repaired(tensors, altered)
        self._bind(tensors)
        self._snapshot.settle(tensors)

    def _tensors(self) -> dict[str, Tensor]:
        """Of the parts that the run still needs."""
        parts = self._parts()
        if "vae" in parts and self._own_vae:
            return self._host.tensors(parts - {"vae"}) | self._own_vae
        return self._host.tensors(parts)

    def _parts(self) -> frozenset[str]:
        if self._model is None:
            return PARTS
        needed = {"unet": True, "vae": self._model.vae is not None, "text_encoders": bool(self._model.text_encoders)}
        return frozenset(part for part, wanted in needed.items() if wanted)

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _is_ours(self, sd_model: Any) -> bool:
        return Path(sd_model.sd_checkpoint_info.filename) == Path(self.checkpoint.filename)

    def _selected(self) -> Any:
        """What the user chose: what the next generation will be drawn with."""
        return self._webui.sd_models.select_checkpoint()

    def _chosen(self) -> dict[str, Any]:
        """What a person has chosen of what the run depends on; a WebUI need not have all of these options."""
        data = self._webui.shared.opts.data
        chosen = {name: copy(data[name]) for name in self._choices if name in data}
        return chosen | {"checkpoint": self._selected().filename} if self._follows_selection else chosen

    def _refuse_when_switched(self) -> None:
        """Another checkpoint is loaded. One that only a single picture was drawn with may be replaced by ours again."""
        selected = self._selected()
        if not self._follows_selection or Path(selected.filename) == Path(self.checkpoint.filename):
            return
        if not self._options.wait_for_model:
            raise ModelAwayError(
                f"The WebUI was switched to {selected.title}. Training goes on when {self.checkpoint.title} is "
                "selected again."
            )
        self._waiting_switch = selected.title
        self._select(self.checkpoint.title)

    def _could_not_load(self, error: Exception | None = None) -> UserError:
        message = f"The WebUI could not load {self.checkpoint.title}."
        if error is not None:
            message = f"The WebUI could not load {self.checkpoint.title}: {error}"
        return UserError(
            message, field="base_model",
            remedy="Choose another base model, or look into the WebUI's console.",
        )  # fmt: skip

    # The end ------------------------------------------------------------------------------------------------------

    def _give_back(self) -> None:
        """Everything as it was. Each step is tried, whatever became of the others; the first failure is raised."""
        failures: list[Exception] = []
        for step in (self._let_go, *self._restore()):
            try:
                step()
            except Exception as error:  # noqa: BLE001 - the other steps must follow; it is raised below
                failures.append(error)
        self._model = self._host = None
        self._webui.devices.torch_gc()
        _return_memory()
        if failures:
            raise failures[0]

    def _let_go(self) -> None:
        if self._model is not None:
            self._model.release("vae", "text_encoders", "unet")


def stored_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """What a module keeps in its state beside parameters: flow models' tables of positions."""
    return [
        (name, buffer)
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set
    ]


def _return_memory() -> None:
    """What the run freed goes back to the system: glibc would keep most of it for later, which looks like a leak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def loaded_model(webui: Any) -> Any:
    """The WebUI's model; None if there is none. Forge has a stand-in before it loads the first."""
    sd_model = webui.sd_models.model_data.sd_model
    return sd_model if hasattr(sd_model, "sd_checkpoint_info") else None


def vae_file(path: Path | str) -> dict[str, Tensor]:
    """A VAE file's tensors by their single-file names."""
    tensors = Tensors()
    add_vae_file(tensors, Path(path))
    return {name: tensors[name] for name in tensors}
