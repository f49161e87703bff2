"""The part of a report that shows an assignment of experts by module, and how the experts are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from coterie.report import plots
from coterie.report.assignment import History, Usage, neighbours, short_names, shown_modules, together, used
from coterie.report.plots import Panel, Picture, natural
from coterie.report.tables import Table
from coterie.types import SHARED, ClientId, Json

_MEASURES = {"weight": "mean gate weight", "share": "share of tokens"}
_POOL = {
    "mode": "mode",
    "experts": "experts in a module's pool",
    "clients_per_expert": "clients per expert",
    "max_experts": "most per client and module",
}


def assignment_table(assigned: History, pool: Mapping[str, Json]) -> Table:
    """The assignment in a few figures; ``pool`` is what the method says of its pool."""
    rows: list[tuple[str, Json]] = [(name, pool[key]) for key, name in _POOL.items() if key in pool]
    for name, held in (("per module", assigned.counts), ("in total", assigned.counts.sum(1))):
        rows.append((f"held by a client, {name}", f"mean {held.mean():.1f}, {held.min()} to {held.max()}"))
    last = assigned.rounds[-1]
    if last in assigned.changed:
        changed, pairs = assigned.changed[last], assigned.pairs[last]
        share = f"{changed / max(pairs, 1):.0%}"
        rows.append(
            ("newly assigned", f"{changed:,} of {pairs:,} pairs of expert and client ({share}), in round {last}")
        )
    if last in assigned.agreement and assigned.comparable:
        same = f"{assigned.agreement[last]:.1%} of two holders of an expert are of the same group"
        rows.append(("agreement with the groups", f"{same}, {assigned.chance:.1%} of any two clients"))
    return Table("Assignment", ["", ""], rows)


def assignment_pictures(assigned: History) -> Iterator[Picture]:
    """Who holds what, how that changes, how much it differs between clients and agrees with their groups."""
    last, short = assigned.rounds[-1], short_names(assigned.modules)
    panels = {short[module]: _held_panel(assigned, module) for module in shown_modules(assigned.modules)}
    figure = plots.assigned_experts(panels, assigned.clients, assigned.groups)
    lost = " Grey: held before, not now." if len(assigned.rounds) > 1 and any(assigned.changed.values()) else ""
    note = (
        f"{_which(panels, assigned.modules)}Blue: held in round {last}, with the number of rounds so far.{lost} "
        "Experts that the same clients hold stand side by side."
    )
    yield Picture("expert-assignment", "Who holds which expert", figure, note)
    names = [short[module] for module in assigned.modules]
    figure = plots.held_experts(assigned.counts, names, assigned.clients, assigned.groups)
    note = f"Experts of the pool that a client holds in each module, in round {last}."
    yield Picture("experts-held", "How the clients' models differ", figure, note)
    shares = together(assigned.held)
    if len(shares) > 1:
        figure = plots.held_together(shares, assigned.clients, assigned.groups)
        note = f"Over all modules, in round {last}."
        if 1 < len(set(assigned.groups)) < len(assigned.groups):
            note += " Frames: the group that a client was cut from, which the method is not told."
        yield Picture("experts-together", "Which clients share experts", figure, note)
    if len(assigned.changed) > 1 and any(assigned.changed.values()):
        curve = [(rnd, count / max(assigned.pairs[rnd], 1)) for rnd, count in assigned.changed.items()]
        figure = plots.accuracy_by_round({"new": curve}, label="pairs of expert and client")
        note = "The share of pairs that the round before did not have."
        yield Picture("assignment-changes", "How much each round re-assigns", figure, note)
    if len(assigned.agreement) > 1 and assigned.chance is not None and assigned.comparable:
        curve = [*assigned.agreement.items()]
        figure = plots.accuracy_by_round(
            {"same group": curve}, label="pairs of holders", level=("chance", assigned.chance)
        )
        note = "Of every two clients that hold the same expert, how many are of the same group."
        yield Picture("assignment-agreement", "Do clients of a group share experts?", figure, note)


def usage_pictures(
    usage: Mapping[ClientId, Usage], groups: Mapping[ClientId, str | None], assigned: History | None
) -> Iterator[Picture]:
    """How the clients' tokens use their experts, in a few modules; nothing without ``usage`` by module."""
    modules = sorted({module for by_module in usage.values() for module in by_module}, key=natural)
    clients = [client for client in groups if client in usage]
    short, panels = short_names(modules), {}
    for measure, name in _MEASURES.items():
        row = {short[m]: _used_panel(usage, m, clients, measure, assigned) for m in shown_modules(modules)}
        if row and all(panel.experts for panel in row.values()):
            panels[name] = row
    if panels:
        figure = plots.used_experts(panels, clients, [groups[client] for client in clients])
        which = _which(next(iter(panels.values())), modules)
        numbers = {e for by_module in usage.values() for row in by_module.values() for e in row.get("expert", ())}
        shared = " The shared expert, which every token uses, is left out." if SHARED in numbers else ""
        note = f"{which}Empty: not held.{shared}"
        yield Picture("expert-usage", "Which client uses which expert", figure, note)


def _held_panel(assigned: History, module: str) -> Panel:
    m = list(assigned.modules).index(module)
    order = neighbours(assigned.held[m])
    held, times = assigned.held[m][:, order], assigned.times[m][:, order]
    return Panel([assigned.experts[e] for e in order], np.where(held, times, np.nan), times > 0)


def _used_panel(
    usage: Mapping[ClientId, Usage], module: str, clients: Sequence[ClientId], measure: str, assigned: History | None
) -> Panel:
    """The experts in the order that the picture of the assignment has them in, where there is one."""
    found = used(usage, module, clients, measure)
    order = list(found)
    if assigned and module in assigned.modules:
        place = {e: i for i, e in enumerate(_held_panel(assigned, module).experts)}
        order.sort(key=lambda e: place.get(e, len(place)))
    return Panel(order, np.array([found[e] for e in order]).T)


def _which(shown: Sequence[str] | Mapping[str, object], modules: Sequence[str]) -> str:
    return f"{len(shown)} of {len(modules)} modules. " if len(shown) < len(modules) else ""
