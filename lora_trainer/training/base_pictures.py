"""Pictures that the base model draws of what it knows, before the training: preserve shows them in place of yours.

Where the base's answer is the target, a picture of what is learned works against the learning: at low noise it is still
to be seen, and is to be answered as something else. The base's own pictures show what their captions say.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.cache import TensorCache, cache_key
from lora_trainer.dataset.samples import Size
from lora_trainer.errors import UserError
from lora_trainer.models.base import Conditioning, LentModel
from lora_trainer.out_of_memory import OutOfMemoryError, with_room
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.objectives.base import generator_for
from lora_trainer.training.ranks import Ranks
from lora_trainer.training.sampling import draw_latents, usual_cfg
from lora_trainer.training.source import Turn

VERSION = 1
"""Raised whenever the same settings give other pictures."""
STEPS = 20
GUIDANCE = 4.0
"""Of these pictures, where usual previews have no less. A weaker guidance draws weaker contrasts."""
EMPTY_SHARE = 0.1
"""Share of the times that one is shown with the empty caption, which guidance predicts as well; 0 without guidance."""


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
        self._conditioning, self._make_room = conditioning, make_room
        self._cfg = min(usual_cfg(model.schedule), GUIDANCE)
        self._takes_negative = model.schedule.takes_negative(self._cfg)
        self.bare: Callable[[], AbstractContextManager[None]] | None = None
        self.all: list[BasePicture] = []
        self._by_size: dict[Size, list[BasePicture]] = {}
        of_all, total = self._key(salt), sum(visits.values())
        for size, shown in sorted(visits.items()):
            for _ in range(max(1, round(len(captions) * shown / total))):
                number = len(self.all)
                caption = captions[number % len(captions)]
                key = cache_key(kind="base picture", of=of_all, caption=caption, size=list(size), number=number)
                self.all.append(BasePicture(number, caption, size, key))
                self._by_size.setdefault(size, []).append(self.all[-1])

    def _key(self, salt: str) -> str:
        """Of what they have in common."""
        config, schedule = self._config, self._model.schedule
        return cache_key(
            kind="base pictures",
            version=VERSION,
            salt=salt,
            schedule=[schedule.prediction_type, schedule.key, getattr(schedule, "mu", None)],
            weights=config.base_precision,
            tokens=config.max_token_length,
            weighted=config.weighted_captions,
            seed=config.seed,
            sampler=[STEPS, self._cfg],
        )

    @property
    def missing(self) -> bool:
        return any(one.key not in self._cache for one in self.all)

    def choose(self, size: Size, rng: random.Random) -> tuple[BasePicture, str]:
        """One of this size, and the caption that it is shown with."""
        chosen = rng.choice(self._by_size[size])
        return chosen, "" if self._takes_negative and rng.random() < EMPTY_SHARE else chosen.caption

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

        def moments() -> Tensor:
            noise = generator_for(self._config.seed, "base picture", picture.number)
            latents = draw_latents(
                self._model, self._conditioning, picture.caption, "", picture.size, noise, STEPS, self._cfg
            )
            return self._model.latent_moments(latents)[0].cpu()

        assert self.bare is not None, "whoever attaches the adapters says how they are switched off"
        try:
            with self._ranks.unhurried(), turn(), self.bare():
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
