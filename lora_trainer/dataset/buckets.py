"""Aspect buckets and the order of an epoch.

Each picture goes to the bucket of the nearest aspect ratio; a batch holds pictures of one bucket. No picture is ever
dropped: a batch that does not fill up is trained as it is. Everything is a pure function of the samples, the settings,
the seed and the number of the epoch, so a resumed run needs no state and gets the very same batches.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from lora_trainer.config import TrainConfig, parse_resolution
from lora_trainer.dataset.samples import Dataset, Size, View
from lora_trainer.dataset.smaller import draw_place
from lora_trainer.errors import UserError


class BatchPlan:
    """Which pictures make up which batch of which epoch.

    dataset.samples: in each epoch every training sample is visited exactly ``repeats`` times. Regularization samples
        get as many visits as all training samples together, spread evenly over them.
    resolution: (width, height) whose area the buckets have; without ``enable_bucket`` the only size there is.
    min_bucket_resolution, max_bucket_resolution: limits of a bucket's sides. A minimum that the resolution itself does
        not exceed would leave a single bucket; it then becomes half of the resolution's shorter side.
    no_upscale: a picture smaller than its bucket is trained at its own size, cut to multiples of ``bucket_step``
        (only a picture with a side shorter than one step is enlarged, to one step).
    multiple: of so many pixels are the sides of the resolution and of every bucket; the model's.

    Raises:
        UserError: a size that no latent can have.
    """

    def __init__(
        self,
        dataset: Dataset,
        resolution: Size,
        *,
        batch_size: int = 1,
        seed: int = 42,
        flip: bool = False,
        random_crop: bool = False,
        min_scale: float = 1.0,
        augment: bool = False,
        enable_bucket: bool = True,
        bucket_step: int = 64,
        min_bucket_resolution: int = 256,
        max_bucket_resolution: int = 2048,
        no_upscale: bool = False,
        multiple: int,
    ):
        if bucket_step < multiple or bucket_step % multiple:
            message = f"{bucket_step} is not a multiple of {multiple}, which this model needs."
            raise UserError(message, field="bucket_step", remedy=f"Use 64, or another multiple of {multiple}.")
        if min(resolution) < multiple:
            message = f"{resolution[0]}x{resolution[1]} is too small."
            raise UserError(message, field="resolution", remedy="Use 512, or 1024 for SDXL.")
        self.dataset = dataset
        self.resolution = _multiple(resolution[0], multiple), _multiple(resolution[1], multiple)
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.random_crop = random_crop
        self.min_scale = min_scale
        self.augment = augment
        self._step = bucket_step
        self._longest = max(max_bucket_resolution, *self.resolution)
        if enable_bucket:
            self.buckets = make_buckets(self.resolution, bucket_step, min_bucket_resolution, self._longest)
        else:
            self.buckets = [self.resolution]
        self._no_upscale = no_upscale and enable_bucket
        choose = lru_cache(maxsize=4096)(self._choose)
        self._bucket_of = [choose(sample.size) for sample in dataset.samples]
        self._place = lru_cache(maxsize=4096)(self._crop)
        self._training = [index for index, sample in enumerate(dataset.samples) if not sample.is_regularization]
        self._quotas = self._share_regularization()

    @classmethod
    def from_config(
        cls, dataset: Dataset, config: TrainConfig, default_resolution: int, multiple: int
    ) -> BatchPlan:
        """The plan of a run. default_resolution: the base model's, in pixels, for ``resolution: auto``."""
        resolution = parse_resolution(config.resolution)
        if resolution is None:
            message = f"{config.resolution!r} is no size."
            raise UserError(message, field="resolution", remedy="Write auto, 512 or 768x512.")
        return cls(
            dataset,
            (default_resolution, default_resolution) if isinstance(resolution, str) else resolution,
            batch_size=config.batch_size,
            seed=config.seed,
            flip=config.flip,
            random_crop=config.random_crop,
            min_scale=config.min_scale,
            augment=bool(config.augmentations),
            enable_bucket=config.enable_bucket,
            bucket_step=config.bucket_step,
            min_bucket_resolution=config.min_bucket_resolution,
            max_bucket_resolution=config.max_bucket_resolution,
            no_upscale=config.bucket_no_upscale,
            multiple=multiple,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same for every epoch."""
        return sum(math.ceil(count / self.batch_size) for count in self._visits_per_bucket().values())

    @property
    def visits_per_epoch(self) -> int:
        """Pictures that are shown in an epoch, each as often as it is repeated; regularization pictures too."""
        return sum(self._visits_per_bucket().values())

    def epoch(self, epoch: int) -> list[list[View]]:
        """The batches of an epoch (counted from any number), in the order of training."""
        groups: dict[Size, list[View]] = {}
        for index in self._training:
            for visit in range(self.dataset.samples[index].repeats):
                groups.setdefault(self._bucket_of[index], []).append(self._view(index, epoch, visit))
        for bucket, (members, quota) in self._quotas.items():
            for count in range(quota):
                # Goes on where the last epoch ended, so that in the long run all are seen equally often.
                turn, place = divmod(epoch * quota + count, len(members))
                groups.setdefault(bucket, []).append(self._view(members[place], epoch, turn))
        batches = []
        for bucket in sorted(groups):
            items = groups[bucket]
            shuffle(items, random.Random(f"{self.seed}:{epoch}:bucket:{bucket[0]}x{bucket[1]}"))
            batches += [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        shuffle(batches, random.Random(f"{self.seed}:{epoch}:batches"))
        return batches

    def table(self) -> list[dict[str, Any]]:
        """The buckets in use: resolution (width, height), images, count (visits per epoch), batches per epoch, and
        ar_error, the mean difference between the aspect ratios (width / height) of pictures and bucket."""
        rows = []
        members: dict[Size, list[Size]] = {}
        for sample, bucket in zip(self.dataset.samples, self._bucket_of):
            members.setdefault(bucket, []).append(sample.size)
        for bucket, count in sorted(self._visits_per_bucket().items()):
            sizes = members[bucket]
            errors = [abs(width / height - bucket[0] / bucket[1]) for width, height in sizes]
            rows.append(
                {
                    "resolution": bucket,
                    "images": len(sizes),
                    "count": count,
                    "batches": math.ceil(count / self.batch_size),
                    "ar_error": sum(errors) / len(errors),
                }
            )
        return rows

    def _visits_per_bucket(self) -> dict[Size, int]:
        counts = {bucket: quota for bucket, (_, quota) in self._quotas.items() if quota}
        for index in self._training:
            bucket = self._bucket_of[index]
            counts[bucket] = counts.get(bucket, 0) + self.dataset.samples[index].repeats
        return counts

    def _choose(self, size: Size) -> Size:
        bucket = nearest_bucket(size, self.buckets)
        if not self._no_upscale or max(bucket[0] / size[0], bucket[1] / size[1]) <= 1:
            return bucket
        longest = _multiple(self._longest, self._step)
        return tuple(max(self._step, min(longest, _multiple(side, self._step))) for side in size)  # type: ignore[return-value]

    def _share_regularization(self) -> dict[Size, tuple[list[int], int]]:
        """For each bucket with regularization pictures: their indices, and how many visits it gets per epoch.

        Fixed shares by the largest remainder, at least one per bucket while there are enough, so that every epoch has
        the same number of batches.
        """
        samples = self.dataset.samples
        regularization = [index for index, sample in enumerate(samples) if sample.is_regularization]
        members: dict[Size, list[int]] = {}
        for round_ in range(max((samples[index].repeats for index in regularization), default=0)):
            for index in regularization:
                if samples[index].repeats > round_:
                    members.setdefault(self._bucket_of[index], []).append(index)
        visits = sum(samples[index].repeats for index in self._training)
        buckets = sorted(members, key=lambda bucket: (-len(members[bucket]), bucket))
        quotas = {bucket: int(rank < visits) for rank, bucket in enumerate(buckets)}
        rest = visits - sum(quotas.values())
        total = sum(len(indices) for indices in members.values())
        shares = {bucket: divmod(rest * len(members[bucket]), total) for bucket in buckets}
        for bucket, (share, _) in shares.items():
            quotas[bucket] += share
        left_over = rest - sum(share for share, _ in shares.values())
        for bucket in sorted(buckets, key=lambda bucket: (-shares[bucket][1], bucket))[:left_over]:
            quotas[bucket] += 1
        return {bucket: (members[bucket], quotas[bucket]) for bucket in buckets}

    def _view(self, index: int, epoch: int, visit: int) -> View:
        sample, bucket = self.dataset.samples[index], self._bucket_of[index]
        seed = f"{self.seed}:{epoch}:visit:{sample.key}:{visit}"
        flip, at = False, None
        if self.flip or self.random_crop:
            rng = random.Random(seed)
            across, down, mirror = rng.random(), rng.random(), rng.random()
            flip = self.flip and mirror < 0.5
            at = (across, down) if self.random_crop else None
        # Most views of a data set are cropped alike, and share what says so.
        place = self._place(sample.size, bucket, flip) if at is None else self._crop(sample.size, bucket, flip, at)
        scaled, crop, time_ids = place
        shown = draw_place(bucket, self.min_scale, random.Random(f"{seed}:scale")) if self.min_scale < 1 else None
        return View(index, bucket, scaled, crop, flip, time_ids, seed if self.augment else None, shown)

    @staticmethod
    def _crop(
        size: Size, bucket: Size, flip: bool, at: tuple[float, float] | None = None
    ) -> tuple[Size, tuple[int, int], tuple[int, ...]]:
        """(scaled, crop, time_ids) of a view. at: where the crop lies, as shares of the room; None for the middle."""
        scaled = cover(size, bucket)
        room = scaled[0] - bucket[0], scaled[1] - bucket[1]
        if at is None:
            left, top = room[0] // 2, room[1] // 2
        else:
            left, top = int(at[0] * (room[0] + 1)), int(at[1] * (room[1] + 1))
        # The model gets where the crop lies in the picture as it is shown, that is after mirroring.
        shown_left = room[0] - left if flip else left
        return scaled, (left, top), (size[1], size[0], top, shown_left, bucket[1], bucket[0])


def make_buckets(resolution: Size, step: int, shortest: int, longest: int) -> list[Size]:
    """The resolution itself, and for every width that is a multiple of ``step`` the greatest height that keeps the
    area within the resolution's; sides between ``shortest`` and ``longest`` pixels. Sorted."""
    width, height = resolution
    area = width * height
    if shortest >= min(width, height):
        shortest = min(width, height) // 2
    first = math.ceil(max(shortest, step) / step) * step
    buckets = {resolution}
    for side in range(first, longest + 1, step):
        other = min(_multiple(area // side, step), _multiple(longest, step))
        if other >= first:
            buckets |= {(side, other), (other, side)}
    return sorted(buckets)


def nearest_bucket(size: Size, buckets: Iterable[Size]) -> Size:
    """The bucket whose aspect ratio is nearest (by its logarithm, so that 2:1 and 1:2 are alike); of equals the
    largest."""
    aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: (abs(aspect - math.log(bucket[0] / bucket[1])), -bucket[0] * bucket[1]))


def cover(size: Size, bucket: Size) -> Size:
    """The smallest (width, height) with the picture's aspect ratio that covers the bucket."""
    if size[0] * bucket[1] >= size[1] * bucket[0]:
        return round(size[0] * bucket[1] / size[1]), bucket[1]
    return bucket[0], round(size[1] * bucket[0] / size[0])


def shuffle(items: list, rng: random.Random) -> None:
    """Fisher-Yates on ``rng.random()`` alone, which every Python version answers alike (``Random.shuffle`` does not
    promise to)."""
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]


def _multiple(value: int, step: int) -> int:
    return value // step * step
