"""Lending the model that Forge has loaded: aliases of its own tensors, checked at every turn, and its return."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lora_trainer.devices import indexed
from lora_trainer.host.forge.loras import holds_loras, load_without_loras
from lora_trainer.host.forge.memory import Residence
from lora_trainer.host.forge.model import LOW_BITS, ForgeModel, patchers, refuse_storage, refuse_unsuitable
from lora_trainer.host.lending import PARTS, PartedLentModel, WebuiLender
from lora_trainer.models.base import ModelAwayError, ModelInfo
from lora_trainer.models.families import get_family
from lora_trainer.models.families.flow.model import FlowModel
from lora_trainer.models.families.unet.model import DiffusionModel
from lora_trainer.models.other_files import USE_FP16
from lora_trainer.storage import Scaled, pack

log = logging.getLogger(__name__)

_TRIES = 3
_FORM = "'additional_modules'"
"""What follows it in Forge's loading parameters as a text, which is its mark of what is loaded, is all but the entry of
the list of checkpoints. Entries are told by their addresses there, and are made anew when the list is read again."""

class ForgeLender(WebuiLender):
    """See ``WebuiLender``.

    Forge builds another model object for every checkpoint, VAE or number format that is chosen, and frees the former.
    Nothing of it may be held then, so between turns whoever waits finds our aliases gone.
    """

    _choices = ("forge_additional_modules", "forge_unet_storage_dtype")

    def describe(self) -> ModelInfo:
        info = super().describe()  # what the model is comes before the form in which Forge would keep it
        quantized = get_family(info.family).quantized
        refuse_storage(self._low_bits() or torch.float32, "UNet", self._remedy("unet"), quantized)
        return info

    def _low_bits(self) -> Any:
        """The format that "Diffusion in Low Bits" names; None for the file's own."""
        name = self._webui.shared.opts.forge_unet_storage_dtype
        return self._webui.main_entry.forge_unet_storage_dtype_options.get(name, (None, False))[0]

    def _remedy(self, part: str) -> str:
        """What to do about weights that are too coarse, by what made them so. part: as in Forge's options."""
        if part == "unet" and self._low_bits() is not None:
            return LOW_BITS
        given = vars(getattr(self._webui.memory_management, "args", SimpleNamespace()))
        flags = [name for name, value in given.items() if name.startswith(f"{part}_in_fp8") and value]
        return f"Start Forge without --{flags[0].replace('_', '-')}." if flags else USE_FP16

    def _weights(self, sd_model: Any) -> Iterable[Tensor]:
        return [one for patcher in patchers(sd_model).values() for one in patcher.model.parameters()]

    # Beginning ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._residence: Residence | None = None
        self._merged: Any = None  # the model that LoRAs were taken out of
        self._had_model = self._loaded() is not None
        super()._begin()

    def _read(self, sd_model: Any) -> ForgeModel:
        # Forge loads a T5 that its setting has it leave out.
        leaves_out = getattr(sd_model, "is_sd3", False) and not self._reads_t5
        return ForgeModel(sd_model, reads_t5=not leaves_out, clip_skip=self._layers_skipped)

    def _refuse_unsuitable(self, sd_model: Any) -> None:
        refuse_unsuitable(sd_model, self._remedy)

    def _assemble(self, tensors: dict[str, Tensor], info: ModelInfo, schedule: Tensor | None) -> PartedLentModel:
        device = indexed(self._webui.memory_management.get_torch_device())
        model = get_family(info.family).build(
            aliases(tensors),
            info.architecture,
            self._host.tokenizer(),
            info=info,
            device=device,
            compute_dtype=self._compute_dtype(tensors, device),
            clip_skip=self._options.clip_skip,
            alphas_cumprod=schedule,
        )
        assert isinstance(model, (DiffusionModel, FlowModel)), "other kinds are refused"
        return model

    # Every turn ---------------------------------------------------------------------------------------------------

    def _make_ready(self) -> None:
        try:
            super()._make_ready()
        except ModelAwayError:
            if not self._catches_up():
                raise
            super()._make_ready()

    def _catches_up(self) -> bool:
        """Load what was chosen since, as Forge would do for the next picture only. False where there is nothing new,
        and where it is another checkpoint."""
        selected = Path(self._selected().filename)  # entries of the list are made anew when it is read again
        if not self._is_outdated() or (self._follows_selection and selected != Path(self.checkpoint.filename)):
            return False
        self._load_ours()
        return True

    def _is_outdated(self) -> bool:
        data = self._webui.sd_models.model_data
        chosen, loaded = str(data.forge_loading_parameters), data.forge_hash
        return bool(data.forge_loading_parameters) and chosen[chosen.find(_FORM) :] != loaded[loaded.find(_FORM) :]

    def _settle(self) -> None:
        parts = patchers(self._host.sd_model)
        if self._residence is None:
            self._residence = Residence(self._webui.memory_management, self._usual_latents())
        if any(holds_loras(patcher) for patcher in parts.values()):
            self._merged = self._host.sd_model
        self._residence.enter(parts, self._parts())

    def _usual_latents(self) -> tuple[int, int, int, int]:
        """Shape of the latents of two pictures of the model's own size."""
        info = self._info(self._host, self._host.architecture(self._host.tensors(PARTS), self._host.hints()))
        family = get_family(info.family)
        side = family.default_resolution(info)
        width, height = family.latents.size(side, side)
        return 2, family.latents.channels, height, width

    def _repaired(self, tensors: dict[str, Tensor], altered: list[str]) -> dict[str, Tensor]:
        # Layers of a GGUF replace what is stored plainly, as biases are, by what they compute with, once.
        storage = self._host.sd_model.forge_objects_original.unet.model.storage_dtype
        if storage == "gguf" and self._snapshot.rounded(tensors, altered):
            self._snapshot.take(tensors, altered)
            return tensors
        raise ModelAwayError(
            f"{self.checkpoint.title} was loaded in another form than the training began with. It goes on when VAE, "
            'text encoder and "Diffusion in Low Bits" are chosen as before.'
        )

    def _bind(self, tensors: dict[str, Tensor]) -> None:
        self._lent.bind(aliases(tensors))

    def make_room(self) -> None:
        assert self._residence is not None, "called inside a turn"
        self._residence.make_room(patchers(self._host.sd_model), self._parts())

    def _leave(self) -> None:
        if self._residence is not None:
            self._residence.leave()
        if self._turns.somebody_waits:
            self._step_aside()
            self._webui.devices.torch_gc()

    def _step_aside(self) -> None:
        super()._step_aside()
        self._host = None

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _select(self, title: str) -> None:
        self._webui.shared.opts.data["sd_model_checkpoint"] = title
        self._webui.main_entry.refresh_model_loading_parameters()

    def _load_ours(self) -> Any:
        data = self._webui.sd_models.model_data
        for _ in range(_TRIES):
            if not data.forge_loading_parameters:
                self._webui.main_entry.refresh_model_loading_parameters()
            selected = data.forge_loading_parameters
            ours = selected | {"checkpoint_info": self.checkpoint}
            data.forge_loading_parameters = ours
            try:
                self._webui.sd_models.forge_model_reload()
            except Exception as error:  # the host's loader raises whatever its libraries do
                data.forge_hash = ""  # or Forge would believe that the former model is still there
                raise self._could_not_load(error) from error
            finally:
                # Who selects a checkpoint does not wait for a turn; the choice stands.
                if data.forge_loading_parameters is ours:
                    data.forge_loading_parameters = selected
            loaded = self._loaded()
            if loaded is not None and self._is_ours(loaded):
                return loaded
            data.forge_hash = ""  # selected while Forge was about to load ours: it took that for ours
        raise self._could_not_load()

    # The end ------------------------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        super()._let_go()
        self._host = None

    def _restore(self) -> list[Callable[[], None]]:
        return [self._restore_selection, self._restore_loras]

    def _restore_selection(self) -> None:
        """The checkpoint that the user selected is loaded, be it the former one or one that had to wait."""
        if self._waiting_switch is not None:
            self._select(self._waiting_switch)
        if self._had_model and not self._follows_selection:
            self._webui.sd_models.forge_model_reload()

    def _restore_loras(self) -> None:
        """What the last prompt had merged is merged again, as Forge would do by itself for the next one."""
        sd_model, self._merged = self._merged, None
        if sd_model is not None and sd_model is self._loaded():
            memory, objects = self._webui.memory_management, sd_model.forge_objects_after_applying_lora
            try:
                with torch.inference_mode():
                    memory.load_models_gpu([objects.clip.patcher, objects.unet])
                return
            except Exception:  # the host's code: it could not merge them for the prompt either
                log.warning("Forge could not merge the last prompt's LoRAs again", exc_info=True)
            # Here, where the error keeps no memory any more.
            original = sd_model.forge_objects_original
            load_without_loras(memory, [original.clip.patcher, original.unet])


@torch.no_grad()
def aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same memory as tensors that autograd may save.

    Forge's are inference tensors, and so is whatever detach, view or Parameter make of them; only a new tensor that is
    set onto their storage is none.
    """
    found = {name: alias(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if getattr(tensor, "gguf_cls", None) is not None:
            pack(found[name], HostGguf(tensor.gguf_cls, tuple(map(int, tensor.shape)), tensor.computation_dtype))
        elif name.endswith(".weight") and (scale := found.get(name[: -len("weight")] + "scale_weight")) is not None:
            pack(found[name], Scaled(scale.float()))  # of fp8, which Forge may keep in fp16 or bf16
    return found


@dataclass(frozen=True)
class HostGguf:
    """See ``storage.Packing``: GGUF's blocks in the order that Forge brings them into when it loads them ("baked").

    kind: Forge's class of the format. scale_dtype: of the blocks' scales.
    """

    kind: Any
    shape: tuple[int, ...]
    scale_dtype: torch.dtype

    def shape_of(self, stored: Tensor) -> tuple[int, ...]:
        return self.shape

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        as_forge_has_it = SimpleNamespace(
            data=stored, baked=True, shape=torch.Size(self.shape), computation_dtype=self.scale_dtype
        )
        return self.kind.dequantize_pytorch(as_forge_has_it).to(dtype)

    def to(self, device: torch.device) -> HostGguf:
        return self


def alias(tensor: Tensor) -> Tensor:
    new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return new.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
