"""What every quota rule promises: the budget spent exactly, floors and sizes held, importance followed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.ops.quota import RULES, greedy, proportional, uniform

Rule = Callable[..., list[int]]
IMPORTANCE = st.one_of(st.just(0.0), st.floats(1e-12, 1e12), st.integers(0, 5).map(float))


@st.composite
def cases(draw: st.DrawFn, least: float = 0.0) -> tuple[list[float], list[int], int, int]:
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=12))
    importance = [max(least, draw(IMPORTANCE)) for _ in sizes]
    floor = draw(st.integers(0, 4))
    lowest = sum(min(floor, n) for n in sizes)
    return importance, sizes, draw(st.integers(lowest, sum(sizes) + 5)), floor


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(case=cases())
def test_the_budget_is_spent_exactly_between_floors_and_sizes(
    rule: Rule, case: tuple[list[float], list[int], int, int]
) -> None:
    _, sizes, budget, floor = case
    quotas = rule(*case)
    assert sum(quotas) == min(budget, sum(sizes))
    assert all(min(floor, n) <= k <= n for k, n in zip(quotas, sizes, strict=True))
    assert quotas == rule(*case)


@pytest.mark.parametrize("rule", [proportional, greedy])
@given(case=cases())
def test_more_importance_is_never_fewer_experts(rule: Rule, case: tuple[list[float], list[int], int, int]) -> None:
    importance, sizes, *_ = case
    quotas = rule(*case)
    for a, b in itertools.permutations(range(len(sizes)), 2):
        if importance[a] > importance[b] and sizes[a] >= sizes[b]:
            assert quotas[a] >= quotas[b], (importance, sizes, quotas)


@pytest.mark.parametrize("rule", [proportional, greedy])
@given(case=cases(), extra=st.floats(1.01, 100), data=st.data())
def test_a_matrix_that_gains_importance_loses_no_expert(
    rule: Rule, case: tuple[list[float], list[int], int, int], extra: float, data: st.DataObject
) -> None:
    importance, sizes, budget, floor = case
    m = data.draw(st.integers(0, len(sizes) - 1))
    raised = [i * extra if j == m else i for j, i in enumerate(importance)]
    assert rule(raised, sizes, budget, floor)[m] >= rule(*case)[m]


@pytest.mark.parametrize("rule", [proportional, greedy])
@given(sizes=st.lists(st.integers(1, 20), min_size=2, max_size=8), floor=st.integers(0, 3), data=st.data())
def test_no_importance_keeps_the_floor_while_others_have_room(
    rule: Rule, sizes: list[int], floor: int, data: st.DataObject
) -> None:
    importance = [0.0, *(data.draw(st.floats(0.01, 100)) for _ in sizes[1:])]
    most = min(floor, sizes[0]) + sum(sizes[1:])
    budget = data.draw(st.integers(sum(min(floor, n) for n in sizes), most))
    assert rule(importance, sizes, budget, floor)[0] == min(floor, sizes[0])


@given(
    importance=st.lists(st.floats(0, 10), min_size=1, max_size=4),
    floor=st.integers(0, 2),
    data=st.data(),
)
def test_greedy_is_optimal_by_brute_force(importance: list[float], floor: int, data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 5)) for _ in importance]
    budget = data.draw(st.integers(sum(min(floor, n) for n in sizes), sum(sizes)))

    def worth(quotas: tuple[int, ...]) -> float:
        return sum(i * sum(1 / j for j in range(1, k + 1)) for i, k in zip(importance, quotas, strict=True))

    allowed = itertools.product(*(range(min(floor, n), n + 1) for n in sizes))
    best = max(worth(q) for q in allowed if sum(q) == budget)
    assert worth(tuple(greedy(importance, sizes, budget, floor))) == pytest.approx(best)


def test_proportional_is_the_floor_and_the_largest_remainder() -> None:
    # 2 each, 10 left over importances 5 : 3 : 2 : 0 of 10; sizes out of the way
    assert proportional([5, 3, 2, 0], [20] * 4, 18, 2) == [7, 5, 4, 2]
    # 7 left: 3.5, 2.1, 1.4, 0 -> 3, 2, 1 and the last one to the largest remainder
    assert proportional([5, 3, 2, 0], [20] * 4, 15, 2) == [6, 4, 3, 2]
    # the first is full at 4: the 8 others go 3 : 2 to the rest, 4.8 and 3.2
    assert proportional([5, 3, 2, 0], [4, 20, 20, 20], 18, 2) == [4, 7, 5, 2]


def test_without_any_importance_all_count_alike() -> None:
    assert proportional([0, 0, 0], [9, 9, 2], 12, 1) == [5, 5, 2]
    assert uniform([7, 0, 0], [9, 9, 2], 12, 1) == [5, 5, 2]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_budget_below_the_floors_is_refused(rule: Rule) -> None:
    with pytest.raises(ValueError, match="below the sum of the floors, 4"):
        rule([1.0, 1.0], [5, 5], 3, 2)
    if rule is not uniform:
        with pytest.raises(ValueError, match="number >= 0 for each"):
            rule([1.0, float("nan")], [5, 5], 8, 2)
