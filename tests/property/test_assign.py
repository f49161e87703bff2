"""Whatever the affinity and the limits: the best assignment there is, or an error with a limit that works."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coterie.ops import assign as module
from coterie.ops.assign import Limits, assign, check
from coterie.types import CoterieError

quick = settings(deadline=None, max_examples=150)
KINDS = ("flat", "peaked", "sharp", "ties", "equal", "alike", "tiny", "huge", "apart")


def affinity(kind: str, modules: int, experts: int, clients: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    scores = draw.standard_normal((modules, experts, clients))
    match kind:
        case "ties":
            return draw.integers(0, 3, scores.shape).astype(float)
        case "equal":
            return np.full(scores.shape, 1 / clients)
        case "alike":  # all experts want the same clients
            return softmax(10 * (scores[:, :1] + 0.1 * scores))
        case "tiny" | "huge":
            return scores * {"tiny": 1e-200, "huge": 1e200}[kind]
        case "apart":  # rows of different sizes, far from zero
            return 1e3 * scores[:, :, :1] + scores * np.exp(scores[:, :, :1])
    return softmax(scores * {"flat": 1, "peaked": 10, "sharp": 100}[kind])


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=2, keepdims=True))
    return powers / powers.sum(axis=2, keepdims=True)


def least_most(experts: int, clients: int, limits: Limits) -> tuple[float, float]:
    share = experts * limits.clients_per_expert / clients
    return (
        (max(share, limits.min_experts), min(share, limits.max_experts))
        if limits.homogeneous
        else (limits.min_experts, limits.max_experts)
    )


def best(scores: np.ndarray, limits: Limits) -> float | None:
    """The largest sum, by going through all assignments expert after expert; None where there is none."""
    experts, clients = scores.shape
    least, most = least_most(experts, clients, limits)
    sums = {(0,) * clients: 0.0}  # the best sum so far for each number of experts per client
    for row in scores.tolist():
        grown: dict[tuple[int, ...], float] = {}
        for held, value in sums.items():
            for chosen in combinations(range(clients), limits.clients_per_expert):
                now = tuple(n + (client in chosen) for client, n in enumerate(held))
                grown[now] = max(grown.get(now, -np.inf), value + sum(row[client] for client in chosen))
        sums = grown
    return max((value for held, value in sums.items() if all(least <= n <= most for n in held)), default=None)


def assert_within(z: np.ndarray, limits: Limits) -> None:
    least, most = least_most(*z.shape[1:], limits)
    assert z.dtype == np.bool_
    assert (z.sum(axis=2) == limits.clients_per_expert).all()
    assert (z.sum(axis=1) >= least).all()
    assert (z.sum(axis=1) <= most).all()


def feasible(experts: int, clients: int, limits: Limits) -> bool:
    try:
        check(experts, clients, limits)
    except CoterieError:
        return False
    return True


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, Limits]:
    experts, clients = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    picks = draw(st.integers(1, clients + 1))
    even = experts * picks // clients
    least = draw(st.integers(max(0, even - 2), even + 1))
    most = draw(st.integers(max(least - 1, 0), even + 2))
    return experts, clients, Limits(picks, least, most, draw(st.booleans()))


@quick
@given(problems(), st.sampled_from(KINDS), st.integers(0, 10**6))
def test_the_best_of_all_assignments(problem: tuple[int, int, Limits], kind: str, seed: int) -> None:
    """And refused exactly where there is none."""
    experts, clients, limits = problem
    scores = affinity(kind, 2, experts, clients, seed)
    optima = [best(one, limits) for one in scores]
    if optima[0] is None:
        with pytest.raises(CoterieError):
            assign(scores, limits)
        return
    z = assign(scores, limits)
    assert_within(z, limits)
    found = (scores * z).sum(axis=(1, 2))
    np.testing.assert_allclose(found, optima, rtol=0, atol=1e-12 * np.abs(scores).max() * z[0].sum())


@quick
@given(problems())
@example((5, 2, Limits(1, 0, 2)))  # to at most 4 experts
def test_every_change_that_a_refusal_names_mends_it(problem: tuple[int, int, Limits]) -> None:
    experts, clients, limits = problem
    try:
        check(experts, clients, limits)
        return
    except CoterieError as fault:
        text = str(fault)
    fault, _, mends = text.partition(": ")
    assert re.search(r"\d", fault)
    for mend in mends.split(", or "):
        if named := re.fullmatch(r"(raise|lower) (the )?(\w+) to (?:at least |at most )?(\d+)", mend):
            way, _, name, number = named.groups()
            before = {"experts": experts, "clients": clients, **vars(limits)}
            after = before | {name: int(number)}
            assert (after[name] > before[name]) == (way == "raise")
            changed = Limits(*(after[key] for key in vars(limits)))
            assert feasible(after["experts"], after["clients"], changed)
            nearer = (after[name] + (1 if way == "lower" else -1)) if abs(after[name] - before[name]) > 1 else None
            if nearer is not None:
                after[name] = nearer
                changed = Limits(*(after[key] for key in vars(limits)))
                assert not feasible(after["experts"], after["clients"], changed)
        elif mend == "let clients hold different numbers of experts":
            assert feasible(experts, clients, replace(limits, homogeneous=False))
        else:
            assert mend == mends == "change more than one of these numbers"


@quick
@given(problems(), st.sampled_from(KINDS), st.integers(0, 10**6))
def test_the_number_of_threads_changes_nothing(problem: tuple[int, int, Limits], kind: str, seed: int) -> None:
    experts, clients, limits = problem
    if not feasible(experts, clients, limits):
        return
    scores = affinity(kind, 3, experts, clients, seed)
    z = assign(scores, limits, threads=1)
    assert np.array_equal(z, assign(scores, limits, threads=3))
    assert np.array_equal(z, np.concatenate([assign(one[None], limits) for one in scores]))


@quick
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from(KINDS), st.integers(0, 10**6))
def test_experts_with_numbers_of_picks_of_their_own(experts: int, clients: int, kind: str, seed: int) -> None:
    scores = affinity(kind, 2, experts, clients, seed)
    picks = np.random.default_rng(seed).integers(0, clients + 1, (2, experts))
    z = assign(scores, Limits(1, 0, experts), picks=picks)
    assert (z.sum(axis=2) == picks).all()
    free = [
        np.sort(row)[::-1][:most].sum() for row, most in zip(scores.reshape(-1, clients), picks.ravel(), strict=True)
    ]
    found = (scores * z).sum(axis=2).ravel()  # nothing binds the columns: each expert has those that it likes most
    np.testing.assert_allclose(found, free, rtol=0, atol=1e-12 * np.abs(scores).max() * clients)
    one = assign(scores, Limits(1, 1, 1), picks=picks)  # the columns share as evenly as they can
    counts, total = one.sum(axis=1), picks.sum(axis=1, keepdims=True)
    assert (one.sum(axis=2) == picks).all()
    assert (counts >= np.minimum(1, total // clients)).all()
    assert (counts <= np.maximum(1, -(-total // clients))).all()


@pytest.mark.parametrize("picks", [[[2]], [[1, 4]], [[-1, 1]]])
def test_picks_that_cannot_be(picks: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"picks of shape .* expected 0 to 3"):
        assign(np.zeros((1, 2, 3)), Limits(1, 0, 2), picks=picks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(12, 8), (40, 15), (300, 100)], ids=str)
@pytest.mark.parametrize("limits", [Limits(2, 1, 8), Limits(2, 2, 6), Limits(3, 2, 40), Limits(2, 3, 6, True)], ids=str)
def test_no_change_of_an_assignment_is_better(kind: str, size: tuple[int, int], limits: Limits) -> None:
    """Of any size: an assignment is the best if and only if no round of swaps gains."""
    if limits.homogeneous:
        size = (size[1] * 2, size[1])
        limits = replace(limits, clients_per_expert=2)
    experts, clients = size
    if not feasible(experts, clients, limits):
        limits = replace(limits, max_experts=8)
    for scores in affinity(kind, 1, experts, clients, 0):
        (z,) = assign(scores[None], limits)
        assert_within(z[None], limits)
        assert not gains_by_swaps(scores, z, limits)


def gains_by_swaps(scores: np.ndarray, z: np.ndarray, limits: Limits) -> bool:
    """Whether experts that pass from client to client, and back to the first, gain.

    lost[i, j] is the least that is lost where an expert of client i goes to j instead; client N stands for nobody, to
    whom a client below its most may pass one on that it got, and who stands in for a client above its least. Floyd and
    Warshall's algorithm finds whether any way back to i loses less than nothing: 1e-12 a step, for rounding.
    """
    experts, clients = z.shape
    least, most = least_most(experts, clients, limits)
    lost = np.full((clients + 1, clients + 1), np.inf)
    for i in range(clients):
        mine = z[:, i]
        losses = np.where(z[mine], np.inf, scores[mine, i][:, None] - scores[mine])
        lost[i, :clients] = losses.min(axis=0, initial=np.inf)
    lost[:clients, clients] = np.where(z.sum(axis=0) < most, 0, np.inf)
    lost[clients, :clients] = np.where(z.sum(axis=0) > least, 0, np.inf)
    lost += 1e-12 * np.abs(scores).max()
    for via in range(clients + 1):
        lost = np.minimum(lost, lost[:, via, None] + lost[via])
    return bool((lost.diagonal() < 0).any())


def test_that_check_of_swaps_finds_a_worse_assignment() -> None:
    limits = Limits(2, 1, 8)
    scores = affinity("flat", 1, 12, 8, 0)
    (z,) = assign(scores, limits)
    giver, taker = z.sum(axis=0).argmax(), z.sum(axis=0).argmin()
    expert = np.flatnonzero(z[:, giver] & ~z[:, taker])[0]
    worse = z.copy()
    worse[expert, [giver, taker]] = False, True
    assert_within(worse[None], limits)
    assert gains_by_swaps(scores[0], worse, limits)
    assert not gains_by_swaps(scores[0], z, limits)


def test_every_client_is_picked_where_there_are_no_others() -> None:
    assert assign(affinity("peaked", 2, 5, 3, 0), Limits(3, 1, 5)).all()


def test_experts_without_a_preference_share_themselves_out() -> None:
    z = assign(affinity("equal", 2, 30, 8, 0), Limits(2, 2, 8))
    assert set(z.sum(axis=1).ravel().tolist()) == {7, 8}
    assert_within(z, Limits(2, 7, 8))


def test_float32_is_taken() -> None:
    scores = affinity("sharp", 1, 30, 10, 0).astype(np.float32)
    assert np.array_equal(assign(scores, Limits(2, 2, 8)), assign(scores.astype(float), Limits(2, 2, 8)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.7e308])
def test_an_affinity_must_be_finite(bad: float) -> None:
    scores = affinity("flat", 2, 4, 3, 0)
    scores[1, 2, 0], scores[0, 0, 0] = bad, -1e308
    with pytest.raises(ValueError, match="not finite"):
        assign(scores, Limits(1, 1, 2))


@pytest.mark.parametrize("shape", [(4, 3), (0, 4, 3), (1, 4, 3, 1)])
def test_an_affinity_has_three_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
        assign(np.ones(shape), Limits(1, 1, 2))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"success": False, "message": "time limit reached"}, "time limit reached"),
        ({"x": np.full(15, 0.5)}, "not whole"),
        ({"x": np.ones(15)}, "not whole"),
        ({"x": np.eye(5, 3)[[0, 0, 0, 0, 0]].ravel()}, "not whole"),  # one client gets all
    ],
)
def test_what_comes_back_is_checked(monkeypatch: pytest.MonkeyPatch, changed: dict, says: str) -> None:
    answer = {"success": True, "message": "", "x": np.zeros(15), **changed}
    answer["x"] = np.concatenate([answer["x"], np.zeros(3)])
    monkeypatch.setattr(module, "linprog", lambda *_, **__: SimpleNamespace(**answer))
    with pytest.raises(RuntimeError, match=says):
        assign(affinity("flat", 1, 5, 3, 0), Limits(1, 1, 3))
