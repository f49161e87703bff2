"""How clients use their experts, as numbers."""

from __future__ import annotations

import math

import numpy as np

from coterie.report.usage import used
from coterie.requests import ExpertUse


def test_usage_is_sorted_by_expert_without_the_shared_one() -> None:
    rows = {
        "a": {"m": ExpertUse([1.0, 0.3, 0.7], [], [-2, 4, 9])},
        "b": {"m": ExpertUse([1.0, math.nan], [], [-2, 4])},
        "c": {},
    }
    found = used(rows, "m", ["c", "a", "b"], "weight")
    assert list(found) == [4, 9]
    np.testing.assert_array_equal([*found.values()], [[math.nan, 0.3, math.nan], [math.nan, 0.7, math.nan]])
    assert used({"a": {"m": ExpertUse([], [0.5, 1.0])}}, "m", ["a"], "share") == {0: [0.5], 1: [1.0]}
    assert used(rows, "m", ["a"], "share") == {}
