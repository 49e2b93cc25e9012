from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer.config import from_mapping
from lora_trainer.dataset.buckets import BatchPlan, cover, make_buckets, nearest_bucket
from lora_trainer.dataset.samples import Dataset, Sample
from lora_trainer.errors import UserError


def sample(index: int, size=(640, 480), repeats: int = 1, regularization: bool = False) -> Sample:
    key = f"{'reg:' if regularization else ''}{index}.png"
    return Sample(key, key, "x", size, f"{index:064x}", repeats, regularization)


def plan_of(*what, **options) -> BatchPlan:
    """A plan of pictures whose sides are multiples of 8."""
    return BatchPlan(*what, multiple=8, **options)


def dataset(*samples: Sample) -> Dataset:
    return Dataset(Path("."), tuple(samples))


sides = st.integers(16, 5000)
sizes = st.tuples(sides, sides).map(lambda size: (size[0], max(size[1], math.ceil(size[0] / 16)))).map(
    lambda size: (max(size[0], math.ceil(size[1] / 16)), size[1])
)
samples = st.lists(st.tuples(sizes, st.integers(1, 4)), min_size=1, max_size=12)
resolutions = st.one_of(
    st.integers(64, 1100).map(lambda side: (side, side)), st.tuples(st.integers(64, 1100), st.integers(64, 1100))
)
options = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 5),
        "seed": st.integers(0, 2**63 - 1),
        "flip": st.booleans(),
        "random_crop": st.booleans(),
        "min_scale": st.sampled_from([1.0, 0.5]),
        "enable_bucket": st.booleans(),
        "bucket_step": st.sampled_from([8, 32, 64, 72, 128]),
        "min_bucket_resolution": st.sampled_from([64, 256, 512, 1024]),
        "max_bucket_resolution": st.sampled_from([64, 1024, 2048]),
        "no_upscale": st.booleans(),
    }
)


@settings(max_examples=200, deadline=None)
@given(training=samples, regularization=st.one_of(st.just([]), samples), size=resolutions, options=options)
def test_properties_of_every_plan(training, regularization, size, options):
    everything = [sample(index, *entry) for index, entry in enumerate(training)]
    everything += [sample(100 + index, *entry, True) for index, entry in enumerate(regularization)]
    data = dataset(*everything)
    plan = plan_of(data, size, **options)
    for epoch in (0, 3):
        batches = plan.epoch(epoch)
        assert batches == plan_of(data, size, **options).epoch(epoch), "a pure function"
        assert len(batches) == plan.steps_per_epoch
        items = [item for batch in batches for item in batch]
        visits = Counter(item.sample for item in items)
        for index, one in enumerate(everything):
            if not one.is_regularization:
                assert visits[index] == one.repeats, "dropped or seen too often"
        expected = sum(one.repeats for one in everything if not one.is_regularization)
        assert sum(visits[index] for index, one in enumerate(everything) if one.is_regularization) == (
            expected if regularization else 0
        )
        for batch in batches:
            assert 1 <= len(batch) <= options["batch_size"]
            assert len({item.bucket for item in batch}) == 1
        for bucket, count in Counter(item.bucket for item in items).items():
            partial = [batch for batch in batches if batch[0].bucket == bucket and len(batch) < options["batch_size"]]
            assert len(partial) <= 1 and count > 0
        for item in items:
            width, height = everything[item.sample].size
            assert all(side % 8 == 0 and side > 0 for side in item.bucket)
            assert 0 <= item.crop[0] <= item.scaled[0] - item.bucket[0]
            assert 0 <= item.crop[1] <= item.scaled[1] - item.bucket[1]
            assert item.bucket[0] == item.scaled[0] or item.bucket[1] == item.scaled[1], "scaled more than needed"
            # The aspect ratio is kept to within half a pixel.
            scales = item.scaled[0] / width, item.scaled[1] / height
            errors = [abs(width * scales[1] - item.scaled[0]), abs(height * scales[0] - item.scaled[1])]
            assert min(errors) <= 0.5001
            assert options["flip"] or not item.flip
            assert (item.place is None) == (options["min_scale"] == 1)
            if item.place is not None:
                for start, side, whole in zip(item.place[:2], item.place[2:], item.bucket):
                    assert 0 <= start <= whole - side and 0.5 * whole - 1 <= side <= whole
            assert item.time_ids[:2] == (height, width) and item.time_ids[4:] == (item.bucket[1], item.bucket[0])
    table = plan.table()
    assert sum(row["count"] for row in table) == len(items)
    assert sum(row["batches"] for row in table) == plan.steps_per_epoch


@given(size=resolutions, step=st.sampled_from([8, 64]), shortest=st.sampled_from([64, 256]))
@settings(max_examples=100, deadline=None)
def test_buckets_have_about_the_area_and_come_in_pairs(size, step, shortest):
    size = size[0] // 8 * 8, size[1] // 8 * 8
    buckets = make_buckets(size, step, shortest, 2048)
    assert size in buckets and len(set(buckets)) == len(buckets)
    for width, height in buckets:
        if (width, height) != size:
            assert width % step == 0 == height % step and (height, width) in buckets
            assert width * height <= size[0] * size[1]
            # For one of its sides, the other is as long as the area allows.
            area = size[0] * size[1]
            assert 2048 in (width, height) or (width + step) * height > area or width * (height + step) > area


def test_the_buckets_of_512_are_kohyas():
    # From sd-scripts' make_bucket_resolutions((512, 512), 256, 1024, 64), sorted.
    kohya = [
        (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
        (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
    ]  # fmt: skip
    assert make_buckets((512, 512), 64, 256, 1024) == kohya


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((500, 500), (512, 512)), ((3000, 2000), (640, 384)), ((2000, 3000), (384, 640)), ((4000, 400), (1024, 256))],
)
def test_nearest_aspect(size, bucket):
    assert nearest_bucket(size, make_buckets((512, 512), 64, 256, 2048)) == bucket


def test_a_small_resolution_still_keeps_shapes():
    assert make_buckets((128, 128), 64, 256, 2048) == [(64, 192), (64, 256), (128, 128), (192, 64), (256, 64)]
    assert make_buckets((512, 512), 64, 512, 2048) != [(512, 512)]


def test_cover():
    assert cover((1000, 500), (512, 512)) == (1024, 512)
    assert cover((500, 1000), (512, 512)) == (512, 1024)
    assert cover((512, 512), (512, 512)) == (512, 512)


def test_fixed_size_without_buckets():
    plan = plan_of(dataset(sample(0), sample(1, (300, 900))), (770, 512), enable_bucket=False)
    assert {item.bucket for batch in plan.epoch(0) for item in batch} == {(768, 512)}


def test_no_upscale_trains_small_pictures_at_their_own_size():
    data = dataset(sample(0, (300, 200)), sample(1, (2000, 1000)), sample(2, (40, 30)), sample(3, (5000, 70)))
    plan = plan_of(data, (512, 512), no_upscale=True)
    items = sorted((item for batch in plan.epoch(0) for item in batch), key=lambda item: item.sample)
    assert [item.bucket for item in items] == [(256, 192), (704, 320), (64, 64), (2048, 64)]
    assert [item.scaled for item in items] == [(288, 192), (704, 352), (85, 64), (4571, 64)]


def test_crops_are_central_or_random_within_the_picture():
    data = dataset(*(sample(index, (900, 500)) for index in range(40)))
    fixed = [item.crop for batch in plan_of(data, (512, 512), enable_bucket=False).epoch(0) for item in batch]
    assert set(fixed) == {((922 - 512) // 2, 0)}
    plan = plan_of(data, (512, 512), enable_bucket=False, random_crop=True)
    lefts = [item.crop[0] for batch in plan.epoch(0) for item in batch]
    assert min(lefts) < 60 and max(lefts) > 350 and len(set(lefts)) > 20
    again = [item.crop[0] for batch in plan.epoch(1) for item in sorted(batch, key=lambda item: item.sample)]
    assert sorted(again) != sorted(lefts)


def test_half_of_the_visits_are_mirrored_and_the_time_ids_follow():
    data = dataset(*(sample(index, (900, 500)) for index in range(200)))
    items = [item for batch in plan_of(data, (512, 512), flip=True, random_crop=True).epoch(5) for item in batch]
    assert 70 < sum(item.flip for item in items) < 130
    for item in items:
        left = item.crop[0]
        shown = item.scaled[0] - item.bucket[0] - left if item.flip else left
        assert item.time_ids[2:4] == (item.crop[1], shown)


def test_a_visit_does_not_depend_on_the_other_pictures():
    many = dataset(*(sample(index) for index in range(30)))
    few = dataset(*many.samples[:3])
    plans = [plan_of(data, (512, 512), flip=True, random_crop=True) for data in (many, few)]
    views = [{item.sample: (item.crop, item.flip) for batch in plan.epoch(2) for item in batch} for plan in plans]
    assert all(views[0][index] == views[1][index] for index in range(3))


def test_order_changes_with_the_epoch_and_the_seed():
    data = dataset(*(sample(index, (640, 480 + index)) for index in range(30)))
    plan = plan_of(data, (512, 512), batch_size=2)
    orders = [[item.sample for batch in each for item in batch] for each in (plan.epoch(0), plan.epoch(1))]
    orders.append([i.sample for batch in plan_of(data, (512, 512), batch_size=2, seed=1).epoch(0) for i in batch])
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(30)) for order in orders)
    buckets = [batch[0].bucket for batch in plan_of(mixed(), (512, 512)).epoch(0)]
    assert buckets != sorted(buckets), "buckets are mixed, not one after the other"


def mixed() -> Dataset:
    return dataset(*(sample(index, (512, 530) if index % 2 else (700, 300)) for index in range(20)))


def test_the_order_is_the_same_in_every_python():
    # Measured once with Python 3.11; a change would break the resuming of every run under way.
    plan = plan_of(mixed(), (512, 512), batch_size=3, flip=True, random_crop=True, seed=7)
    first = plan.epoch(0)
    assert [[item.sample for item in batch] for batch in first] == ORDER
    assert [(item.crop, item.flip) for item in first[2] + first[3]] == VIEWS


def test_the_order_does_not_depend_on_the_hash_seed():
    code = (
        "from tests.dataset.test_buckets import mixed, plan_of;"
        "print(plan_of(mixed(), (512, 512), batch_size=3, flip=True).epoch(1))"
    )
    here = Path(__file__)
    outputs = set()
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(here.parents[2])}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
        outputs.add(done.stdout)
    assert len(outputs) == 1 and outputs.pop().startswith("[[View(")


def test_regularization_is_balanced_and_seen_evenly_over_the_epochs():
    training = [sample(index, repeats=5) for index in range(4)]
    regularization = [sample(100 + index, (640, 480) if index % 3 else (480, 640), 1, True) for index in range(50)]
    plan = plan_of(dataset(*training, *regularization), (512, 512), batch_size=4)
    seen: Counter[int] = Counter()
    for epoch in range(25):
        visits = Counter(item.sample for batch in plan.epoch(epoch) for item in batch)
        assert sum(count for index, count in visits.items() if index >= 4) == 20
        seen.update({index: count for index, count in visits.items() if index >= 4})
    assert len(seen) == 50 and max(seen.values()) - min(seen.values()) <= 3  # 500 visits of 50 pictures
    kinds = [{index >= 4 for index in (item.sample for item in batch)} for batch in plan.epoch(0)]
    assert {True, False} in kinds, "regularization pictures are interleaved"


def test_few_regularization_pictures_are_repeated_in_fresh_views():
    training = [sample(index, repeats=10) for index in range(3)]
    data = dataset(*training, sample(100, (900, 500), 1, True))
    plan = plan_of(data, (512, 512), enable_bucket=False, random_crop=True)
    crops = [item.crop for batch in plan.epoch(0) for item in batch if item.sample == 3]
    assert len(crops) == 30 and len(set(crops)) > 20


def test_table_names_every_bucket():
    table = plan_of(mixed(), (512, 512), batch_size=4).table()
    assert [(row["resolution"], row["images"], row["count"], row["batches"]) for row in table] == [
        ((512, 512), 10, 10, 3),
        ((768, 320), 10, 10, 3),
    ]
    errors = [1 - 512 / 530, 768 / 320 - 700 / 300]
    assert [row["ar_error"] for row in table] == pytest.approx(errors)


@pytest.mark.parametrize(
    ("resolution", "expected"), [("auto", (1024, 1024)), ("640", (640, 640)), ("768x512", (768, 512))]
)
def test_from_config(resolution, expected):
    config = from_mapping(
        {"train_data_dir": "x", "base_model": "y", "resolution": resolution, "batch_size": 3, "seed": 5, "flip": True}
    )
    plan = BatchPlan.from_config(mixed(), config, 1024, 8)
    assert plan.resolution == expected and (plan.batch_size, plan.seed, plan.flip) == (3, 5, True)
    assert plan.epoch(2) == plan_of(mixed(), expected, batch_size=3, seed=5, flip=True).epoch(2)


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="bucket_step"):
        plan_of(mixed(), (512, 512), bucket_step=20)
    with pytest.raises(UserError, match="resolution"):
        plan_of(mixed(), (512, 4))
    with pytest.raises(UserError, match="resolution"):
        config = replace(from_mapping({"train_data_dir": "x", "base_model": "y"}), resolution="big")
        BatchPlan.from_config(mixed(), config, 512, 8)


ORDER = [[13, 3, 5], [12], [17, 19, 7], [1, 9, 11], [4, 16, 0], [2, 14, 10], [15], [18, 8, 6]]
VIEWS = [((0, 3), True), ((0, 4), False), ((0, 18), True), ((0, 1), False), ((0, 5), False), ((0, 15), False)]
