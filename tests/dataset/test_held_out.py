"""Which pictures a run does not train on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.dataset.held_out import FEWEST, hold_out
from lora_trainer.dataset.samples import Dataset, Sample
from lora_trainer.errors import UserError


def dataset(*digests, reg=()):
    training = [Sample(f"{n}.png", f"{n}.png", "c", (64, 64), one, repeats=3) for n, one in enumerate(digests)]
    others = [
        Sample(f"r{n}.png", f"reg:{n}", "c", (64, 64), one, is_regularization=True) for n, one in enumerate(reg)
    ]
    return Dataset(Path("data"), (*training, *others))


def digests(one):
    return [sample.digest for sample in one.samples]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.floats(0.01, 0.9), st.integers(0, 9))
def test_what_is_held_out_is_never_trained(contents, share, seed):
    whole = dataset(*map(str, contents), reg=["r1", "1"])
    different = len(set(contents))
    if different < 2 * FEWEST:
        with pytest.raises(UserError, match="too few"):
            hold_out(whole, share, seed)
        return
    split = hold_out(whole, share, seed)
    held = digests(split.held_out)
    trained = [sample.digest for sample in split.trained.samples if not sample.is_regularization]
    assert not set(held) & set(trained) and set(held) | set(trained) == set(map(str, contents))
    assert len(held) == len(set(held)) == min(max(FEWEST, round(share * different)), different // 2)
    assert len(digests(split.seen)) == len(held) and set(digests(split.seen)) <= set(trained)
    assert all(sample.repeats == 1 for sample in (*split.held_out.samples, *split.seen.samples))
    assert [sample.key for sample in split.trained.samples if sample.is_regularization] == ["reg:0", "reg:1"]


def test_a_further_picture_changes_the_choice_little():
    names = [f"{n:03}" for n in range(40)]
    before = set(digests(hold_out(dataset(*names), 0.1, 1).held_out))
    after = set(digests(hold_out(dataset(*names, "new"), 0.1, 1).held_out))
    assert len(before) == len(after) == 4 and len(before & after) >= 3
