"""Lending the model that A1111 has loaded: aliases of its own tensors, checked at every turn, and its return."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_trainer.errors import UserError
from lora_trainer.files import sha256_file
from lora_trainer.host.a1111_loras import HostLoras
from lora_trainer.host.a1111_model import VAE, HostModel, refuse_unsuitable
from lora_trainer.host.base import LenderOptions
from lora_trainer.host.fingerprint import Fingerprint
from lora_trainer.host.residence import CPU, Residence
from lora_trainer.host.turns import Turns
from lora_trainer.models.assemble import DiffusionModel, assemble
from lora_trainer.models.base import ModelAwayError, ModelInfo
from lora_trainer.models.checkpoint import FileLender, single_file
from lora_trainer.models.folder import add_vae_file
from lora_trainer.models.schedule import rescale_zero_terminal_snr
from lora_trainer.models.tensors import Tensors, open_source

log = logging.getLogger(__name__)

PARTS = frozenset({"unet", "vae", "text_encoders"})


class A1111Lender:
    """See ``Lender``. One object per run.

    checkpoint: entry of the WebUI's list (a ``CheckpointInfo``), which need not be the loaded one.
    """

    def __init__(self, webui: Any, turns: Turns, checkpoint: Any, options: LenderOptions):
        self._webui, self._turns, self._options = webui, turns, options
        self.checkpoint = checkpoint
        self._loras = HostLoras()
        self._host: HostModel | None = None
        self._model: DiffusionModel | None = None

    # Lender -------------------------------------------------------------------------------------------------------

    def describe(self) -> ModelInfo:
        sd_model = self._webui.sd_models.model_data.sd_model
        if sd_model is not None and self._is_ours(sd_model):
            refuse_unsuitable(self._webui, sd_model)
            host = HostModel(sd_model)
            return self._info(host, host.architecture(host.tensors(PARTS), host.hints()).family)
        path = Path(self.checkpoint.filename)
        file = FileLender(path, vae=self._options.vae, v_prediction=self._options.v_prediction,
                          zero_terminal_snr=self._options.zero_terminal_snr)  # fmt: skip
        return file.describe()

    @contextmanager
    def borrow(self) -> Iterator[DiffusionModel]:
        with self._turns.hold() if self._options.hold else nullcontext():
            try:
                with self._turns.take():
                    self._begin()
                yield self._model
            finally:
                with self._turns.take():
                    self._give_back()

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._turns.take():
            self._make_ready()
            try:
                yield
            finally:
                self._residence.leave(self._turns.somebody_waits)

    def model_hash(self) -> str | None:
        # The WebUI has it already, unless it was told not to hash.
        return self.checkpoint.sha256 or sha256_file(Path(self.checkpoint.filename))

    # Beginning ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        opts = self._webui.shared.opts
        self._model = self._host = None
        self._merged: tuple[Any, list[Any]] | None = None  # model and layers that LoRAs were taken out of
        self._own_vae: dict[str, Tensor] = {}  # once the user chose another VAE in the middle of the run
        self._waiting_switch: str | None = None
        self._hash_option = opts.data.get("sd_checkpoint_hash")
        self._follows_selection = self._selected() is self.checkpoint
        sd_model = self._load_ours()
        refuse_unsuitable(self._webui, sd_model)
        self._host = HostModel(sd_model)
        self._residence = Residence(self._webui, self._host, self._rebind)
        self._take_loras_out()
        self._residence.enter()
        tensors = self._tensors()
        hints = self._host.hints()
        if self._options.vae:
            tensors.update(_vae_file(self._options.vae))
            self._own_vae = {name: tensor for name, tensor in tensors.items() if name.startswith(VAE)}
        architecture = self._host.architecture(tensors, hints)
        info = self._info(self._host, architecture.family)
        schedule = sd_model.alphas_cumprod_original  # alphas_cumprod is rewritten by every generation
        if info.zero_terminal_snr:
            schedule = rescale_zero_terminal_snr(schedule.float().cpu())
        self._first_vae = self._webui.sd_vae.loaded_vae_file
        device = self._webui.devices.device
        self._model = assemble(
            tensors,
            architecture,
            self._host.tokenizer(),
            info=info,
            device=CPU if self._residence.one_at_a_time else device,
            compute_dtype=self._options.compute_dtype,
            clip_skip=self._options.clip_skip,
            alphas_cumprod=schedule,
        )
        if self._residence.one_at_a_time:
            self._model.compute_on(device)
        self._residence.attach(self._model)
        self._fingerprint = Fingerprint(self._tensors())

    def _info(self, host: HostModel, family: str) -> ModelInfo:
        hints, options = host.hints(), self._options
        prediction = hints.prediction_type or "epsilon"
        if options.v_prediction is not None:
            prediction = "v_prediction" if options.v_prediction else "epsilon"
        zero = bool(hints.zero_terminal_snr) if options.zero_terminal_snr is None else options.zero_terminal_snr
        path = Path(self.checkpoint.filename)
        return ModelInfo(family, prediction, path.stem, path, zero)

    # Every turn ---------------------------------------------------------------------------------------------------

    def _make_ready(self) -> None:
        """Weights loaded, resident, pristine and bound; or ModelAwayError."""
        sd_model = self._webui.sd_models.model_data.sd_model
        if sd_model is None or not self._is_ours(sd_model):
            self._refuse_when_switched()
            sd_model = self._load_ours()
        try:
            refuse_unsuitable(self._webui, sd_model)
        except UserError as error:
            raise ModelAwayError(str(error)) from error
        if sd_model is not self._host.sd_model:
            self._host = HostModel(sd_model)
            self._residence.follow(self._host)
        self._take_loras_out()
        self._residence.enter()
        tensors = self._tensors()
        moved = self._fingerprint.moved(tensors)
        if not moved:
            return
        altered = self._fingerprint.altered(tensors, moved)
        if any(not name.startswith(VAE) for name in altered):
            log.info("%s was changed in the WebUI; loading it again", self.checkpoint.title)
            tensors = self._load_again()
            altered = self._fingerprint.altered(tensors, self._fingerprint.moved(tensors))
            if any(not name.startswith(VAE) for name in altered):
                raise ModelAwayError(f"The weights of {self.checkpoint.title} are not what they were in the beginning.")
        if altered:
            log.info("The WebUI's VAE was changed; the run goes on with a copy of the one it began with")
            self._own_vae = self._vae_as_it_was(tensors)
            tensors = self._tensors()
        self._bind(tensors)

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

    def _bind(self, tensors: dict[str, Tensor]) -> None:
        # With --medvram what is not on the device is brought there later, by its owner.
        self._model.bind(tensors, move=not self._residence.one_at_a_time)
        self._fingerprint.settle(tensors)

    def _rebind(self, part: str) -> None:
        if self._model is not None and part in self._parts():
            self._model.bind(self._tensors(), parts=(part,), move=False)
            self._fingerprint.settle(self._tensors())

    def _take_loras_out(self) -> None:
        layers = self._loras.take_out(self._host.sd_model)
        if layers:
            self._merged = self._host.sd_model, layers

    def _vae_as_it_was(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first VAE of the run, from its file, in the number format that the WebUI keeps it in."""
        if self._first_vae is not None:
            stored = _vae_file(self._first_vae)
        else:
            stored = single_file(open_source(Path(self.checkpoint.filename)))
        wanted = [name for name in tensors if name.startswith(VAE)]
        device, dtype = self._webui.devices.device, self._webui.devices.dtype_vae
        return {name: stored[name].to(device, dtype) for name in wanted}

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _is_ours(self, sd_model: Any) -> bool:
        return Path(sd_model.sd_checkpoint_info.filename) == Path(self.checkpoint.filename)

    def _selected(self) -> Any:
        """What the user chose: what the next generation will be drawn with."""
        return self._webui.sd_models.select_checkpoint()

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
        self._webui.shared.opts.data["sd_model_checkpoint"] = self.checkpoint.title

    def _load_ours(self) -> Any:
        """The host's model, holding our checkpoint. What the user selected stays selected."""
        sd_models = self._webui.sd_models
        current = self._webui.shared.sd_model  # loads the first one, where none was yet
        if current is not None and self._is_ours(current):
            return current
        with sd_models.SkipWritingToConfig():
            try:
                sd_models.reload_model_weights(info=self.checkpoint)
            except Exception as error:  # the host's loader raises whatever its libraries do
                raise UserError(
                    f"The WebUI could not load {self.checkpoint.title}: {error}", field="base_model",
                    remedy="Choose another base model, or look into the WebUI's console.",
                ) from error  # fmt: skip
        loaded = sd_models.model_data.sd_model
        if loaded is None or not self._is_ours(loaded):
            raise UserError(
                f"The WebUI could not load {self.checkpoint.title}.", field="base_model",
                remedy="Choose another base model, or look into the WebUI's console.",
            )  # fmt: skip
        return loaded

    def _load_again(self) -> dict[str, Tensor]:
        with self._webui.sd_models.SkipWritingToConfig():
            self._webui.sd_models.reload_model_weights(self._host.sd_model, self.checkpoint, forced_reload=True)
        self._host = HostModel(self._webui.sd_models.model_data.sd_model)
        self._residence.follow(self._host)
        self._residence.enter()
        return self._tensors()

    # The end ------------------------------------------------------------------------------------------------------

    def _give_back(self) -> None:
        """Everything as it was. Each step is tried, whatever became of the others; the first failure is raised."""
        failures: list[Exception] = []
        for step in (self._let_go, self._restore_selection, self._restore_loras, self._restore_places):
            try:
                step()
            except Exception as error:  # noqa: BLE001 - the other steps must follow; it is raised below
                failures.append(error)
        self._model = self._host = None
        self._webui.devices.torch_gc()
        if failures:
            raise failures[0]

    def _let_go(self) -> None:
        if self._model is not None:
            self._model.release("vae", "text_encoders", "unet")

    def _restore_selection(self) -> None:
        """The checkpoint that the user selected is loaded, be it the former one or one that had to wait."""
        data, sd_models = self._webui.shared.opts.data, self._webui.sd_models
        if self._waiting_switch is not None:
            data["sd_model_checkpoint"] = self._waiting_switch
        loaded = sd_models.model_data.sd_model
        if loaded is not None and Path(loaded.sd_checkpoint_info.filename) != Path(self._selected().filename):
            sd_models.reload_model_weights()
        elif not self._follows_selection and self._hash_option is not None:
            data["sd_checkpoint_hash"] = self._hash_option

    def _restore_loras(self) -> None:
        if self._merged is not None and self._merged[0] is self._webui.sd_models.model_data.sd_model:
            self._loras.put_back(self._merged[1])

    def _restore_places(self) -> None:
        if self._host is not None:
            self._residence.give_back()


def _vae_file(path: Path | str) -> dict[str, Tensor]:
    tensors = Tensors()
    add_vae_file(tensors, Path(path))
    return {name: tensors[name] for name in tensors}
