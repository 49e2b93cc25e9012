"""What the steps are fed with: latents and captions, encoded once and kept on disk, put together batch by batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from lora_trainer import plugins
from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.buckets import BatchPlan
from lora_trainer.dataset.cache import PIXELS_VERSION, TensorCache, cache_key, latent_key, prompt_key
from lora_trainer.dataset.caption_files import some
from lora_trainer.dataset.images import load_mask, load_view
from lora_trainer.dataset.samples import Dataset, View, uncut
from lora_trainer.devices import to_device
from lora_trainer.errors import RetryError, UserError
from lora_trainer.files import sha256_file
from lora_trainer.models.base import Conditioning, LentModel
from lora_trainer.models.families import get_family
from lora_trainer.out_of_memory import OutOfMemoryError, with_room
from lora_trainer.training.base_pictures import BasePictures
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.objectives.pictures import Batch
from lora_trainer.training.precision import Precision
from lora_trainer.training.ranks import ALONE, Ranks
from lora_trainer.training.run_captions import RunCaptions
from lora_trainer.training.sharing import Item, shared_out
from lora_trainer.training.source import WHOLE, Turn, ahead

CAPTIONS_PER_TURN = 16


class BatchSource:
    """The ``Source`` of runs on pictures.

    ``prepare`` encodes everything that does not change from epoch to epoch; ``prepare_epoch`` the rest, which is
    only random crops, scales and augmentations. ``micro_batches`` then reads what one optimizer step needs, without
    using the device.
    """

    sample, size_setting = "picture", "resolution"
    blame = "The model or its VAE is damaged: choose another base_model or vae."

    def __init__(
        self,
        config: TrainConfig,
        model: LentModel,
        dataset: Dataset,
        plan: BatchPlan,
        cache: TensorCache,
        precision: Precision,
        keep_model_parts: bool = False,
        make_room: Callable[[], None] = lambda: None,
        ranks: Ranks = ALONE,
    ):
        self.config = config
        self.model = model
        self.family = get_family(model.info.family)
        self.dataset = dataset
        self.plan = plan
        self.cache = cache
        self.precision = precision
        self.keep_model_parts = keep_model_parts  # previews need the VAE and the text encoders
        self.make_room = make_room  # see Lender.make_room
        self.ranks = ranks
        # From epoch to epoch.
        self._pictures_vary = config.random_crop or config.min_scale < 1 or bool(config.augmentations)
        self._vae_key = plugins.marked(model.vae_key, "family", model.info.family)
        self._text_key = plugins.marked(model.text_key, "family", model.info.family)
        self.captions = RunCaptions(config, dataset)
        self.caches_prompts = not self.captions.vary and not config.train_text_encoder
        self._found_whole = False  # the cache has all that the run reads, so prepare need not look again
        self._epoch_batches = lru_cache(maxsize=2)(plan.epoch)
        self._visits_before = lru_cache(maxsize=2)(self._count_visits)
        self._mask_digest = lru_cache(maxsize=None)(sha256_file)
        self.base_pictures = self._base_pictures() if config.preserve and config.preserve_pictures else None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; the last of an epoch may hold fewer batches than the others."""
        return -(-self.plan.steps_per_epoch // self.config.gradient_accumulation_steps)

    @property
    def total_steps(self) -> int:
        return self.config.max_train_steps or self.config.epochs * self.steps_per_epoch

    # -- encoding -----------------------------------------------------------------------------------------------

    def prepare(self, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        """Encode what the whole run reads, each batch in a turn of its own, and release what encoded it.

        Returns False when it was stopped on the way. What was encoded stays in the cache.

        Raises:
            UserError: a picture cannot be read, or not even one fits into the device's memory.
        """
        texts = self.captions.texts
        self.captions.forget()
        self._tell_cut_captions(texts, callbacks)
        if set(self.captions.unnamed) == {""}:
            callbacks.on_warning(
                "preserve keeps only what the empty caption gives: no trigger_word and no bold part of a caption says "
                "what is learned, or the captions have no other words. Give both, or set preserve: 0."
            )
        whole = self._found_whole and self.ranks.size == 1  # several look together, and not at one disk
        views, how = [] if whole else self._views(), (turn, callbacks, commands)
        if not self._pictures_vary:
            if not whole and not self._shared_out(views, lambda views: self._encode_latents(views, *how)):
                return False
            if not self.keep_model_parts:
                self.model.release("vae")
        if self.caches_prompts:
            captions = [] if whole else self._to_encode(views, texts)
            if not whole and not self._shared_out(captions, lambda some: self._encode_captions(some, *how)):
                return False
            if not self.keep_model_parts:
                self.model.release("text_encoders")
        pictures = self.base_pictures
        if pictures is None or whole:
            return True
        return self._shared_out(pictures.all, lambda some: pictures.draw(some, *how))

    def _base_pictures(self) -> BasePictures:
        own = (view for batch in self._epoch_batches(0) for view in batch if not self._regularizes(view))
        return BasePictures(
            self.config,
            self.model,
            self.cache,
            self.captions.unnamed[1:],
            Counter(view.bucket for view in own),
            f"{self.model.network_key}:{self._text_key}:{self.precision.name}",
            self._read_conditioning if self.caches_prompts else self._encode_each,
            self.make_room,
            self.ranks,
        )

    def _regularizes(self, view: View) -> bool:
        return self.dataset.samples[view.sample].is_regularization

    def _to_encode(self, views: Sequence[View], texts: Sequence[str]) -> list[str]:
        """All that are encoded before the steps."""
        return sorted({"", *(texts[view.sample] for view in views), *self.captions.unnamed})

    def _shared_out(self, items: Sequence[Item], encode: Callable[[Sequence[Item]], bool]) -> bool:
        return shared_out(items, encode, self.cache, self.ranks)

    def _tell_cut_captions(self, texts: Sequence[str], callbacks: TrainCallbacks) -> None:
        longest = self.config.max_token_length
        cut = [
            sample.key
            for sample, text in zip(self.dataset.samples, texts)
            if not (text.isascii() and len(text) < longest) and self.model.count_tokens(text) > longest
        ]
        if cut:
            callbacks.on_warning(
                f"{len(cut)} captions are longer than max_token_length ({longest} tokens), and their ends are not "
                f"read: {some(cut)}."
            )

    def prepare_epoch(self, epoch: int, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        """Encode an epoch's random crops and augmented pictures, if there are any; of several processes each its own.
        Returns False when stopped."""
        if not self._pictures_vary:
            return True
        batches, size = self._visited(epoch), self.config.gradient_accumulation_steps
        steps = (batches[first : first + size] for first in range(0, len(batches), size))
        views = [view for step in steps for batch in step[self.ranks.share] for view in batch]
        with self.ranks.working():
            return self._encode_latents(views, turn, callbacks, commands)

    def _visited(self, epoch: int) -> list[list[View]]:
        """The batches of an epoch that the run comes to."""
        steps = self.total_steps - epoch * self.steps_per_epoch
        if steps <= 0:  # a slider's smaller kind is gone through more often than by itself
            return self._epoch_batches(epoch)
        return self._epoch_batches(epoch)[: steps * self.config.gradient_accumulation_steps]

    def _views(self) -> list[View]:
        """Each picture as it is ever shown. Not every epoch visits every regularization picture, so look at more."""
        shown: dict[tuple[int, bool], View] = {}
        everything = range(len(self.dataset.samples))
        for epoch in range(-(-self.total_steps // self.steps_per_epoch)):
            for view in (view for batch in self._visited(epoch) for view in batch):
                for flip in (False, True) if self.config.flip else (view.flip,):
                    shown.setdefault((view.sample, flip), replace(view, flip=flip))
            if {sample for sample, _ in shown}.issuperset(everything):
                break
        return list(shown.values())

    def _encode_latents(
        self, views: Sequence[View], turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands
    ) -> bool:
        total = len(views)
        missing = {key: view for view in views if (key := self._latent_key(view)) not in self.cache}
        done = total - len(missing)
        callbacks.on_phase("latents", done, total)
        for key, pixels in ahead(self._load_pixels, missing.items()):
            with self.ranks.unhurried():
                commands.wait_while_paused()
            if commands.stopping:
                return False
            self.cache.put(key, {"moments": self._encode(pixels, turn)})
            done += 1
            callbacks.on_phase("latents", done, total)
        return True

    def _load_pixels(self, keyed: tuple[str, View]) -> tuple[str, Tensor]:
        key, view = keyed
        return key, load_view(self.dataset.samples[view.sample], view, self.config.augmentations)

    def _encode(self, pixels: Tensor, turn: Turn) -> Tensor:
        """(3, H, W) -> moments (2C, h, w) on the CPU.

        One picture at a time: it fills a GPU, several would take gigabytes from whoever shares its memory, and their
        number would change the last bit of the result.
        """

        def encode() -> Tensor:
            return self.model.encode_images(to_device(pixels[None], self.model.device))[0].float().cpu()

        try:
            with turn(), torch.no_grad():
                return with_room(encode, self.make_room)
        except OutOfMemoryError as error:
            height, width = pixels.shape[-2:]
            raise UserError(
                f"A picture of {width}×{height} cannot be encoded in the GPU's memory.",
                field="resolution",
                remedy="Lower it, or close other programs that use the GPU.",
            ) from error

    def _encode_captions(
        self, texts: Sequence[str], turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands
    ) -> bool:
        captions = sorted(set(texts))
        missing = [caption for caption in captions if self._prompt_key(caption) not in self.cache]
        done = len(captions) - len(missing)
        callbacks.on_phase("captions", done, len(captions))
        for start in range(0, len(missing), CAPTIONS_PER_TURN):
            with self.ranks.unhurried():
                commands.wait_while_paused()
            if commands.stopping:
                return False
            some = missing[start : start + CAPTIONS_PER_TURN]
            with turn(), torch.no_grad():
                # One by one: captions of unequal length would be filled up to the longest of them.
                encoded = [self._encode_caption(caption) for caption in some]
                for caption, conditioning in zip(some, encoded):
                    conditioning = conditioning.to("cpu", self.precision.compute_dtype)
                    self.cache.put(self._prompt_key(caption), conditioning.tensors)
            done += len(some)
            callbacks.on_phase("captions", done, len(captions))
        return True

    def _encode_caption(self, caption: str) -> Conditioning:
        try:
            return with_room(lambda: self.encode_prompts([caption]), self.make_room)
        except OutOfMemoryError as error:
            raise UserError(
                "The captions cannot be encoded in the GPU's memory.",
                field="device",
                remedy="Close other programs that use the GPU.",
            ) from error

    def _encode_each(self, captions: Sequence[str]) -> Conditioning:
        """As the cache would have them: captions that are encoded together differ in the last bit."""
        encoded = {
            caption: self.encode_prompts([caption]).to("cpu", self.precision.compute_dtype)
            for caption in {"", *captions}
        }
        return self.family.collate([encoded[caption] for caption in captions], encoded[""])

    def encode_prompts(self, captions: Sequence[str], rows: slice = slice(None)) -> Conditioning:
        """Captions as this run reads them, (B, 77·chunks, D); with gradients when the text encoders are trained.

        ``rows``: those that are encoded; they are padded to the length of the longest of all ``captions``.
        """
        return self.model.encode_prompts(captions, self.config.max_token_length, self.config.weighted_captions, rows)

    def worth_trying(self) -> bool:
        """See ``Source``: not where the cache has everything."""
        if self._pictures_vary:
            return True
        views = self._views()
        if any(self._latent_key(view) not in self.cache for view in views):
            return True
        if self.base_pictures is not None and self.base_pictures.missing:
            return True
        captions = self._to_encode(views, self.captions.texts) if self.caches_prompts else []
        self._found_whole = all(self._prompt_key(caption) in self.cache for caption in captions)
        return not self._found_whole

    def trial_batch(self, number: int, turn: Turn, commands: TrainCommands) -> Batch | None:
        """See ``Source``. What it encodes is found again by ``prepare``."""
        batches = self._epoch_batches(0)

        def size(place: int) -> int:
            return len(batches[place]) * math.prod(batches[place][0].bucket)

        order = sorted(range(len(batches)), key=size, reverse=True)
        if number >= len(order):
            return None
        views, silent = batches[order[number]], TrainCallbacks()
        if not self._encode_latents(views, turn, silent, commands):
            return None
        texts = [self.captions.text(view.sample) for view in views]
        if self.caches_prompts and not self._encode_captions(["", *texts], turn, silent, commands):
            return None
        return self._batch(views, 0, self._visits_before(0)[order[number]], preserves=False)

    # -- reading --------------------------------------------------------------------------------------------------

    def micro_batches(self, epoch: int, position: int, share: slice = WHOLE) -> list[Batch]:
        """``gradient_accumulation_steps`` consecutive batches of the epoch's plan, or what is left of them at its end.
        Reads the disk only; safe in a thread.

        Raises:
            RetryError: the cache was damaged or removed while the run was going on.
        """
        size = self.config.gradient_accumulation_steps
        batches = self._epoch_batches(epoch)
        places = range(len(batches))[position * size : (position + 1) * size]
        before = self._visits_before(epoch)
        return [self._batch(batches[place], epoch, before[place]) for place in places[share]]

    def _count_visits(self, epoch: int) -> list[int]:
        """Of each batch of an epoch, how many pictures the epoch saw before it."""
        return [0, *accumulate(map(len, self._epoch_batches(epoch)))]

    def _batch(self, views: Sequence[View], epoch: int, visit: int, preserves: bool = True) -> Batch:
        """``visit``: how many pictures the epoch saw before; with seed and epoch it names the caption's dice.

        preserves: False for a batch in which every picture is learned, whatever ``preserve`` says.
        """
        samples = [self.dataset.samples[view.sample] for view in views]
        preserved = self._preserved(views, epoch, visit) if preserves and self.config.preserve else None
        shown = [
            self._shown(view, f"{self.config.seed}:{epoch}:{visit + offset}", offset in (preserved or ()))
            for offset, view in enumerate(views)
        ]
        captions = tuple(caption for _, caption, _ in shown)
        prior = self.config.prior_loss_weight
        return Batch(
            moments=torch.stack([self._read(key)["moments"] for key, _, _ in shown]),
            captions=captions,
            conditioning=self._read_conditioning(captions) if self.caches_prompts else None,
            time_ids=self.family.time_ids([time_ids for _, _, time_ids in shown]),
            mask=torch.stack([self._mask(view) for view in views]) if self.config.use_masks else None,
            weights=torch.tensor([prior if sample.is_regularization else 1.0 for sample in samples]),
            preserved=None if preserved is None else torch.tensor([at in preserved for at in range(len(views))]),
        )

    def _preserved(self, views: Sequence[View], epoch: int, visit: int) -> set[int]:
        """Places in the batch that keep what the base knows: ``preserve`` of them, chance rounds up or down."""
        rng = random.Random(f"{self.config.seed}:{epoch}:{visit}:preserve")
        own = [at for at, view in enumerate(views) if not self._regularizes(view)]
        return set(rng.sample(own, int(self.config.preserve * len(own) + rng.random())))

    def _shown(self, view: View, dice: str, preserved: bool) -> tuple[str, str, tuple[int, ...]]:
        """Key of the moments, caption and time_ids of a picture. dice: names those of its caption."""
        rng = random.Random(dice)
        if not preserved:
            return self._latent_key(view), self.captions.shown(view.sample, rng), view.time_ids
        if self.base_pictures is None:
            return self._latent_key(view), rng.choice(self.captions.unnamed), view.time_ids
        picture, caption = self.base_pictures.choose(view.bucket, rng)
        return picture.key, caption, uncut(picture.size)

    def _read_conditioning(self, captions: Sequence[str]) -> Conditioning:
        def read(caption: str) -> Conditioning:
            return Conditioning.from_tensors(self._read(self._prompt_key(caption)))

        return self.family.collate([read(caption) for caption in captions], read(""))

    def _mask(self, view: View) -> Tensor:
        """(1, h, w); ones where there is none. Kept in the cache, as reading it means decoding the picture."""
        sample, size = self.dataset.samples[view.sample], self.family.latents.size(*view.bucket)
        key = cache_key(
            kind="mask",
            version=PIXELS_VERSION,
            image=sample.digest,
            mask=sample.mask_path and self._mask_digest(sample.mask_path),
            view=[view.scaled, view.bucket, view.crop, view.flip, *([view.place] if view.place else [])],
            size=size,
        )
        if (known := self.cache.get(key)) is not None:
            return known["mask"]
        mask = load_mask(sample, view, size)
        if mask is None:
            mask = torch.ones(1, *reversed(size))
        self.cache.put(key, {"mask": mask})
        return mask

    def _read(self, key: str) -> dict[str, Tensor]:
        tensors = self.cache.get(key)
        if tensors is None:
            raise RetryError(
                f"{self.cache.path(key).name} was damaged or removed while the training was going on.",
                field="cache_dir",
                remedy="Start the run again: it makes the file anew and goes on from its last state.",
            )
        return tensors

    def _latent_key(self, view: View) -> str:
        return latent_key(self.dataset.samples[view.sample], view, self._vae_key, self.config.augmentations)

    def _prompt_key(self, caption: str) -> str:
        text_key = f"{self._text_key}:{self.precision.name}"
        return prompt_key(caption, text_key, self.config.max_token_length, self.config.weighted_captions)
