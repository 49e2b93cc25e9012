"""Lending the model that A1111 has loaded: aliases of its own tensors, checked at every turn, and its return."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_trainer.errors import UserError
from lora_trainer.host.a1111.loras import A1111Loras
from lora_trainer.host.a1111.model import HostModel, refuse_lowvram, refuse_unsuitable, refuse_without_t5
from lora_trainer.host.a1111.residence import CPU, Residence
from lora_trainer.host.base import LenderOptions
from lora_trainer.host.lending import PartedLentModel, WebuiLender, vae_file
from lora_trainer.host.turns import Turns
from lora_trainer.models.base import ModelAwayError, ModelInfo
from lora_trainer.models.checkpoint import single_file
from lora_trainer.models.families import get_family
from lora_trainer.models.families.flow.model import FlowModel
from lora_trainer.models.families.unet.model import DiffusionModel
from lora_trainer.models.families.unet.names import VAE
from lora_trainer.models.family import Family
from lora_trainer.models.tensors import open_source

log = logging.getLogger(__name__)


_SD3 = "model.diffusion_model.x_embedder.proj.weight"
"""By which A1111 knows a file of Stable Diffusion 3."""


class A1111Lender(WebuiLender):
    """See ``WebuiLender``."""

    _choices = ("sd_unet", "fp8_storage", "cache_fp16_weight", "sd3_enable_t5")

    def __init__(self, webui: Any, turns: Turns, checkpoint: Any, options: LenderOptions):
        super().__init__(webui, turns, checkpoint, options)
        self._loras = A1111Loras(webui)

    def describe(self) -> ModelInfo:
        refuse_lowvram(self._webui)  # whether a model is loaded or not
        info = super().describe()
        if info.prediction_type == "flow":
            self._refuse_without_vae(get_family(info.family))
        return info

    def _refuse_file(self, info: ModelInfo) -> None:
        path, family = Path(self.checkpoint.filename), get_family(info.family)
        if not family.a1111_loads(info.architecture):
            raise UserError(
                f"{path.name} is {family.kind(info.architecture)}, which this WebUI does not load.",
                field="base_model",
                remedy="Choose a checkpoint of Stable Diffusion 1, 2 or XL, or of Stable Diffusion 3 medium.",
            )
        if info.prediction_type != "flow":
            family.check_complete(info.architecture, path.name)
        elif _SD3 not in open_source(path).shapes:
            raise UserError(
                f"{path.name} is a transformer alone, which this WebUI does not load: no tensor is named {_SD3}.",
                field="base_model",
                remedy=f"Choose an all-in-one file of {family.title} medium.",
            )

    def _refuse_without_vae(self, family: Family) -> None:
        """To a file of Stable Diffusion 3 A1111 adds text encoders, but no VAE: it loads one that nobody filled."""
        path = Path(self.checkpoint.filename)
        if self._options.vae or self._webui.sd_vae.resolve_vae(str(path)).vae:
            return
        if not any(name.startswith(VAE) for name in open_source(path).shapes):
            raise UserError(
                f"{path.name} has no VAE, and this WebUI adds none.",
                field="vae",
                remedy=f'Choose the VAE of {family.title} here, or as "SD VAE" in the settings.',
            )

    def _weights(self, sd_model: Any) -> Iterable[Tensor]:
        return sd_model.parameters()

    def _together(self, sd_model: Any) -> bool:
        return not getattr(sd_model, "lowvram", False)

    # Beginning ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._placed: Residence | None = None
        self._other_file: tuple[int, int] | None = None  # time and size of one that did not bring the weights back
        self._merged: tuple[Any, list[Any]] | None = None  # model and layers that LoRAs were taken out of
        super()._begin()
        self._first_vae = self._webui.sd_vae.loaded_vae_file

    def _read(self, sd_model: Any) -> HostModel:
        return HostModel(sd_model, self._reads_t5)

    def _refuse_unsuitable(self, sd_model: Any) -> None:
        refuse_unsuitable(self._webui, sd_model)
        if "text_encoders" in self._parts() and isinstance(self._model, FlowModel) and self._model.architecture.t5:
            refuse_without_t5(sd_model)

    def _follow(self, sd_model: Any) -> None:
        super()._follow(sd_model)
        if self._placed is None:
            self._placed = Residence(self._webui, self._host, self.device, self._rebind)
        else:
            self._placed.follow(self._host)

    @property
    def _residence(self) -> Residence:
        """Where the parts lie, known since a model of the WebUI's is followed."""
        assert self._placed is not None
        return self._placed

    def _assemble(self, tensors: dict[str, Tensor], info: ModelInfo, schedule: Tensor | None) -> PartedLentModel:
        device, one_at_a_time = self.device, self._residence.one_at_a_time
        model = get_family(info.family).build(
            tensors,
            info.architecture,
            self._host.tokenizer(),
            info=info,
            device=CPU if one_at_a_time else device,
            compute_dtype=self._compute_dtype(tensors, device),
            clip_skip=self._options.clip_skip,
            alphas_cumprod=schedule,
        )
        assert isinstance(model, (DiffusionModel, FlowModel)), "A1111 loads no other kind"
        if one_at_a_time:
            model.compute_on(device)
        self._residence.attach(model)
        return model

    # Every turn ---------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        if self._webui.sd_unet.current_unet is not None:
            self._webui.sd_unet.apply_unet()  # one that was switched off is used until the next picture
        layers = self._loras.unmerge(self._host.sd_model)
        if layers:
            self._merged = self._host.sd_model, layers
        self._residence.enter()

    def _repaired(self, tensors: dict[str, Tensor], altered: list[str]) -> dict[str, Tensor]:
        if any(not name.startswith(VAE) for name in altered):
            file = Path(self.checkpoint.filename).stat()
            if (file.st_mtime_ns, file.st_size) == self._other_file:
                raise self._is_another()
            log.info("%s was changed in the WebUI; loading it again", self.checkpoint.title)
            tensors = self._load_again()
            altered = self._snapshot.altered(tensors, self._snapshot.moved(tensors))
            if any(not name.startswith(VAE) for name in altered):
                self._other_file = file.st_mtime_ns, file.st_size
                raise self._is_another()
        if altered:
            log.info("The WebUI's VAE was changed; the run goes on with a copy of the one it began with")
            self._own_vae = self._vae_as_it_was(tensors)
            tensors = self._tensors()
        return tensors

    def _is_another(self) -> ModelAwayError:
        return ModelAwayError(
            f"The file of {self.checkpoint.title} is not the one any more that the training began with. It goes on "
            "when that file is back; to train on the new one, stop it and start another."
        )

    def _bind(self, tensors: dict[str, Tensor]) -> None:
        # With --medvram what is not on the device is brought there later, by its owner.
        self._lent.bind(tensors, move=not self._residence.one_at_a_time)
        if self._own_vae and self._residence.has_vae:
            self._rebind("vae", True)

    def _rebind(self, part: str, is_here: bool) -> None:
        if self._model is not None and part in self._parts():
            # A VAE of the run's own follows the host's.
            self._model.bind(self._tensors(), parts=(part,), move=is_here)
            self._snapshot.settle(self._tensors())

    def _step_aside(self) -> None:
        super()._step_aside()
        self._residence.unpark()

    def make_room(self) -> None:
        self._residence.make_room(self._parts())

    def _leave(self) -> None:
        self._residence.leave(self._turns.somebody_waits)

    def _vae_as_it_was(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first VAE of the run, from its file, in the number format that the WebUI keeps it in."""
        if self._first_vae is not None:
            stored: Mapping[str, Tensor] = vae_file(self._first_vae)
        else:
            stored = single_file(open_source(Path(self.checkpoint.filename)))
        wanted = [name for name in tensors if name.startswith(VAE)]
        device, dtype = self.device, self._webui.devices.dtype_vae
        return {name: stored[name].to(device, dtype) for name in wanted}

    # Checkpoints --------------------------------------------------------------------------------------------------

    def switch_back(self) -> None:
        super().switch_back()
        with self._turns.take(), self._webui.sd_models.SkipWritingToConfig():
            try:  # with the options as they are now
                self._webui.sd_models.reload_model_weights(info=self.checkpoint, forced_reload=True)
            except Exception as error:  # the host's loader raises whatever its libraries do
                raise self._could_not_load(error) from error

    def _select(self, title: str) -> None:
        self._webui.shared.opts.data["sd_model_checkpoint"] = title

    def _load_ours(self) -> Any:
        sd_models = self._webui.sd_models
        current = self._webui.shared.sd_model  # loads the first one, where none was yet
        if current is not None and self._is_ours(current):
            return current
        with sd_models.SkipWritingToConfig():
            try:
                sd_models.reload_model_weights(info=self.checkpoint)
            except Exception as error:  # the host's loader raises whatever its libraries do
                raise self._could_not_load(error) from error
        loaded = self._loaded()
        if loaded is None or not self._is_ours(loaded):
            raise self._could_not_load()
        return loaded

    def _load_again(self) -> dict[str, Tensor]:
        with self._webui.sd_models.SkipWritingToConfig():
            self._webui.sd_models.reload_model_weights(self._host.sd_model, self.checkpoint, forced_reload=True)
        self._follow(self._loaded())
        self._residence.enter()
        return self._tensors()

    # The end ------------------------------------------------------------------------------------------------------

    def _restore(self) -> list[Callable[[], None]]:
        return [self._restore_selection, self._restore_loras, self._restore_places]

    def _restore_selection(self) -> None:
        """The checkpoint that the user selected is loaded, be it the former one or one that had to wait."""
        data = self._webui.shared.opts.data
        if self._waiting_switch is not None:
            self._select(self._waiting_switch)
        loaded = self._loaded()
        if loaded is not None and Path(loaded.sd_checkpoint_info.filename) != Path(self._selected().filename):
            self._webui.sd_models.reload_model_weights()
        elif not self._follows_selection and self._hash_option is not None:
            data["sd_checkpoint_hash"] = self._hash_option

    def _restore_loras(self) -> None:
        if self._merged is not None and self._merged[0] is self._loaded():
            self._loras.merge(self._merged[1])

    def _restore_places(self) -> None:
        if self._placed is not None:
            self._placed.give_back()
