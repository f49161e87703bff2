"""Every client's model on every client's rows, as a heat map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from coterie.report.plots.heat import BLUES, NAMED_ROWS, colour_bar, cut, heat_map, limits_of, name_rows, write_cells
from coterie.report.plots.style import INK, MUTED, Cells, styled

_CELL = 0.42  # inches
_WRITTEN = 20  # columns up to which every cell shows its number


@styled
def cross_map(clients: Sequence[str], table: Cells, texts: Sequence[Sequence[str]], *, label: str) -> Figure:
    """``table`` [model, rows of]: a client's model per row, the client whose test rows it answers per column.

    ``texts`` are the cells as readers see them. A cell that is not a number stands for other labels.
    """
    many = len(clients) > NAMED_ROWS
    side = 6.0 if many else max(1.6, _CELL * len(clients))
    figure = Figure(figsize=(side + 2.4, side + 1.9), layout="constrained")
    ax = figure.subplots()
    limits = limits_of(table)
    image = heat_map(ax, table, limits, BLUES)
    name_rows(ax, clients)
    ax.set_title("whose model (rows), on whose test rows (columns)", fontsize=8, color=MUTED, fontweight="normal")
    if not many:
        names = [cut(client, 22) for client in clients]
        ax.set_xticks(np.arange(len(clients)) + 0.5, names, rotation=45, ha="right", color=INK, fontsize=8)
    if len(clients) <= _WRITTEN:
        write_cells(ax, table, texts, sum(limits) / 2)
    colour_bar(ax, image, label, 0.2 if many else 1.1)
    return figure
