"""Pictures that the base model draws of what it knows, before the training: preserve shows them in place of yours.

Where the base's answer is the target, a picture of what is learned works against the learning: at low noise it is still
to be seen, and is to be answered as something else. The base's own pictures show what their captions say.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.cache import TensorCache, cache_key
from lora_trainer.dataset.samples import Size
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning, LentModel
from lora_trainer.models.families import get_family
from lora_trainer.out_of_memory import OutOfMemoryError, with_room
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.objectives.base import generator_for
from lora_trainer.training.ranks import Ranks
from lora_trainer.training.sampling import denoise, usual_cfg
from lora_trainer.training.source import Turn

VERSION = 1
"""Raised whenever the same settings give other pictures."""
STEPS = 20
GUIDANCE = 4.0
"""At most: less than in previews, which gives weaker contrasts and more kinds of pictures."""
EMPTY_SHARE = 0.1
"""So often one is shown with the empty caption, from which guidance draws away; never where there is no guidance."""


@dataclass(frozen=True)
class BasePicture:
    """caption: that it is drawn from. size: (width, height) in pixels. key: of its moments in the cache."""

    number: int
    caption: str
    size: Size
    key: str


class BasePictures:
    """captions: one for each picture. visits: how often an epoch shows pictures of each size; each size gets its share
    of the captions, one at least. salt: what the pictures depend on beside settings of their own. conditioning: encodes
    captions, all to one length.

    bare: inside, the model is the base: without its adapters. Set it before anything is drawn.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: LentModel,
        cache: TensorCache,
        captions: Sequence[str],
        visits: Mapping[Size, int],
        salt: str,
        conditioning: Callable[[Sequence[str]], Conditioning],
        make_room: Callable[[], None],
        ranks: Ranks,
    ):
        self._config, self._model, self._cache, self._ranks = config, model, cache, ranks
        self._family = get_family(model.info.family)
        self._conditioning, self._make_room = conditioning, make_room
        self._cfg = min(usual_cfg(model.schedule), GUIDANCE)
        self._takes_negative = model.schedule.takes_negative(self._cfg)
        self.bare: Callable[[], AbstractContextManager[None]] | None = None
        self.all: list[BasePicture] = []
        self._by_size: dict[Size, list[BasePicture]] = {}
        for size, shown in sorted(visits.items()):
            for _ in range(max(1, round(len(captions) * shown / sum(visits.values())))):
                number = len(self.all)
                caption = captions[number % len(captions)]
                self.all.append(BasePicture(number, caption, size, self._key(number, caption, size, salt)))
                self._by_size.setdefault(size, []).append(self.all[-1])

    def _key(self, number: int, caption: str, size: Size, salt: str) -> str:
        schedule = self._model.schedule
        return cache_key(
            kind="base picture",
            version=VERSION,
            salt=salt,
            schedule=[schedule.prediction_type, schedule.key, getattr(schedule, "mu", None)],
            weights=self._config.base_precision,
            caption=caption,
            tokens=self._config.max_token_length,
            weighted=self._config.weighted_captions,
            size=list(size),
            seed=[self._config.seed, number],
            sampler=[STEPS, self._cfg],
        )

    @property
    def missing(self) -> bool:
        return any(one.key not in self._cache for one in self.all)

    def choose(self, size: Size, rng: random.Random) -> tuple[BasePicture, str]:
        """One of this size, and the caption that it is shown with."""
        chosen = rng.choice(self._by_size[size])
        return chosen, "" if self._takes_negative and rng.random() < EMPTY_SHARE else chosen.caption

    def time_ids(self, size: Size) -> tuple[int, ...]:
        """See ``View.time_ids``."""
        width, height = size
        return height, width, 0, 0, height, width

    def draw(
        self, pictures: Sequence[BasePicture], turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands
    ) -> bool:
        """Those of ``pictures`` that the cache lacks, each in a turn of its own. Returns False when it was stopped.

        Raises:
            UserError: one does not fit into the device's memory, or holds numbers that are not finite.
        """
        missing = [one for one in pictures if one.key not in self._cache]
        found = len(pictures) - len(missing)
        callbacks.on_phase("known", found, len(pictures))
        for done, one in enumerate(missing, start=found + 1):
            with self._ranks.unhurried():
                commands.wait_while_paused()
            if commands.stopping:
                return False
            self._cache.put(one.key, {"moments": self._draw(one, turn)})
            callbacks.on_phase("known", done, len(pictures))
        return True

    def _draw(self, picture: BasePicture, turn: Turn) -> Tensor:
        """Its moments (2C, h, w) on the CPU. One at a time, as their number would change the last bit."""
        model, latent_format = self._model, self._family.latents
        prompts = ["", picture.caption] if self._takes_negative else [picture.caption]
        shape = (1, latent_format.channels, *reversed(latent_format.size(*picture.size)))
        noise = torch.randn(shape, generator=generator_for(self._config.seed, "base picture", picture.number))
        time_ids = self._family.time_ids([self.time_ids(picture.size)] * len(prompts))

        def moments() -> Tensor:
            latents = denoise(model, self._conditioning(prompts), noise, time_ids, STEPS, self._cfg)
            return model.latent_moments(latents)[0].cpu()

        assert self.bare is not None, "whoever attaches the adapters says how they are switched off"
        try:
            with self._ranks.unhurried(), turn(), torch.no_grad(), self.bare():
                drawn = with_room(moments, self._make_room)
        except OutOfMemoryError as error:
            width, height = picture.size
            raise UserError(
                f"The base model cannot draw a picture of {width}×{height} in the GPU's memory.",
                field="preserve_pictures",
                remedy="Set it to 0, lower resolution, or close other programs that use the GPU.",
            ) from error
        if not drawn.isfinite().all():
            raise UserError(
                f'The base model draws a picture of "{picture.caption}" that is not finite (NaN).',
                field="preserve_pictures",
                remedy="Set it to 0, or choose another mixed_precision or base_model.",
            )
        return drawn
