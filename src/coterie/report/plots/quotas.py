"""Where a budget of active experts goes: quotas by layer and matrix, and which adapters of a pool clients use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from coterie.report.plots.heat import BLUES, SPARSE, heat_map, limits_of, name_rows, write_cells
from coterie.report.plots.style import natural, number, styled


@styled
def quota_map(quotas: Mapping[tuple[str, str], int], sizes: Mapping[tuple[str, str], int]) -> Figure:
    """Layers x matrices: the quota of active experts out of the matrix's experts; keys are (layer, matrix)."""
    layers = sorted({layer for layer, _ in quotas}, key=natural)
    matrices = list(dict.fromkeys(matrix for _, matrix in quotas))
    table = np.array([[number(quotas.get((layer, matrix))) for matrix in matrices] for layer in layers])
    texts = [[f"{quotas.get((layer, m), 0)}/{sizes.get((layer, m), 0)}" for m in matrices] for layer in layers]
    figure = Figure(
        figsize=(min(1.2 + 0.75 * len(matrices), 8.0), min(1.0 + 0.26 * len(layers), 8.0)), layout="constrained"
    )
    ax = figure.subplots()
    low, high = limits_of(table)
    heat_map(ax, table, (low, high), SPARSE)
    if len(layers) <= 40:
        write_cells(ax, table, texts, (low + high) / 2)
    name_rows(ax, [f"layer {layer}" if layer.isdecimal() else layer for layer in layers])
    ax.set_xticks(np.arange(len(matrices)) + 0.5, matrices, rotation=30, ha="right", fontsize=8)
    return figure


@styled
def adapter_use(use: Mapping[str, Mapping[str, float]], adapters: Sequence[str]) -> Figure:
    """Clients x adapters: each adapter's share of a client's gate weight, over all matrices."""
    clients = list(use)
    table = np.array([[number(use[client].get(name)) for name in adapters] for client in clients])
    figure = Figure(
        figsize=(min(1.6 + 0.62 * len(adapters), 8.0), min(1.2 + 0.24 * len(clients), 8.0)), layout="constrained"
    )
    ax = figure.subplots()
    heat_map(ax, table, (0.0, max(limits_of(table)[1], 1e-9)), BLUES)
    if len(clients) <= 40:
        texts = [[f"{value:.0%}" if np.isfinite(value) else "" for value in row] for row in table]
        write_cells(ax, table, texts, 0.55 * limits_of(table)[1])
    name_rows(ax, clients)
    ax.set_xticks(np.arange(len(adapters)) + 0.5, list(adapters), rotation=30, ha="right", fontsize=8)
    return figure
