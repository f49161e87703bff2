"""Shows how the clients' tokens use their experts: over all modules where these have the same experts, or by module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Literal

import numpy as np

from coterie.methods.findings import Assignment, Clusters, find
from coterie.report import plots
from coterie.report.assignment import held_panel, history_of
from coterie.report.history import History
from coterie.report.modules import how_many, layers_and_matrices, short_names, shown_modules
from coterie.report.plots import Panel, Picture, natural
from coterie.report.read import Run
from coterie.requests import Usage
from coterie.runs.summary import ALL_MODULES
from coterie.types import SHARED, ClientId

Measure = Literal["weight", "share"]
_MEASURES: dict[Measure, str] = {"weight": "mean gate weight", "share": "share of tokens"}


def usage_pictures(run: Run) -> Iterator[Picture]:
    """Which client uses which expert; nothing where that is not known, or where there is one expert."""
    whole = {client: of[ALL_MODULES] for client, of in run.usage.items() if ALL_MODULES in of}
    if any(len(use.weight) > 1 for use in whole.values()):
        clusters = find(run.findings, Clusters)
        members = clusters.members if clusters else {}
        note = "Framed: the expert of the client's own cluster." if members else ""
        figure = plots.expert_usage(whole, members)
        yield Picture("expert-usage", "Which client uses which expert", figure, note)
        if active := experts_by_layer((run.last.usage if run.last else None) or {}, list(run.clients)):
            note = "The mean number of experts that a token uses, over the matrices of a layer."
            yield Picture("experts-by-layer", "Experts in use by layer", plots.experts_by_layer(active), note)
    by_module = {client: of for client, of in run.usage.items() if ALL_MODULES not in of}
    if by_module:
        yield from _by_module(by_module, run)


def experts_by_layer(usage: Mapping[ClientId, Usage], clients: Sequence[ClientId]) -> dict[ClientId, dict[str, float]]:
    """By client and layer, how many experts a token uses: the sum of the experts' shares, a mean over matrices.

    Nothing where the layers are not known.
    """
    matrices = layers_and_matrices(module for of in usage.values() for module in of)
    active: dict[ClientId, dict[str, float]] = {}
    for client in (client for client in clients if client in usage):
        sums: dict[str, list[float]] = {}
        for module, use in usage[client].items():
            if use.share:
                sums.setdefault(matrices[module][0], []).append(sum(use.share))
        active[client] = {layer: sum(of) / len(of) for layer, of in sums.items()}
    layers = {layer for of in active.values() for layer in of}
    return active if len(layers) > 1 else {}


def _by_module(usage: Mapping[ClientId, Usage], run: Run) -> Iterator[Picture]:
    assignment = find(run.findings, Assignment)
    past = history_of(assignment, run) if assignment else None
    modules = sorted({module for of in usage.values() for module in of}, key=natural)
    clients = [client for client in run.clients if client in usage]
    short, panels = short_names(modules), {}
    for measure, name in _MEASURES.items():
        row = {short[m]: _panel(usage, m, clients, measure, past) for m in shown_modules(modules)}
        if row and all(panel.experts for panel in row.values()):
            panels[name] = row
    if panels:
        figure = plots.used_experts(panels, clients, [run.clients[client].group for client in clients])
        which = how_many(len(next(iter(panels.values()))), modules)
        numbers = {expert for of in usage.values() for use in of.values() for expert in use.expert}
        shared = " The shared expert, which every token uses, is left out." if SHARED in numbers else ""
        yield Picture("expert-usage", "Which client uses which expert", figure, f"{which}Empty: not held.{shared}")


def _panel(
    usage: Mapping[ClientId, Usage], module: str, clients: Sequence[ClientId], measure: Measure, past: History | None
) -> Panel:
    """The experts in the order of the picture of the assignment, where there is one."""
    by_expert = used(usage, module, clients, measure)
    order = list(by_expert)
    if past and module in past.modules:
        rank = {expert: i for i, expert in enumerate(held_panel(past, module).experts)}
        order.sort(key=lambda expert: rank.get(expert, len(rank)))
    return Panel(order, np.array([by_expert[expert] for expert in order]).T)


def used(
    usage: Mapping[ClientId, Usage], module: str, clients: Sequence[ClientId], measure: Measure
) -> dict[int, list[float]]:
    """By expert of ``module``, the ``measure`` of each of ``clients``, NaN where it does not hold the expert.

    The shared expert, whose gate is always 1, is left out. Rows that do not number their experts count from 0.
    """
    by_expert: dict[int, list[float]] = {}
    for row, client in enumerate(clients):
        use = usage.get(client, {}).get(module)
        values = (use.weight if measure == "weight" else use.share) if use else ()
        for expert, value in zip((use.expert if use else ()) or count(), values, strict=False):
            if expert >= 0:
                by_expert.setdefault(expert, [math.nan] * len(clients))[row] = value
    return dict(sorted(by_expert.items()))
