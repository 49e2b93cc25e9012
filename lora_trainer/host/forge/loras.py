"""Forge's builtin Lora extension and its patchers, which merge LoRAs by putting other parameters in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_trainer.errors import UserError
from lora_trainer.host.forge.model import FLOATS
from lora_trainer.host.lending import loaded_model
from lora_trainer.host.loras import HostLoras, forget_prompts

_ONLINE = "online_lora"
_UNKNOWN = "forgotten"
"""Equal to no list of LoRAs, so that Forge puts together anew what the next prompt names, be it none."""


class ForgeLoras(HostLoras):
    """What is merged is decided twice: ``current_lora_hash`` of the model says which patchers the next prompt needs,
    ``loaded_hash`` of each part's loader what its parameters hold. Both go by file name, whatever the weights are.
    """

    def __init__(self, webui: Any):
        self._webui = webui

    def unmerge(self, sd_model: Any) -> bool:
        objects = sd_model.forge_objects_original
        patchers = [patcher for patcher in (objects.unet, objects.clip.patcher) if holds_loras(patcher)]
        if patchers:
            load_without_loras(self._webui.memory_management, patchers)
        return bool(patchers)

    def obstacle(self, sd_model: Any) -> str | None:
        unet = sd_model.forge_objects_original.unet.model
        applies = self._chose_online() and unet.storage_dtype not in FLOATS  # into those it merges, whatever was chosen
        if applies or can_merge(unet):
            return None
        choice = "Automatic" if unet.storage_dtype == "gguf" else "float8-e4m3fn"
        return (
            'Forge cannot merge a LoRA into weights in this format: set "Diffusion in Low Bits" to '
            f'"{choice} (fp16 LoRA)" to draw with it.'
        )

    def forget(self, sd_model: Any, name: str, processing: Any) -> None:
        self._forget_files()
        self.unmerge(sd_model)
        forget_prompts(processing)

    def _forget_files(self) -> None:
        if self.networks is not None:
            self.networks.load_lora_state_dict.cache_clear()
        sd_model = loaded_model(self._webui)
        if sd_model is not None:
            sd_model.current_lora_hash = _UNKNOWN

    @contextmanager
    def registered(self, name: str, path: Path) -> Iterator[None]:
        self._forget_files()
        loaded, arguments = loaded_model(self._webui), self._webui.dynamic_args
        unet: Any = None if loaded is None else loaded.forge_objects_original.unet.model
        merged = unet is None or can_merge(unet)
        if not merged:
            if unet.storage_dtype in FLOATS:  # Forge merges nevertheless, and the picture is wrong
                raise UserError(self.obstacle(loaded) or "")
            arguments[_ONLINE] = True
        try:
            with super().registered(name, path):
                yield
        finally:
            if not merged:
                arguments[_ONLINE] = self._chose_online()  # which may have changed meanwhile
            self._forget_files()

    def _chose_online(self) -> bool:
        """Whether "Diffusion in Low Bits" says "fp16 LoRA"."""
        name = self._webui.shared.opts.forge_unet_storage_dtype
        return bool(self._webui.main_entry.forge_unet_storage_dtype_options.get(name, (None, False))[1])

    def unmatched(self, sd_model: Any, path: Path) -> list[str]:
        # Not by Forge's own reader, which renames a file that it cannot read.
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        objects = sd_model.forge_objects_original
        _, tensors = self.networks.load_lora(tensors, self.networks.model_lora_keys_unet(objects.unet.model, {}))
        _, tensors = self.networks.load_lora(
            tensors, self.networks.model_lora_keys_clip(objects.clip.cond_stage_model, {})
        )
        return sorted({key.partition(".")[0] for key in tensors})


def holds_loras(patcher: Any) -> bool:
    """Whether LoRAs are merged into this part's parameters, or hang on its layers."""
    loader = patcher.lora_loader
    return bool(loader.backup or loader.online_backup)


def can_merge(unet: Any) -> bool:
    """Whether Forge can merge LoRAs into a UNet's or transformer's weights as they are kept; else it can apply them as
    layers compute. It knows how to write only some formats of GGUF, and takes scaled fp8 for unscaled."""
    model = unet.diffusion_model
    named = [(name, getattr(weight, "gguf_cls", None)) for name, weight in model.named_parameters()]
    kinds = {kind for name, kind in named if "blocks" in name} - {None}
    is_scaled = any(name.endswith(".scale_weight") for name, _ in named)
    return not is_scaled and all("quantize_blocks_pytorch" in vars(kind) for kind in kinds)


def load_without_loras(memory_management: Any, patchers: Sequence[Any], **wishes: Any) -> None:
    """Have Forge load these parts, which have no patches, with their own weights.

    wishes: what else ``load_models_gpu`` is asked for.
    """
    # Forge loads in inference mode too: what it moves then stays an inference tensor, as it expects.
    with torch.inference_mode():
        memory_management.load_models_gpu(patchers, **wishes)
        for patcher in patchers:
            if holds_loras(patcher):  # merging had failed halfway, and Forge takes the part for one without LoRAs
                patcher.lora_loader.refresh({}, force_refresh=True)
