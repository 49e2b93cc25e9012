"""The captions that a run on pictures reads."""

from __future__ import annotations

import random

from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.captions import one_of, train_text
from lora_trainer.dataset.samples import Dataset
from lora_trainer.dataset.unnamed import other_captions, unnamed_captions


class RunCaptions:
    """unnamed: what stands in the place of a caption for preserve, the empty caption first; empty without preserve.
    vary: whether a picture's caption differs from epoch to epoch."""

    def __init__(self, config: TrainConfig, dataset: Dataset):
        self._config, self._samples = config, dataset.samples
        self.vary = config.shuffle_tags or config.tag_dropout > 0 or config.wildcards
        self.unnamed = self._unnamed() if config.preserve else []
        self._texts: list[str] = []

    @property
    def texts(self) -> list[str]:
        """Of each sample its caption as it is where nothing is drawn; kept until ``forget``."""
        if not self._texts:
            self._texts = [self.text(index) for index in range(len(self._samples))]
        return self._texts

    def forget(self) -> None:
        self._texts = []

    def text(self, index: int, rng: random.Random | None = None) -> str:
        """Of a sample. rng: draws what differs from epoch to epoch."""
        config, sample = self._config, self._samples[index]
        text = train_text(
            one_of(sample.caption, config.wildcards, rng),
            trigger_word="" if sample.is_regularization else config.trigger_word,
            keep_tokens=config.keep_tokens,
            shuffle=config.shuffle_tags,
            tag_dropout=config.tag_dropout,
            rng=rng,
            weighted=config.weighted_captions,
        )
        return self._joined(text)

    def shown(self, index: int, rng: random.Random) -> str:
        """What a step reads of a sample that is learned."""
        return "" if rng.random() < self._config.caption_dropout else self.text(index, rng)

    def _unnamed(self) -> list[str]:
        config = self._config
        captions = [
            one_of(sample.caption, config.wildcards, None) for sample in self._samples if not sample.is_regularization
        ]
        if config.preserve_pictures:
            others = other_captions(
                captions,
                config.trigger_word,
                config.seed,
                config.preserve_words,
                config.preserve_pictures,
                config.weighted_captions,
            )
            return ["", *map(self._joined, others)]
        return unnamed_captions(captions, config.trigger_word, config.seed, config.preserve_words)

    def _joined(self, text: str) -> str:
        """Without the separator of parts that are kept together."""
        if not (separator := self._config.secondary_separator):
            return text
        return ", ".join(part for piece in text.split(separator) if (part := piece.strip(" ,")))
