"""Batches of rows: similar lengths together, every row seen, the same after a resume."""

from __future__ import annotations

from collections import Counter

import pytest

from lora_trainer.dataset.text.plan import RowPlan

LENGTHS = tuple((7 * place) % 40 + 1 for place in range(22))


@pytest.mark.parametrize(("batch", "accumulation", "repeats"), [(4, 1, 1), (1, 4, 1), (3, 2, 2), (50, 1, 1), (1, 1, 1)])
def test_every_row_is_seen_and_the_order_depends_on_seed_and_epoch_alone(batch, accumulation, repeats):
    plan = RowPlan(LENGTHS, batch, accumulation, repeats, 0)
    for epoch in range(3):
        steps = plan.steps(epoch)
        assert steps == RowPlan(LENGTHS, batch, accumulation, repeats, 0).steps(epoch)
        assert len(steps) == plan.steps_per_epoch
        assert Counter(row for step in steps for part in step for row in part) == dict.fromkeys(range(22), repeats)
        assert all(0 < len(part) <= batch for step in steps for part in step)
        assert all(0 < len(step) <= accumulation for step in steps)
    if len(steps) > 1:
        assert plan.steps(0) != plan.steps(1) != RowPlan(LENGTHS, batch, accumulation, repeats, 1).steps(1)


def test_a_step_sees_the_same_rows_however_it_is_divided():
    def rows(batch: int, accumulation: int) -> list[list[int]]:
        plan = RowPlan(LENGTHS, batch, accumulation, 1, 5)
        return [[row for part in step for row in part] for step in plan.steps(2)]

    assert rows(4, 1) == rows(1, 4) == rows(2, 2)


def test_rows_of_a_step_are_of_similar_length():
    spread = [max(LENGTHS[row] for row in step[0]) - min(LENGTHS[row] for row in step[0])
              for step in RowPlan(LENGTHS, 4, 1, 1, 0).steps(0)]  # fmt: skip
    assert max(spread) <= 12 and max(LENGTHS) - min(LENGTHS) > 30
