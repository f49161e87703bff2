"""How clients use their experts, as numbers."""

from __future__ import annotations

import math

import numpy as np

from coterie.report.usage import experts_by_layer, used
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


def test_experts_by_layer_are_a_mean_over_the_matrices_of_a_layer() -> None:
    usage = {
        "a": {
            "encoder.layer.0.query": ExpertUse([0.5, 0.5], [1.0, 0.5]),
            "encoder.layer.0.value": ExpertUse([0.5, 0.5], [1.0, 0.0]),
            "encoder.layer.10.query": ExpertUse([1.0, 0.0], [1.0, 1.0]),
        }
    }
    assert experts_by_layer(usage, ["b", "a"]) == {"a": {"0": 1.25, "10": 2.0}}
    assert experts_by_layer({"a": {"query": ExpertUse([1.0], [1.0])}}, ["a"]) == {}, "one layer is no picture"
    assert experts_by_layer({}, ["a"]) == {}
