"""What an assignment of experts to clients shows: who holds what by round, what changes, who holds experts together.

Pure functions on the JSON that a method logs of its assignment: ``{module: {client: [expert numbers]}}``. Axes of the
tables: m module, c client, e expert. A pair is an expert of a module and a client that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, TypeGuard

import numpy as np

from coterie.types import ClientId, Json

Assignment = Mapping[str, Mapping[ClientId, Sequence[int]]]
Usage = Mapping[str, Mapping[str, Sequence[Any]]]  # of a client, by module: weight, share and expert
Table = np.ndarray[Any, Any]


@dataclass(frozen=True)
class History:
    """The assignments of a run, round by round: ``held`` [m, c, e] is that of the last of ``rounds``.

    ``groups`` [c] are the clients' groups, as far as they are known.
    ``times`` [m, c, e] counts the rounds in which a client held an expert, up to the last. ``pairs`` is the number of
    pairs by round, ``changed`` how many of them the round before did not have, ``agreement`` what
    :func:`agreement` says; ``chance`` is what it would be if holders were drawn without regard to groups.
    """

    modules: Sequence[str]
    clients: Sequence[ClientId]
    groups: Sequence[str | None]
    experts: Sequence[int]
    rounds: Sequence[int]
    held: Table
    times: Table
    pairs: Mapping[int, int]
    changed: Mapping[int, int]
    agreement: Mapping[int, float]
    chance: float | None

    @property
    def comparable(self) -> bool:
        """Whether agreement could differ: there are groups, not just one, nor one for each client."""
        return self.chance is not None and 0 < self.chance < 1

    @property
    def counts(self) -> Table:
        """The number of experts that each client holds in each module, [c, m]."""
        return np.asarray(self.held.sum(2).T)


def is_assignment(value: Json) -> TypeGuard[Assignment]:
    """Whether ``value`` is ``{module: {client: [expert numbers]}}``, with a module at least."""
    if not isinstance(value, dict) or not value or not all(isinstance(clients, dict) for clients in value.values()):
        return False
    lists = [experts for clients in value.values() for experts in clients.values()]
    return all(isinstance(experts, list) for experts in lists) and all(
        isinstance(e, int) and e >= 0 for e in chain.from_iterable(lists)
    )


def by_round(start: Mapping[str, Json], described: Mapping[int, Mapping[str, Json]]) -> dict[int, Assignment]:
    """The assignment that each round trained with, and the one that the next round will, where that is known.

    ``described`` holds what the event of each round says of the method's state, as far as it changed: an assignment is
    for the rounds after it. That of round 1 is in ``start``, said before it.
    """
    first = start.get("assignment")
    now = first if is_assignment(first) else None
    found: dict[int, Assignment] = {}
    for rnd in sorted(described):
        if now is not None:
            found[rnd] = now
        if is_assignment(value := described[rnd].get("assignment")):
            now = found[rnd + 1] = value
    return found if described or now is None else {1: now}


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
    experts = sorted({*range(pool), *_numbers(assignments.values())})
    known = [groups.get(client) for client in clients]
    held = np.zeros((len(modules), len(clients), len(experts)), dtype=bool)
    times = held.astype(np.int32)
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
) -> Table:
    """Who holds what: [m, c, e] of truth values."""
    places = {e: i for i, e in enumerate(experts)}
    held = np.zeros((len(modules), len(clients), len(experts)), dtype=bool)
    for m, module in enumerate(modules):
        by_client = assignment.get(module, {})
        for c, client in enumerate(clients):
            held[m, c, [places[e] for e in by_client.get(client, ())]] = True
    return held


def agreement(held: Table, groups: Sequence[str | None]) -> float | None:
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


def together(held: Table) -> Table:
    """The share of (module, expert) that two clients both hold, of those that either does: [c, c], NaN for none."""
    flat = held.transpose(1, 0, 2).reshape(held.shape[1], -1).astype(np.float32)
    both = (flat @ flat.T).astype(float)
    either = both.diagonal()[:, None] + both.diagonal() - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def neighbours(held: Table) -> list[int]:
    """The columns of ``held`` [c, e], those with holders far up first, so that experts of the same holders are near."""
    holders = held.sum(0)
    rows = np.arange(len(held)) @ held
    middle = np.where(holders > 0, rows / np.maximum(holders, 1), len(held))
    return [int(e) for e in np.argsort(middle, kind="stable")]


def used(
    usage: Mapping[ClientId, Usage], module: str, clients: Sequence[ClientId], what: str
) -> dict[int, list[float]]:
    """By expert of ``module``, the ``what`` ("weight", "share") of each of ``clients``, NaN where it does not hold it.

    The shared expert, whose gate is always 1, is left out. Rows that do not number their experts count from 0.
    """
    found: dict[int, list[float]] = {}
    for row, client in enumerate(clients):
        values = usage.get(client, {}).get(module, {})
        for expert, value in zip(values.get("expert") or count(), values.get(what) or (), strict=False):
            if expert >= 0:
                found.setdefault(int(expert), [math.nan] * len(clients))[row] = math.nan if value is None else value
    return dict(sorted(found.items()))


def short_names(modules: Sequence[str]) -> dict[str, str]:
    """Each module's numbers and the end of its path, as short as tells them apart: ``3.query``, ``3.output.dense``."""
    paths = {module: module.split(".") for module in modules}
    kept = dict.fromkeys(paths, 1)
    while True:
        names = {m: ".".join([*(p for p in path[: -kept[m]] if p.isdecimal()), *path[-kept[m] :]])
                 for m, path in paths.items()}  # fmt: skip
        owners: dict[str, list[str]] = {}
        for module, name in names.items():
            owners.setdefault(name, []).append(module)
        unclear = [m for same in owners.values() if len(same) > 1 for m in same if kept[m] < len(paths[m])]
        if not unclear:
            return names
        kept |= {m: kept[m] + 1 for m in unclear}


def shown_modules(modules: Sequence[str]) -> list[str]:
    """The first, the middle and the last of ``modules``: what a picture has room for."""
    return [modules[i] for i in sorted({0, len(modules) // 2, len(modules) - 1})] if modules else []


def _numbers(assignments: Iterable[Assignment]) -> set[int]:
    seen: set[int] = set()
    for assignment in assignments:
        for by_client in assignment.values():
            seen.update(*by_client.values())
    return seen


def _pairs(members: Table) -> Table:
    return np.asarray(members * (members - 1) / 2)
