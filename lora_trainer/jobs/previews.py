"""Previews by the host's own sampler, with the LoRA in training as it is now."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.config import TrainConfig
from lora_trainer.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from lora_trainer.host.base import Host
    from lora_trainer.models.base import Lender, ModelInfo

log = logging.getLogger(__name__)


class HostPreviewer:
    """A ``Previewer`` for ``run.train``: what it draws is what a generation with the finished LoRA will look like."""

    def __init__(self, host: Host, lender: Lender, config: TrainConfig, info: ModelInfo, folder: Path):
        """``folder``: of the job; the weights lie there for the time of a picture."""
        self._host, self._lender, self._config, self._info, self._folder = host, lender, config, info, folder

    def draw(self, prompt: str, seed: int, step: int, adapters: Any) -> Image.Image:
        """One picture at the training's size. Called outside a turn.

        Raises:
            UserError: it could not be drawn, whatever the reason; the training need not end for that.
        """
        from lora_trainer.adapters.export import save_lora
        from lora_trainer.host.requests import preview_request

        request = preview_request(prompt, self._config, self._info, seed)
        try:
            with tempfile.TemporaryDirectory(prefix=".preview-", dir=self._folder) as folder:
                lora = Path(folder) / f"step{step:08d}.safetensors"
                with self._lender.turn():
                    save_lora(adapters, lora, self._metadata())
                return self._host.draw(dataclasses.replace(request, lora=lora))
        except UserError:
            raise
        except Exception as error:  # the host's code, or its user took the model away in between
            log.warning("The host could not draw a preview", exc_info=True)
            raise UserError(f"The WebUI could not draw it: {error}") from error

    def _metadata(self) -> dict[str, str]:
        """What the hosts read to tell which base model a LoRA is for."""
        from lora_trainer.adapters.metadata import network_module
        from lora_trainer.models.families import get_family

        base = get_family(self._info.family).lora_metadata(self._info.prediction_type, self._info.architecture)
        return {**base, "ss_network_module": network_module(self._config)}
