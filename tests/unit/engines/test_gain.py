"""What shared passes are expected to gain: padding of batches that meet at random, against fewer passes."""

from __future__ import annotations

import itertools
import statistics

import pytest

from coterie.data.examples import Example, batches
from coterie.engines.gain import batch_lengths, best_gain, expected_gain
from coterie.engines.grouping import Load
from coterie.ops.streams import stream

UNEVEN = [10, 20, 30, 40]


def loads(clients: int, rows: int = 2, tokens: float = 25.0, passes: int = 4) -> list[Load]:
    return [Load(number, passes, rows, tokens) for number in range(clients)]


def test_rows_of_equal_length_gain_the_passes_that_are_saved() -> None:
    equal = {number: [25, 25] for number in range(4)}
    assert expected_gain(loads(4), equal, 4, 50.0) == pytest.approx((50 + 50) / (50 + 50 / 4))
    assert expected_gain(loads(4), equal, 1, 50.0) == pytest.approx(1.0)


def test_batches_that_meet_at_random_are_padded_to_the_longest() -> None:
    meetings = [max(of) for of in itertools.product(UNEVEN, repeat=3)]
    uneven = dict.fromkeys(range(3), UNEVEN)
    padded = 2 * statistics.fmean(meetings)
    assert expected_gain(loads(3), uneven, 3, 0.0) == pytest.approx(2 * 25 / padded)
    assert expected_gain(loads(3), uneven, 3, 30.0) == pytest.approx((2 * 25 + 30) / (padded + 10))


def test_clients_with_fewer_passes_leave_the_pass() -> None:
    mixed = [Load(0, 4, 2, 25.0), Load(1, 1, 2, 10.0)]
    together = (2 * 2 * 25 + 10) + 3 * (2 * 25 + 10)
    alone = 4 * (2 * 25 + 10) + (2 * 10 + 10)
    assert expected_gain(mixed, {0: [25], 1: [10]}, 2, 10.0) == pytest.approx(alone / together)


def test_the_group_that_gains_most_is_chosen() -> None:
    alike = {number: [[10], [40]][number // 4] for number in range(8)}  # groups of four are alike, larger ones mixed
    of_each = [Load(number, 4, 2, float(alike[number][0])) for number in range(8)]
    size, gain = best_gain(of_each, alike, 8, 20.0)
    assert size == 4
    assert gain == pytest.approx((2 * 50 + 40) / (2 * 50 + 10))
    assert best_gain(of_each, alike, 2, 20.0)[0] == 2
    assert best_gain(loads(3), {number: [25] for number in range(3)}, 3, 20.0)[0] == 3


@pytest.mark.parametrize("rows", [1, 5, 16, 64, 400])
def test_the_lengths_of_batches_are_those_that_training_draws(rows: int) -> None:
    """Exact for one chunk; over many, the same mean to a tenth."""
    examples = [Example(tuple(range(5 + i * 37 % 60))) for i in range(rows)]
    made = [max(len(e.ids) for e in part) for part in batches(examples, 4, stream(0, "order"))]
    found = batch_lengths([len(e.ids) for e in examples], 4)
    if rows <= 16:
        assert sorted(found) == sorted(made)
    else:
        assert len(found) == 4
        assert statistics.fmean(found) == pytest.approx(statistics.fmean(made), rel=0.1)
