"""What noisy releases cost in differential privacy: epsilon for a delta, by the package dp-accounting (extra privacy).

A release adds Gaussian noise of ``multiplier`` times the clip to a sum in which each member's vector is at most as long
as the clip. Two federations are neighbours if one member's vector is 0 in one of them; with a cohort of a fixed size
drawn without replacement, if one member is exchanged for any other, which the noise hides half as well.

Gaussian releases without sampling compose to one, whose epsilon is exact (Balle and Wang, arXiv 1805.06530). With
Poisson sampling, PLD is tight (privacy loss distributions; Koskela et al., arXiv 1906.03049). RDP (Mironov, arXiv
1702.07476; without replacement Wang et al., arXiv 1808.00087) also covers cohorts of a fixed size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from coterie.types import CoterieError

Sampled = Literal["all", "fixed", "poisson"]
Accountant = Literal["exact", "PLD", "RDP"]
INSTALL = "pip install 'coterie[privacy]'"
_FINEST = 1e-3  # relative, of a calibrated multiplier
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)  # of RDP; dp-accounting's fractions need not converge
_INTERVAL = 1e-3  # of PLD's grid; its epsilon is an upper bound on any grid
_MOST = 1e5  # a multiplier beyond which nothing is left of any sum
_COUNTED = 1e8  # a multiplier beyond which the accountants fail: more noise is counted as this, which is no cheaper
_LEAST = 1e-3  # a multiplier below which nothing is hidden: one release costs more than 10**5
_TIGHT_UP_TO = 100.0  # the epsilon of RDP beyond which PLD's grid would fill the memory, for a figure that says nothing


class NoAccountantError(CoterieError):
    """The package that calculates costs is not installed."""


@dataclass(frozen=True)
class Noised:
    """A release as the accountant sees it: its multiplier, how its members were drawn, from how many, and how many.

    ``drawn`` is the cohort's size, or with Poisson sampling its expectation.
    """

    multiplier: float
    sampled: Sampled = "all"
    members: int = 1
    drawn: float = 1.0


@dataclass(frozen=True)
class Spent:
    """``epsilon`` for ``delta``, by ``accountant``: the smaller of RDP's and, where one applies, a ``tight`` one."""

    epsilon: float
    delta: float
    accountant: Accountant
    rdp: float
    tight: float | None = None


def spent_text(of: Spent) -> str:
    """``of`` in words."""
    return f"epsilon {of.epsilon:.3g} at delta {of.delta:g}"


def spent(releases: Sequence[Noised] | Mapping[Noised, int], delta: float) -> Spent:
    """What ``releases``, or so many of each, cost together, each made after the others are known."""
    counts: Counter[Noised] = Counter()
    for release, times in Counter(releases).items():
        counts[replace(release, multiplier=min(release.multiplier, _COUNTED))] += times
    if not counts:
        return Spent(0.0, delta, "exact", 0.0, 0.0)
    if any(release.multiplier < _LEAST for release in counts):
        return Spent(math.inf, delta, "exact", math.inf)
    return _spent(tuple(sorted(_together(counts).items(), key=repr)), delta)


@cache
def _spent(counts: tuple[tuple[Noised, int], ...], delta: float) -> Spent:
    rdp = _epsilon("RDP", counts, delta)
    sampled = {release.sampled for release, _ in counts}
    if sampled == {"all"}:
        ((whole, _),) = counts
        return Spent(float(_library().get_epsilon_gaussian(whole.multiplier, delta)), delta, "exact", rdp)
    tight = None if "fixed" in sampled or rdp > _TIGHT_UP_TO else _epsilon("PLD", counts, delta)
    if tight is None or rdp < tight:
        return Spent(rdp, delta, "RDP", rdp, tight)
    return Spent(tight, delta, "PLD", rdp, tight)


@cache
def multiplier_for(epsilon: float, delta: float, planned: tuple[Noised, ...]) -> float:
    """The least multiplier with which the ``planned`` releases, in proportion to theirs, cost at most ``epsilon``.

    Raises :class:`CoterieError` where there is none.
    """

    counts = Counter(planned)

    def cost(multiplier: float) -> float:
        made: Counter[Noised] = Counter()
        for of, times in counts.items():
            made[replace(of, multiplier=multiplier * of.multiplier)] += times  # two may round to one
        return spent(made, delta).epsilon

    if not planned:
        return 1.0
    low, high = 0.0, 1.0
    while cost(high) > epsilon:
        low, high = high, 2 * high
        if high > _MOST:
            raise CoterieError(f"[privacy] no noise gives epsilon = {epsilon:g} over {len(planned)} releases; raise it")
    while high - low > _FINEST * high:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > epsilon else (low, middle)
    return high


def of_one_draw(releases: Sequence[Noised]) -> list[Noised]:
    """``releases`` to the same draw of members, as the accountant has to see them.

    Counted one by one they would look as if each had a draw of its own, which hides more. To one draw, they are one
    Gaussian mechanism of 1 / z^2 = the sum of theirs.
    """
    drawn: dict[tuple[Sampled, int, float], list[float]] = {}
    for release in releases:
        drawn.setdefault((release.sampled, release.members, release.drawn), []).append(release.multiplier)
    return [Noised(_one(of), *draw) for draw, of in drawn.items()]


def _one(multipliers: Sequence[float]) -> float:
    if len(multipliers) == 1 or min(multipliers) < _LEAST:  # whose square may be too small a number
        return min(multipliers)
    return float(sum(of**-2 for of in multipliers) ** -0.5)


def _together(counts: Mapping[Noised, int]) -> dict[Noised, int]:
    """``counts`` with those of all members as one: Gaussian mechanisms compose to one, mu^2 = sum of 1 / z^2."""
    whole = [times * release.multiplier**-2 for release, times in counts.items() if release.sampled == "all"]
    one = {Noised(sum(whole) ** -0.5): 1} if whole else {}
    return one | {release: times for release, times in counts.items() if release.sampled != "all"}


def _epsilon(accountant: Accountant, counts: Sequence[tuple[Noised, int]], delta: float) -> float:
    exchanged = any(release.sampled == "fixed" for release, _ in counts)  # the neighbours of all, then
    dp, made = _accountant(accountant, exchanged)
    for release, times in counts:
        made.compose(_event(dp, release, exchanged), times)
    return float(made.get_epsilon(delta))


def _event(dp: Any, release: Noised, exchanged: bool) -> Any:
    match release.sampled:
        case "fixed":  # a member may be exchanged for one whose vector points the other way
            half = dp.GaussianDpEvent(release.multiplier / 2)
            return dp.SampledWithoutReplacementDpEvent(release.members, int(release.drawn), half)
        case "poisson":
            return dp.PoissonSampledDpEvent(release.drawn / release.members, dp.GaussianDpEvent(release.multiplier))
        case _:
            return dp.GaussianDpEvent(release.multiplier / (2 if exchanged else 1))


def _accountant(name: Accountant, exchanged: bool) -> tuple[Any, Any]:
    dp = _library()
    from dp_accounting import pld, rdp

    relation = dp.NeighboringRelation.REPLACE_ONE if exchanged else dp.NeighboringRelation.REPLACE_SPECIAL
    if name == "PLD":
        return dp, pld.PLDAccountant(relation, value_discretization_interval=_INTERVAL)
    return dp, rdp.RdpAccountant(_ORDERS, relation)


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError as fault:
        raise NoAccountantError(f"[privacy] needs the package dp-accounting: {INSTALL}") from fault
    return dp_accounting
