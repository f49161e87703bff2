"""Shows an assignment of experts by module: who holds what, how that changes, how much the clients' models differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from coterie.methods.findings import Assignment, ExpertPool
from coterie.report import plots
from coterie.report.history import History, by_round, history, neighbours, together
from coterie.report.modules import how_many, short_names, shown_modules
from coterie.report.plots import Panel, Picture, natural
from coterie.report.read import Run
from coterie.report.tables import Table

FINDING = Assignment
_POOL = {
    "mode": "mode",
    "experts": "experts in a module's pool",
    "clients_per_expert": "clients per expert",
    "max_experts": "most per client and module",
}


def show(assignment: Assignment, run: Run) -> Iterator[Picture | Table]:
    """The pictures of the assignment by round, and its figures."""
    past = history_of(assignment, run)
    if past is not None:
        yield from _pictures(past)
        yield _figures(past, assignment.pool)


def history_of(now: Assignment, run: Run) -> History | None:
    """The assignment by round, clients by group and modules by name; None where nobody holds anything."""
    rounds = by_round(run.history(Assignment), sorted(run.rounds)) or {_rounds(run): now}
    modules = {module for assignment in rounds.values() for module in assignment.experts}
    holders = {client for of in rounds.values() for by_client in of.experts.values() for client in by_client}
    groups = run.group_of
    clients = sorted(holders, key=lambda client: (natural(groups.get(client) or ""), natural(client)))
    pool = now.pool.experts if now.pool else 0
    past = history(rounds, clients, sorted(modules, key=natural), groups, pool)
    return past if past.held.size else None


def _rounds(run: Run) -> int:
    return (run.summary.rounds if run.summary else 0) or 1


def held_panel(past: History, module: str) -> Panel:
    """Clients x experts of a module: the rounds for which a client has held an expert that it holds now."""
    m = list(past.modules).index(module)
    order = neighbours(past.held[m])
    held, times = past.held[m][:, order], past.times[m][:, order]
    return Panel([past.experts[e] for e in order], np.where(held, times, np.nan), times > 0)


def _pictures(past: History) -> Iterator[Picture]:
    yield _who_holds(past)
    last, short = past.rounds[-1], short_names(past.modules)
    names = [short[module] for module in past.modules]
    figure = plots.held_experts(past.counts, names, past.clients, past.groups)
    note = f"Experts of the pool that a client holds in each module, in round {last}."
    yield Picture("experts-held", "How the clients' models differ", figure, note)
    shares = together(past.held)
    if len(shares) > 1:
        figure = plots.held_together(shares, past.clients, past.groups)
        note = f"Over all modules, in round {last}."
        if 1 < len(set(past.groups)) < len(past.groups):
            note += " Frames: the group that a client's data come from; the method does not know it."
        yield Picture("experts-together", "Which clients share experts", figure, note)
    yield from _by_round(past)


def _who_holds(past: History) -> Picture:
    last, short = past.rounds[-1], short_names(past.modules)
    panels = {short[module]: held_panel(past, module) for module in shown_modules(past.modules)}
    figure = plots.assigned_experts(panels, past.clients, past.groups)
    lost = " Grey: held before, not now." if len(past.rounds) > 1 and any(past.changed.values()) else ""
    note = (
        f"{how_many(len(panels), past.modules)}Blue: held in round {last}, with the number of rounds so far.{lost} "
        "Experts that the same clients hold stand side by side."
    )
    return Picture("expert-assignment", "Who holds which expert", figure, note)


def _by_round(past: History) -> Iterator[Picture]:
    if len(past.agreement) > 1 and past.chance is not None and past.comparable:
        level = ("chance", past.chance)
        figure = plots.lines_by_round({"same group": [*past.agreement.items()]}, label="pairs of holders", level=level)
        note = "Of all pairs of clients that hold the same expert, the share in the same group."
        yield Picture("assignment-agreement", "Do clients of a group share experts?", figure, note)
    if len(past.changed) > 1 and any(past.changed.values()):
        curve = [(rnd, count / max(past.pairs[rnd], 1)) for rnd, count in past.changed.items()]
        figure = plots.lines_by_round({"new": curve}, label="pairs of expert and client")
        note = "The share of pairs that are new in the round."
        yield Picture("assignment-changes", "How much each round re-assigns", figure, note)


def _figures(past: History, pool: ExpertPool | None) -> Table:
    known = {name: value for name, value in asdict(pool).items() if value is not None} if pool else {}
    rows: list[tuple[str, object]] = [(name, known[key]) for key, name in _POOL.items() if key in known]
    for name, held in (("per module", past.counts), ("in total", past.counts.sum(1))):
        rows.append((f"held by a client, {name}", f"mean {held.mean():.1f}, {held.min()} to {held.max()}"))
    last = past.rounds[-1]
    if last in past.changed:
        changed, pairs = past.changed[last], past.pairs[last]
        share = f"{changed / max(pairs, 1):.0%}"
        rows.append(
            ("newly assigned", f"{changed:,} of {pairs:,} pairs of expert and client ({share}), in round {last}")
        )
    if last in past.agreement and past.comparable:
        same = f"{past.agreement[last]:.1%} of pairs of clients with a common expert are in the same group"
        rows.append(("agreement with the groups", f"{same}, {past.chance:.1%} of all pairs of clients"))
    return Table("Assignment", ["", ""], rows)
