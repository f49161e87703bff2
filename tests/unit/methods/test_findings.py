"""Findings go to JSON and come back the same, and what is no finding is kept by name."""

from __future__ import annotations

import json
import math

import pytest

from coterie.methods.findings import (
    Adapter,
    AggregationError,
    Assignment,
    Clusters,
    ExpertPool,
    Notes,
    Quotas,
    Values,
    find,
    from_json,
    to_json,
)

FINDINGS = (
    Clusters({"a": 0, "b": 1}, {2: 0.5}, ["a", "b"], [[0.0, 1.0], [1.0, 0.0]]),
    Assignment({"m": {"a": [0, 3], "b": []}}, ExpertPool(7, mode="dynamic")),
    AggregationError(0.25),
    Notes(["slow"]),
    Values({"temperature": 0.5}),
)
QUOTAS = Quotas({"sst2": Adapter(0, 3)}, {"m": 3}, {"m": 2}, {"m": 0.1}, ["a"], {"sst2": 1.0}, ["trec"], "ab" * 32)


def test_the_names_in_json_are_those_of_a_summary() -> None:
    described = to_json(FINDINGS)
    assert list(described) == [
        "clusters", "silhouettes", "order", "distances", "linkage", "assignment", "pool", "aggregation_error",
        "notes", "temperature",
    ]  # fmt: skip
    assert described["silhouettes"] == {"2": 0.5}
    assert described["pool"] == {"experts": 7, "mode": "dynamic"}
    assert to_json([QUOTAS])["adapters"] == {"sst2": [0, 3]}


@pytest.mark.parametrize(
    ("number", "silhouettes", "margin", "choice"),
    [
        (3, {}, None, ""),
        (2, {2: 0.5}, None, "2 clusters: silhouette 0.500"),
        (2, {2: 0.5, 3: 0.25, 4: math.nan}, 0.25, "2 clusters: silhouette 0.500; the next best is 0.250 with 3"),
        (3, {2: 0.171, 3: 0.172, 4: 0.171}, 0.001, "3 clusters: silhouette 0.172; the next best is 0.171 with 2. "
         "That is a close choice (margin 0.001): another seed may change it"),
        (1, {2: 0.01, 3: 0.02}, None, "1 cluster; the best silhouette is 0.020 with 3"),
    ],
)  # fmt: skip
def test_clusters_say_how_sure_their_number_is(
    number: int, silhouettes: dict[int, float], margin: float | None, choice: str
) -> None:
    clusters = Clusters({f"client-{i}": i for i in range(number)}, silhouettes)
    assert clusters.margin == (None if margin is None else pytest.approx(margin))
    assert clusters.choice == choice


@pytest.mark.parametrize("findings", [FINDINGS, (QUOTAS,), ()])
def test_findings_survive_json(findings: tuple[object, ...]) -> None:
    read = from_json(json.loads(json.dumps(to_json(findings))))  # type: ignore[arg-type]
    assert read == findings


def test_null_is_read_as_not_a_number() -> None:
    found = find(from_json({"clusters": {"a": 0}, "silhouettes": {"2": None}, "distances": [[None]]}), Clusters)
    assert found is not None
    assert math.isnan(found.silhouettes[2])
    assert math.isnan(found.distances[0][0])


@pytest.mark.parametrize("value", [None, {}, [], {"m": [1]}, {"m": {"a": 1}}, {"m": {"a": {"b": 1}}},
                                   {"m": {"a": [0.5]}}, {"m": {"a": [-1]}}, {"m": {"a": ["x"]}}])  # fmt: skip
def test_what_has_another_shape_is_a_value(value: object) -> None:
    assert from_json({"assignment": value}) == (Values({"assignment": value}),)


def test_two_findings_may_not_say_the_same() -> None:
    with pytest.raises(TypeError, match="two findings are named 'aggregation_error'"):
        to_json([AggregationError(0.5), Values({"aggregation_error": 1})])
