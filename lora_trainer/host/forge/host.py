"""Forge as a host. The only file that imports its modules, when they are needed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from lora_trainer.captioning.base import HostCaptioner
from lora_trainer.host.base import LenderOptions
from lora_trainer.host.drawing import model_kept
from lora_trainer.host.forge.captioning import forge_captioners
from lora_trainer.host.forge.lender import ForgeLender
from lora_trainer.host.forge.loras import ForgeLoras
from lora_trainer.host.forge.model import patchers
from lora_trainer.host.forge.own_models import ForgeOwnModels
from lora_trainer.host.webui import WebuiHost
from lora_trainer.models.tensors import open_source

_VAE = {f"{prefix}decoder.conv_in.weight" for prefix in ("", "first_stage_model.", "vae.")}
"""One of these is in every VAE's file."""


def import_webui() -> SimpleNamespace:
    """The WebUI's modules that we touch, under one name. Raises ImportError outside of Forge."""
    from backend import memory_management
    from backend.args import dynamic_args
    from backend.patcher.base import ModelPatcher
    from modules import call_queue, deepbooru, devices, images, paths, processing, sd_models, shared
    from modules_forge import main_entry

    return SimpleNamespace(
        ModelPatcher=ModelPatcher, call_queue=call_queue, deepbooru=deepbooru, devices=devices,
        dynamic_args=dynamic_args, images=images, main_entry=main_entry, memory_management=memory_management,
        paths=paths, processing=processing, sd_models=sd_models, shared=shared,
    )  # fmt: skip


class ForgeHost(WebuiHost):
    """See ``WebuiHost``."""

    name = "forge"

    def __init__(self, webui: Any | None = None):
        webui = webui or import_webui()
        super().__init__(webui, ForgeLoras(webui))

    def _lender(self, checkpoint: Any, options: LenderOptions) -> ForgeLender:
        return ForgeLender(self._webui, self._turns, checkpoint, options)

    def _own_models(self) -> ForgeOwnModels:
        return ForgeOwnModels(self._webui)

    def _added_files(self, path: Path) -> tuple[Path | None, tuple[Path, ...]]:
        added = [Path(one) for one in getattr(self._webui.shared.opts, "forge_additional_modules", None) or ()]
        vaes = [one for one in added if _VAE & open_source(one).shapes.keys()]
        return next(iter(vaes), None), tuple(one for one in added if one not in vaes)

    def _modules(self, sd_model: Any) -> list[nn.Module]:
        return [patcher.model for patcher in patchers(sd_model).values()]

    def _model_kept(self) -> AbstractContextManager[None]:
        return model_kept(self._webui, "forge_model_reload", lambda sd_model: (sd_model, False))

    def captioners(self) -> dict[str, HostCaptioner]:
        return forge_captioners(self._webui, self._turns)
