"""Which clients share forward passes, and on which device: similar clients together, so that there is little padding.

A pass has as many rows as its largest batch, and as many tokens as its longest row. A client's result does
not depend on who else is in its pass; the time that a round takes does.
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

PASS = 100  # a pass costs as much as its tokens and this many more, for the packaged encoder on a CPU


@dataclass(frozen=True)
class Load:
    """What a client costs: the passes of its round, the rows of a pass, and the tokens of a pass's longest row (mean).

    ``number`` is the client's position in the federation.
    """

    number: int
    passes: int
    rows: int
    tokens: float


def training_load(workplace: Workplace, optim: Optim) -> Callable[[int, ClientData], Load]:
    """A function that gives a client's load in a round of training."""

    def load(number: int, client: ClientData) -> Load:
        lengths = _lengths(workplace, client, "train")
        per_epoch = -(-len(lengths) // optim.batch_size)
        passes = optim.steps * optim.accumulate if optim.steps else optim.epochs * per_epoch
        return Load(number, passes, min(optim.batch_size, len(lengths)), _mean_longest(lengths, optim.batch_size))

    return load


def evaluation_load(workplace: Workplace, splits: Sequence[str], size: int) -> Callable[[int, ClientData], Load]:
    """A function that gives a client's load in the evaluation of ``splits``, with ``size`` of its rows in a pass."""

    def load(number: int, client: ClientData) -> Load:
        of_splits = [lengths for split in splits if (lengths := _lengths(workplace, client, split))]
        longest = [_mean_longest(lengths, size) for lengths in of_splits] or [0.0]
        passes = sum(-(-len(lengths) // size) for lengths in of_splits)
        rows = max([min(size, len(lengths)) for lengths in of_splits] or [0])
        return Load(number, passes, rows, statistics.fmean(longest))

    return load


def grouped(loads: Sequence[Load], size: int) -> list[list[Load]]:
    """Groups of at most ``size``, the most expensive first: the cheapest grouping that any of several orders gives.

    The orders: by passes and then by length, the other way round, and by length among those with about as many passes.
    Ties are broken by the clients' positions, so that the same clients always get the same groups.
    """
    orders: list[Callable[[Load], tuple[float, ...]]] = [
        lambda load: (-load.passes, -load.rows, -load.tokens),
        lambda load: (-load.tokens, -load.passes, -load.rows),
        lambda load: (-_about(load.passes), -_about(load.rows), -load.tokens),
    ]
    candidates = []
    for order in orders:
        ordered = sorted(loads, key=lambda load: (*order(load), load.number))
        candidates.append([ordered[start : start + size] for start in range(0, len(ordered), size)])
    best = min(candidates, key=lambda groups: sum(map(cost, groups)))
    return sorted(best, key=lambda group: (-cost(group), group[0].number))


def cost(group: Sequence[Load]) -> float:
    """The tokens, padding included, that go through the base for clients that share passes; :data:`PASS` per pass."""
    total = 0.0
    for start, stop in pairwise(
        sorted({0} | {load.passes for load in group})
    ):  # the same clients take part in all passes of this range
        active = [load for load in group if load.passes > start]
        tokens = len(active) * max(load.rows for load in active) * max(load.tokens for load in active)
        total += (stop - start) * (tokens + PASS)
    return total


def schedule(groups: Sequence[Sequence[Load]], workplaces: int) -> list[list[int]]:
    """The numbers of the groups that each workplace runs: the most expensive first, each where the load is least."""
    plan: list[list[int]] = [[] for _ in range(workplaces)]
    busy = [0.0] * workplaces
    for number in sorted(range(len(groups)), key=lambda i: (-cost(groups[i]), i)):
        workplace = min(range(workplaces), key=lambda p: (busy[p], p))
        plan[workplace].append(number)
        busy[workplace] += cost(groups[number])
    return plan


def _lengths(workplace: Workplace, client: ClientData, split: str) -> Sequence[int]:
    """No lengths for a client with a row that cannot be encoded: it fails by itself, when it is its turn."""
    try:
        return workplace.lengths(client, split)
    except CoterieError:
        return []


def _mean_longest(lengths: Sequence[int], size: int) -> float:
    """The longest row of a batch of similar rows, as a mean over the batches."""
    return statistics.fmean(sorted(lengths, reverse=True)[::size]) if lengths else 0.0


def _about(number: int) -> int:
    """A bucket: the same for numbers that differ by up to about a fourth."""
    return round(math.log(number, 1.25)) if number else 0
