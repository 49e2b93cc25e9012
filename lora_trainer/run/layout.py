"""Whether the base model's convolutions lie channels last in memory: the setting ``channels_last``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_trainer.config import TrainConfig, parse_resolution
from lora_trainer.models.base import LentNetwork
from lora_trainer.models.families import get_family
from lora_trainer.models.families.parts import PartedModel
from lora_trainer.out_of_memory import is_out_of_memory, release_memory
from lora_trainer.training.ranks import Ranks

MIN_GAIN = 0.95
"""A level is laid out so where that takes at most this share of the time."""


class Layout:
    """The layout of one run's model. It is kept with the run's state, since sums in another are rounded otherwise.

    say: is told what was measured and chosen.
    """

    def __init__(self, config: TrainConfig, model: LentNetwork, ranks: Ranks, say: Callable[[str], None]):
        self._config, self._alone, self._say = config, ranks.size == 1, say
        self._model = model if isinstance(model, PartedModel) and model.has_layouts else None

    def choose(self) -> None:
        """Measure on the device which levels are faster so, and bring these into it. To be called where the setting is
        "auto", in a turn, before adapters are attached."""
        if self._model is None:
            self._say("channels_last is not used: it is for SD and SDXL models from a file, on a CUDA GPU or the CPU.")
        elif not self._alone:
            self._say("channels_last is not used: several processes train together.")
        else:
            self._measure(self._model)

    def _measure(self, model: PartedModel) -> None:
        family, size = get_family(model.info.family), parse_resolution(self._config.resolution)
        if not isinstance(size, tuple):
            side = family.default_resolution(model.info)
            size = side, side
        try:
            times = model.layout_times(family.latents.size(*size), self._config.batch_size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._say("channels_last is not used: memory is short.")
            release_memory()
            return
        chosen = [number for number, one in enumerate(times) if one.channels_last <= MIN_GAIN * one.stored]
        stored = ", ".join(f"{one.stored:.2f}" for one in times)
        laid_out = ", ".join(f"{one.channels_last:.2f}" for one in times)
        levels = ", ".join(map(str, chosen))
        if chosen:
            self._say(
                f"channels_last is used in levels {levels} of the UNet, counted from 0: a resnet of each level takes"
                f" {stored} ms without it and {laid_out} ms with it."
            )
        else:
            self._say(
                "channels_last is not used, as nothing is faster with it: a resnet of each level of the UNet takes"
                f" {stored} ms without it and {laid_out} ms with it."
            )
        model.use_channels_last(chosen)

    def state_dict(self) -> dict[str, Any]:
        return {"channels_last": [] if self._model is None else list(self._model.channels_last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._model is not None:
            self._model.use_channels_last(state["channels_last"])
