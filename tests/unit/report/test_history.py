"""The numbers of an assignment by round, against slow counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from assigned_run import CLIENTS, GROUPS, MODULES, POOL, assignment
from coterie.methods.findings import Assignment
from coterie.report.history import agreement, by_round, chance_of, history, neighbours, together


def test_a_round_trains_with_what_the_rounds_before_it_said() -> None:
    one, two, three = (Assignment({"m": {"a": [e]}}) for e in (1, 2, 3))
    assert by_round({0: one, 1: one, 2: two, 3: two}, [1, 2, 3]) == {1: one, 2: one, 3: two}
    assert by_round({0: one, 1: two}, [1]) == {1: one, 2: two}, "2 is still to come"
    assert by_round({2: three, 3: three}, [1, 2, 3]) == {3: three}
    assert by_round({0: one}, []) == {1: one}
    assert by_round({}, [1]) == {}


def test_the_history_counts_what_is_held_and_what_changes() -> None:
    rounds = {rnd: assignment(rnd) for rnd in (1, 2, 3, 4)}
    found = history({rnd: Assignment(of) for rnd, of in rounds.items()}, CLIENTS, MODULES, GROUPS, POOL["experts"])
    pairs = {r: {(m, c, e) for m in a for c in a[m] for e in a[m][c]} for r, a in rounds.items()}
    assert found.held.shape == (6, 6, 7)
    assert found.pairs == {r: len(p) for r, p in pairs.items()} == dict.fromkeys(rounds, 72)
    assert found.changed == {r: len(pairs[r] - pairs[r - 1]) for r in (2, 3, 4)}
    assert found.changed[4] == 0 < found.changed[3]
    held = np.argwhere(found.held).tolist()
    assert {(MODULES[m], CLIENTS[c], e) for m, c, e in held} == pairs[4]
    for m, c, e in itertools.product(range(6), range(6), range(7)):
        times = sum((MODULES[m], CLIENTS[c], e) in held for held in pairs.values())
        assert found.times[m, c, e] == times
    assert found.counts.shape == (6, 6)
    assert found.counts.tolist() == [[len(rounds[4][m][c]) for m in MODULES] for c in CLIENTS]
    assert found.agreement == {1: 0.0, 2: 0.5, 3: 1.0, 4: 1.0}
    assert found.chance == pytest.approx(6 / 15)


@pytest.mark.parametrize("seed", range(5))
def test_agreement_and_sharing_are_what_slow_counting_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    held = rng.random((3, 7, 5)) < 0.4
    groups = [None if g == 3 else f"g{g}" for g in rng.integers(0, 4, 7)]
    same, every, shares = 0, 0, np.full((7, 7), np.nan)
    for a, b in itertools.product(range(7), repeat=2):
        both, either = (held[:, a] & held[:, b]).sum(), (held[:, a] | held[:, b]).sum()
        shares[a, b] = both / either if either else math.nan
        if a < b and groups[a] and groups[b]:
            same, every = same + both * (groups[a] == groups[b]), every + both
    assert agreement(held, groups) == pytest.approx(same / every)
    np.testing.assert_allclose(together(held), shares)
    known = [g for g in groups if g]
    couples = list(itertools.combinations(known, 2))
    assert chance_of(groups) == pytest.approx(sum(a == b for a, b in couples) / len(couples))


def test_agreement_needs_groups_and_experts_that_are_shared() -> None:
    alone = np.eye(3, dtype=bool)[None]
    assert agreement(alone, ["a", "a", "b"]) is None
    assert agreement(np.ones((1, 3, 2), dtype=bool), [None] * 3) is None
    assert agreement(np.ones((1, 3, 2), dtype=bool), ["a", None, "a"]) == 1.0
    assert chance_of([None, "a"]) is None
    assert np.isnan(together(np.zeros((1, 2, 2), dtype=bool))).all()


def test_experts_of_the_same_holders_stand_side_by_side() -> None:
    held = np.array([[0, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0]], dtype=bool)
    assert neighbours(held) == [1, 2, 0, 3], "the one that nobody holds is last"
