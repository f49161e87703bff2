"""The sum that is opened is the sum of the survivors' vectors, whoever vanishes when; or it is not opened."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.secure import fixed_point, shamir
from coterie.secure.collector import Opened
from coterie.secure.session import neighbours_of
from coterie.secure.steps import STEPS
from secure_sums import opened, session, vectors

BEFORE_VALUES = ("keys", "shares", "values")


@st.composite
def dropouts(draw: st.DrawFn) -> tuple[int, int, dict[str, list[str]]]:
    sites = draw(st.integers(3, 9))
    neighbours = draw(st.sampled_from([0, 0, 4, 6]))
    when = draw(st.lists(st.sampled_from([*STEPS, ""]), min_size=sites, max_size=sites))
    return sites, neighbours, {step: [f"s{i}" for i in range(sites) if when[i] == step] for step in STEPS}


@settings(max_examples=25, deadline=None)
@given(dropouts())
def test_the_sum_is_that_of_the_survivors_or_is_not_opened(case: tuple[int, int, dict[str, list[str]]]) -> None:
    sites, neighbours, gone = case
    of = session(sites, neighbours=neighbours)
    own = vectors(of)
    result = opened(of, own, gone)
    lost = {site for step in STEPS for site in gone[step]}
    if sites - len(lost) < of.needed:
        assert isinstance(result, str)
        assert "are needed" in result
        return
    survivors = sorted({*of.members} - {site for step in BEFORE_VALUES for site in gone[step]})
    if isinstance(result, str):  # a site may have lost most of its few neighbours, but not where all are neighbours
        assert neighbours
        assert "are too few" in result or "share too few masks" in result
        return
    assert result.survivors == tuple(survivors)
    assert (result.total == sum(own[site] for site in survivors)).all()
    assert result.vanished == {site: step for step in BEFORE_VALUES for site in gone[step]}


@pytest.mark.parametrize("step", STEPS)
def test_any_two_of_six_may_vanish_in_any_step(step: str) -> None:
    of = session(6)
    own = vectors(of)
    for two in combinations(of.members, 2):
        result = opened(of, own, {step: two})
        assert isinstance(result, Opened)
        left = {*of.members} - ({*two} if step in BEFORE_VALUES else set())
        assert (result.total == sum(own[site] for site in left)).all()
    assert isinstance(opened(of, own, {step: of.members[:3]}), str)


@settings(max_examples=25, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.integers(0, 9), st.randoms(use_true_random=False))
def test_as_many_shares_as_the_threshold_give_the_secret_back(
    secret: bytes, threshold: int, more: int, draw: object
) -> None:
    points = range(1, threshold + more + 1)
    shares = shamir.split(secret, threshold, points)
    assert {len(share) for share in shares.values()} == {shamir.SHARE_BYTES}
    chosen = draw.sample(list(points), threshold)  # type: ignore[attr-defined]
    assert shamir.join({x: shares[x] for x in chosen}) == secret
    if threshold > 1:
        fewer = {x: shares[x] for x in chosen[1:]}
        assert _joined(fewer) != secret


def _joined(shares: dict[int, bytes]) -> bytes | None:
    try:
        return shamir.join(shares)
    except ValueError:
        return None


def test_the_field_is_one() -> None:
    """Miller and Rabin's test with the first twelve primes as bases."""
    n, odd, twos = shamir.PRIME, shamir.PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        powers = [pow(base, odd * 2**i, n) for i in range(twos)]
        assert powers[0] == 1 or n - 1 in powers


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(8, 50), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_sums_of_fixed_points_are_exact_on_the_grid(n: int, bits: int, bound: float, seed: int) -> None:
    rows = np.random.default_rng(seed).uniform(-bound, bound, (n, 4))
    rows[0] = [bound, -bound, 0.0, bound]
    total = np.zeros(4, np.uint64)
    for row in rows:
        total += fixed_point.encode(row, bound, bits)
    step = bound / 2 ** (bits - 1)
    error = np.abs(fixed_point.decode(total, bound, bits) - rows.sum(axis=0))
    assert (error <= n * step * 0.5 + 1e-9 * n * bound).all()
    assert n <= fixed_point.most_members(bits)


def test_the_largest_sum_does_not_overflow_and_one_more_would() -> None:
    bits = 60
    most = fixed_point.most_members(bits)
    one = fixed_point.encode(np.ones(1), 1.0, bits)
    total, more = one * np.uint64(most), one * np.uint64(most + 1)
    assert fixed_point.decode(total, 1.0, bits) == most
    assert fixed_point.decode(more, 1.0, bits) != most + 1
    with pytest.raises(ValueError, match="outside the range"):
        fixed_point.encode(np.array([1.1]), 1.0, bits)
    with pytest.raises(ValueError, match="outside the range"):
        fixed_point.encode(np.array([np.nan]), 1.0, bits)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 20))
def test_the_graph_is_regular_symmetric_and_connected(sites: int, wanted: int) -> None:
    of = neighbours_of({f"s{i}": f"key {i}" for i in range(sites)}, wanted)
    degrees = {len(others) for others in of.values()}
    assert len(degrees) == 1
    assert degrees.pop() == (min(sites - 1, wanted + wanted % 2) if wanted else sites - 1)
    assert all(site in of[other] and other != site for site, others in of.items() for other in others)
    seen, todo = set(), ["s0"]
    while todo:
        site = todo.pop()
        todo += [other for other in of[site] if other not in seen]
        seen |= {site, *of[site]}
    assert len(seen) == sites
