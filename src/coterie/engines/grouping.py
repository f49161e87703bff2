"""Which clients share forward passes, and on which device: alike ones together, so that little is padding.

A pass is as high as its largest batch and as long as its longest row. What a client gets does not depend on who else
is in it; how long a round takes does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from coterie.compute.workplace import Workplace
from coterie.data.rows import ClientData
from coterie.requests import Optim
from coterie.types import CoterieError

PASS = 100  # tokens of the packaged encoder on a CPU that take as long as what a pass costs besides


@dataclass(frozen=True)
class Load:
    """What a client brings along: its passes of a round, the rows of one, and the tokens of one's longest row (mean).

    ``number`` is its place in the federation.
    """

    number: int
    passes: int
    rows: int
    tokens: float


def training(place: Workplace, optim: Optim) -> Callable[[int, ClientData], Load]:
    """The load of a client in a round of training."""

    def load(number: int, client: ClientData) -> Load:
        lengths = _lengths(place, client, "train")
        per_epoch = -(-len(lengths) // optim.batch_size)
        passes = optim.steps * optim.accumulate if optim.steps else optim.epochs * per_epoch
        return Load(number, passes, min(optim.batch_size, len(lengths)), _mean_longest(lengths, optim.batch_size))

    return load


def evaluation(place: Workplace, splits: Sequence[str], size: int) -> Callable[[int, ClientData], Load]:
    """The load of a client in the evaluation of ``splits``, ``size`` rows of it in a pass."""

    def load(number: int, client: ClientData) -> Load:
        found = [lengths for split in splits if (lengths := _lengths(place, client, split))]
        longest = [_mean_longest(lengths, size) for lengths in found] or [0.0]
        passes = sum(-(-len(lengths) // size) for lengths in found)
        return Load(number, passes, max([min(size, len(of)) for of in found] or [0]), statistics.fmean(longest))

    return load


def grouped(loads: Sequence[Load], size: int) -> list[list[Load]]:
    """Groups of at most ``size``, the most expensive first: of several orders, the one that takes the least.

    By passes and then by length, the other way round, and by length among those with about as many passes. Ties go
    by the clients' places, so that the same clients always come to the same groups.
    """
    orders: list[Callable[[Load], tuple[float, ...]]] = [
        lambda one: (-one.passes, -one.rows, -one.tokens),
        lambda one: (-one.tokens, -one.passes, -one.rows),
        lambda one: (-_about(one.passes), -_about(one.rows), -one.tokens),
    ]
    found = []
    for order in orders:
        by = sorted(loads, key=lambda one: (*order(one), one.number))
        found.append([by[start : start + size] for start in range(0, len(by), size)])
    best = min(found, key=lambda groups: sum(map(cost, groups)))
    return sorted(best, key=lambda group: (-cost(group), group[0].number))


def cost(group: Sequence[Load]) -> float:
    """Tokens that go through the base, padding included, for clients that share passes; :data:`PASS` for every one."""
    total = 0.0
    for start, stop in pairwise(sorted({0} | {one.passes for one in group})):  # in between, the same clients take part
        active = [one for one in group if one.passes > start]
        tokens = len(active) * max(one.rows for one in active) * max(one.tokens for one in active)
        total += (stop - start) * (tokens + PASS)
    return total


def spread(groups: Sequence[Sequence[Load]], places: int) -> list[list[int]]:
    """The numbers of the groups for each of ``places``: the most expensive first, each to the place that has the least
    to do so far."""
    given: list[list[int]] = [[] for _ in range(places)]
    busy = [0.0] * places
    for number in sorted(range(len(groups)), key=lambda i: (-cost(groups[i]), i)):
        place = min(range(places), key=lambda p: (busy[p], p))
        given[place].append(number)
        busy[place] += cost(groups[number])
    return given


def _lengths(place: Workplace, client: ClientData, split: str) -> Sequence[int]:
    """None for a client with a row that cannot be encoded: it fails when it is its turn, and alone."""
    try:
        return place.lengths(client, split)
    except CoterieError:
        return []


def _mean_longest(lengths: Sequence[int], size: int) -> float:
    """The mean over batches of similar rows of each one's longest."""
    return statistics.fmean(sorted(lengths, reverse=True)[::size]) if lengths else 0.0


def _about(number: int) -> int:
    """The same for numbers that differ by a fourth or so."""
    return round(math.log(number, 1.25)) if number else 0
