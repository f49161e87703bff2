"""Experts that all modules share: which client uses which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from coterie.report.plots.heat import BLUES, NAMED_ROWS, heat_map, limits_of, name_rows, write_cells
from coterie.report.plots.style import ON_PALE, ON_STRONG, PALETTE, Cells, natural, number, styled
from coterie.requests import ExpertUse


@styled
def expert_usage(usage: Mapping[str, ExpertUse], own: Mapping[str, int] | None = None) -> Figure:
    """Clients x experts: the mean gate weight, and the share of the tokens that use the expert at all.

    ``usage`` is by client; ``own`` names the expert to frame in each row.
    """
    clients = sorted(usage, key=lambda c: ((own or {}).get(c, -1), natural(c)))
    panels = [(key, title) for key, title in _USAGE.items() if any(getattr(usage[c], key) for c in clients)]
    widest = max((len(usage[c].weight) for c in clients), default=1)
    width = 1.4 + len(panels) * max(1.6, 0.42 * widest)
    figure = Figure(figsize=(min(max(width, 4.2), 8.0), min(1.2 + 0.23 * len(clients), 8.0)), layout="constrained")
    axes = figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
    for ax, (key, title) in zip(axes, panels, strict=False):
        table = np.full((len(clients), widest), np.nan)
        for row, client in enumerate(clients):
            values = getattr(usage[client], key)
            table[row, : len(values)] = values
        _usage_panel(ax, table, clients, own or {})
        ax.set_title(title)
    return figure


@styled
def experts_by_layer(active: Mapping[str, Mapping[str, float]]) -> Figure:
    """Clients x layers: ``active`` [client][layer] is the mean number of experts that a token uses there."""
    clients = list(active)
    layers = sorted({layer for of in active.values() for layer in of}, key=natural)
    table = np.array([[number(active[client].get(layer)) for layer in layers] for client in clients])
    width = min(1.6 + 0.42 * len(layers), 8.0)
    figure = Figure(figsize=(max(width, 3.6), min(1.2 + 0.23 * len(clients), 8.0)), layout="constrained")
    ax = figure.subplots()
    low, high = limits_of(table)
    heat_map(ax, table, (low, high), BLUES)
    if len(clients) <= NAMED_ROWS and len(layers) <= 24:
        texts = [[f"{value:.1f}" if math.isfinite(value) else "" for value in row] for row in table]
        write_cells(ax, table, texts, (low + high) / 2)
    name_rows(ax, clients)
    named = range(0, len(layers), math.ceil(len(layers) / 16))
    ax.set_xticks([i + 0.5 for i in named], [layers[i] for i in named])
    ax.set_xlabel("layer")
    return figure


_USAGE = {"weight": "mean gate weight", "share": "share of tokens"}


def _usage_panel(ax: Axes, table: Cells, clients: Sequence[str], own: Mapping[str, int]) -> None:
    rows, columns = table.shape
    heat_map(ax, table, (0.0, 1.0), BLUES)
    name_rows(ax, clients)
    named = range(0, columns, math.ceil(columns / 16))
    ax.set_xticks([e + 0.5 for e in named], [str(e) for e in named])
    ax.set_xlabel("expert")
    for row, client in enumerate(clients):
        if 0 <= own.get(client, -1) < columns:
            cell = Rectangle((own[client], row), 1, 1, fill=False, edgecolor=PALETTE[1], linewidth=1.6, clip_on=False)
            ax.add_patch(cell)
    if rows <= NAMED_ROWS and columns <= 8:
        for (row, column), value in np.ndenumerate(table):
            if math.isfinite(value):
                colour = ON_STRONG if value > 0.55 else ON_PALE
                ax.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
