"""Metrics against hand values and sklearn, and their sums over clients."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from coterie.ops.metrics import (
    better,
    calibration_error,
    classification_metrics,
    confusion,
    mean_metrics,
    percentiles,
    perplexity,
    worst_client,
)


@pytest.fixture(autouse=True)
def _no_warning() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# truth, predicted, accuracy, macro-F1, Matthews
BY_HAND = {
    "all right": ([0, 1, 2, 0], [0, 1, 2, 0], 1.0, 1.0, 1.0),
    "all wrong, two classes": ([0, 0, 1, 1], [1, 1, 0, 0], 0.0, 0.0, -1.0),
    "one class predicted": ([0, 0, 1, 1], [1, 1, 1, 1], 0.5, (0 + 2 / 3) / 2, 0.0),
    "one class there": ([1, 1, 1, 1], [1, 1, 0, 1], 0.75, (0 + 6 / 7) / 2, 0.0),
    "one class in both": ([2, 2, 2], [2, 2, 2], 1.0, 1.0, 0.0),
    "one row": ([0], [1], 0.0, 0.0, 0.0),
    "a class that is never there": ([0, 1, 1], [0, 1, 2], 2 / 3, (1 + 2 / 3 + 0) / 3, 3 / math.sqrt(24)),
    "binary": ([1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1], 4 / 6, 2 / 3, (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_classification_metrics_by_hand(name: str) -> None:
    truth, predicted, accuracy, macro_f1, matthews = BY_HAND[name]
    expected = {"accuracy": accuracy, "macro_f1": macro_f1, "matthews": matthews}
    assert classification_metrics(truth, predicted) == pytest.approx(expected, abs=1e-12)


def test_classification_metrics_are_sklearns_to_the_bit() -> None:
    draw = random.Random(0)
    for classes in (2, 3, 7, 40):
        for rows in (1, 2, 50, 333):
            truth = [draw.randrange(classes) for _ in range(rows)]
            predicted = [t if draw.random() < 0.6 else draw.randrange(classes) for t in truth]
            found = classification_metrics(truth, predicted)
            several = len({*truth, *predicted}) > 1  # else sklearn warns
            assert found == {
                "accuracy": sklearn_metrics.accuracy_score(truth, predicted),
                "macro_f1": sklearn_metrics.f1_score(truth, predicted, average="macro", zero_division=0.0),
                "matthews": sklearn_metrics.matthews_corrcoef(truth, predicted) if several else 0.0,
            }
            assert {type(value) for value in found.values()} == {float}
    with pytest.raises(ValueError, match="zip"):
        classification_metrics([0, 1], [0])


def test_perplexity_is_infinite_where_it_overflows() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(2.0) == pytest.approx(math.e**2)
    assert 0 < perplexity(699.0) < math.inf
    assert perplexity(710.0) == perplexity(1e9) == perplexity(math.inf) == math.inf


def test_the_mean_is_over_clients_and_metrics_that_all_have() -> None:
    rows = {"a": {"accuracy": 0.5, "loss": 1.0}, "b": {"accuracy": 1.0, "loss": 4.0, "extra": 3.0}}
    assert mean_metrics(rows) == {"accuracy": 0.75, "loss": 2.5}
    assert mean_metrics({"b": rows["b"], "a": rows["a"]}) == {"accuracy": 0.75, "loss": 2.5}
    assert mean_metrics({}) == {}


@pytest.mark.parametrize(("metric", "lower"), [("loss", True), ("perplexity", True), ("accuracy", False), ("x", False)])
def test_better_knows_which_way_is_up(metric: str, lower: bool) -> None:
    assert better(metric, 1.0, 2.0) == lower
    assert better(metric, 2.0, 1.0) != lower
    assert not better(metric, 1.0, 1.0)
    assert better(metric, 1.0, math.nan)
    assert not better(metric, math.nan, 1.0)
    assert not better(metric, math.nan, math.nan)


def test_the_worst_client_is_the_first_by_name_on_a_tie() -> None:
    rows = {"c": {"accuracy": 0.2}, "b": {"accuracy": 0.2}, "a": {"accuracy": 0.9}, "d": {"loss": 1.0}}
    assert worst_client("accuracy", rows) == ("b", 0.2)
    assert worst_client("accuracy", dict(reversed(rows.items()))) == ("b", 0.2)
    assert worst_client("loss", {"a": {"loss": 1.0}, "b": {"loss": 3.0}, "c": {"loss": 3.0}}) == ("b", 3.0)
    assert worst_client("rouge_l", rows) is None
    for order in ("abc", "cab", "bca"):
        client, value = worst_client("loss", {c: {"loss": math.nan if c == "b" else 1.0} for c in order}) or ("", 0)
        assert client == "b"
        assert math.isnan(value)


def test_percentiles() -> None:
    draw = random.Random(1)
    rows = {f"c{i}": {"accuracy": draw.random()} for i in range(23)}
    values = [row["accuracy"] for row in rows.values()]
    found = percentiles("accuracy", rows | {"without": {"loss": 1.0}})
    assert found == {f"p{p}": pytest.approx(float(np.percentile(values, p))) for p in (10, 25, 50, 75, 90)}
    assert percentiles("accuracy", {f"c{i}": {"accuracy": i / 10} for i in range(11)}) == pytest.approx(
        {"p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9}
    )
    assert percentiles("loss", rows) == {}


def test_confusion_counts_rows_by_label_and_prediction() -> None:
    truth, predicted = [0, 1, 1, 2, 1], [0, 1, 0, 1, 1]
    assert confusion(truth, predicted, 4) == [[1, 0, 0, 0], [1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert confusion(truth, predicted, 3) == sklearn_metrics.confusion_matrix(truth, predicted).tolist()


def test_the_calibration_error_is_the_gap_of_each_bin_by_its_rows() -> None:
    # two bins of ten: (0.6, 0.7] with 0.65 and 0.7 (one right: gap 0.5 - 0.675), (0.9, 1] with 1.0 (wrong: gap -1)
    assert calibration_error([0.65, 0.7, 1.0], [True, False, False], bins=10) == pytest.approx((0.35 + 1) / 3)
    assert calibration_error([1.0, 1.0], [True, True]) == 0
    assert calibration_error([0.0], [True]) == 1
