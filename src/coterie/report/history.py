"""What an assignment of experts shows by round: who holds what, what changes, who holds experts together.

Axes of the tables: m module, c client, e expert. A pair is an expert of a module and a client that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.methods.findings import Assignment
from coterie.types import ClientId

Held = NDArray[np.bool_]
Counts = NDArray[np.int_]
Shares = NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """The assignments of a run, round by round: ``held`` [m, c, e] is that of the last of ``rounds``.

    ``groups`` [c] are the clients' groups, as far as they are known.
    ``times`` [m, c, e] counts the rounds in which a client held an expert, up to the last. ``pairs`` is the number of
    pairs by round, ``changed`` how many of them the round before did not have, ``agreement`` the result of
    :func:`agreement`; ``chance`` is its value if holders were drawn regardless of groups.
    """

    modules: Sequence[str]
    clients: Sequence[ClientId]
    groups: Sequence[str | None]
    experts: Sequence[int]
    rounds: Sequence[int]
    held: Held
    times: Counts
    pairs: Mapping[int, int]
    changed: Mapping[int, int]
    agreement: Mapping[int, float]
    chance: float | None

    @property
    def comparable(self) -> bool:
        """Whether agreement could differ: there are groups, not just one, nor one for each client."""
        return self.chance is not None and 0 < self.chance < 1

    @property
    def counts(self) -> Counts:
        """The number of experts that each client holds in each module, [c, m]."""
        return np.asarray(self.held.sum(2).T)


def by_round(after: Mapping[int, Assignment], rounds: Sequence[int]) -> dict[int, Assignment]:
    """The assignment that each of ``rounds`` trained with and, if known, the one of the next round.

    ``after`` has the assignment after every round, and after 0 that of the first.
    """
    known = sorted(after)
    in_round = {rnd: after[max(earlier)] for rnd in rounds if (earlier := [r for r in known if r < rnd])}
    if known and after[known[-1]] != in_round.get(known[-1]):
        in_round[known[-1] + 1] = after[known[-1]]
    return in_round


def history(
    assignments: Mapping[int, Assignment],
    clients: Sequence[ClientId],
    modules: Sequence[str],
    groups: Mapping[ClientId, str | None],
    pool: int = 0,
) -> History:
    """Go through the ``assignments`` by round, the axes in the order of ``clients`` and ``modules``.

    ``pool`` is the number of experts in the pool, if it is known: some may be held by nobody.
    """
    rounds = sorted(assignments)
    lists = [held for of in assignments.values() for by_client in of.experts.values() for held in by_client.values()]
    experts = sorted({*range(pool), *(expert for held in lists for expert in held)})
    known = [groups.get(client) for client in clients]
    held = np.zeros((len(modules), len(clients), len(experts)), dtype=bool)
    times = held.astype(np.int_)
    pairs: dict[int, int] = {}
    changed: dict[int, int] = {}
    agreed: dict[int, float | None] = {}
    for rnd in rounds:
        before, held = held, held_table(assignments[rnd], modules, clients, experts)
        times += held
        pairs[rnd], changed[rnd], agreed[rnd] = int(held.sum()), int((held & ~before).sum()), agreement(held, known)
    anew = {rnd: changed[rnd] for rnd in rounds[1:]}
    shares = {rnd: share for rnd, share in agreed.items() if share is not None}
    return History(modules, clients, known, experts, rounds, held, times, pairs, anew, shares, chance_of(known))


def held_table(
    assignment: Assignment, modules: Sequence[str], clients: Sequence[ClientId], experts: Sequence[int]
) -> Held:
    """Whether each client holds each expert: booleans [m, c, e]."""
    columns = {e: i for i, e in enumerate(experts)}
    held = np.zeros((len(modules), len(clients), len(experts)), dtype=bool)
    for m, module in enumerate(modules):
        by_client = assignment.experts.get(module, {})
        for c, client in enumerate(clients):
            held[m, c, [columns[e] for e in by_client.get(client, ())]] = True
    return held


def agreement(held: Held, groups: Sequence[str | None]) -> float | None:
    """Of all pairs of clients that hold the same expert of a module, the share of the same group.

    A pair counts once for each (module, expert) that it shares; clients without a group do not count. None where no
    two clients with a group share an expert. ``held`` [m, c, e], ``groups`` [c].
    """
    names = sorted({group for group in groups if group is not None})
    member = np.array([[group == name for name in names] for group in groups], dtype=np.float32)
    if not names:
        return None
    holders = (held.transpose(0, 2, 1).reshape(-1, len(groups)).astype(np.float32) @ member).astype(np.float64)
    every = _pairs(holders.sum(1)).sum()
    return float(_pairs(holders).sum() / every) if every else None


def chance_of(groups: Sequence[str | None]) -> float | None:
    """The share of the same group among all pairs of clients with a group; None where there is no such pair."""
    known = [group for group in groups if group is not None]
    sizes = np.array([known.count(name) for name in sorted(set(known))], dtype=float)
    return float(_pairs(sizes).sum() / _pairs(sizes.sum())) if len(known) > 1 else None


def together(held: Held) -> Shares:
    """Of the (module, expert) pairs that either of two clients holds, the share that both hold: [c, c], NaN if none."""
    flat = held.transpose(1, 0, 2).reshape(held.shape[1], -1).astype(np.float32)
    both = (flat @ flat.T).astype(float)
    either = both.diagonal()[:, None] + both.diagonal() - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def neighbours(held: Held) -> list[int]:
    """The columns of ``held`` [c, e], ordered so that experts with the same holders are adjacent."""
    holders = held.sum(0)
    rows = np.arange(len(held)) @ held
    middle = np.where(holders > 0, rows / np.maximum(holders, 1), len(held))
    return [int(e) for e in np.argsort(middle, kind="stable")]


def _pairs(members: Shares) -> Shares:
    return np.asarray(members * (members - 1) / 2)
