"""AUTOMATIC1111's WebUI as a host. The only file that imports its modules, when they are needed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from lora_trainer.captioning.base import HostCaptioner
from lora_trainer.host.a1111.captioning import a1111_captioners
from lora_trainer.host.a1111.lender import A1111Lender
from lora_trainer.host.a1111.loras import A1111Loras
from lora_trainer.host.a1111.own_models import A1111OwnModels
from lora_trainer.host.base import LenderOptions
from lora_trainer.host.drawing import model_kept
from lora_trainer.host.webui import WebuiHost


def import_webui() -> SimpleNamespace:
    """The WebUI's modules that we touch, under one name. Raises ImportError outside of A1111."""
    from modules import (
        call_queue,
        deepbooru,
        devices,
        images,
        lowvram,
        paths,
        processing,
        sd_models,
        sd_unet,
        sd_vae,
        shared,
    )

    return SimpleNamespace(
        call_queue=call_queue, deepbooru=deepbooru, devices=devices, images=images, lowvram=lowvram, paths=paths,
        processing=processing, sd_models=sd_models, sd_unet=sd_unet, sd_vae=sd_vae, shared=shared,
    )  # fmt: skip


class A1111Host(WebuiHost):
    """See ``WebuiHost``."""

    name = "a1111"

    def __init__(self, webui: Any | None = None):
        webui = webui or import_webui()
        super().__init__(webui, A1111Loras(webui))

    def _lender(self, checkpoint: Any, options: LenderOptions) -> A1111Lender:
        return A1111Lender(self._webui, self._turns, checkpoint, options)

    def _own_models(self) -> A1111OwnModels:
        return A1111OwnModels(self._webui)

    def _added_files(self, path: Path) -> tuple[Path | None, tuple[Path, ...]]:
        vae = self._webui.sd_vae.resolve_vae(str(path)).vae
        return None if vae is None else Path(vae), ()

    def _modules(self, sd_model: Any) -> list[nn.Module]:
        return [sd_model]

    def _model_kept(self) -> AbstractContextManager[None]:
        return model_kept(self._webui, "reload_model_weights", lambda sd_model: sd_model)

    def captioners(self) -> dict[str, HostCaptioner]:
        return a1111_captioners(self._webui, self._turns)
