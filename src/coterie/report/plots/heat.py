"""Heat maps: cells with or without gaps, names of rows, and groups of rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.patches import Patch
from matplotlib.transforms import BboxTransformTo, ScaledTranslation, offset_copy

from coterie.report.plots.style import GAP, INK, ON_PALE, ON_STRONG, PALETTE, SURFACE, Cells, natural

_SHADES = ["#e4edf5", "#9cc3de", "#4a90bf", "#1c5f95", "#0b3560"]
BLUES = LinearSegmentedColormap.from_list("coterie", _SHADES).with_extremes(bad=("#8b949e", 0.25))
EMPTY = ("#8b949e", 0.09)
# For tables most of whose cells are empty: the least value stands out from them.
SPARSE = LinearSegmentedColormap.from_list("sparse", ["#b4d1e6", *_SHADES[2:]]).with_extremes(bad=EMPTY)
NEAR = BLUES.reversed()  # small distances stand out
NAMED_ROWS = 40  # rows up to which cells stand apart and every client is named


def heat_map(ax: Axes, table: Cells, limits: tuple[float, float], colours: Colormap) -> ScalarMappable:
    """Cells [rows, columns], the first row on top, cell (i, j) at x from j to j + 1 and y from i to i + 1."""
    rows, columns = table.shape
    norm, masked = Normalize(*limits), np.ma.masked_invalid(table)
    if rows <= NAMED_ROWS:
        image: ScalarMappable = ax.pcolormesh(masked, cmap=colours, norm=norm, edgecolors=GAP, linewidth=0.8)
    else:
        image = ax.imshow(
            masked, cmap=colours, norm=norm, interpolation="none", extent=(0, columns, rows, 0), aspect="auto"
        )
    bare(ax, rows, columns)
    return image


def grid_map(ax: Axes, table: Cells, limits: tuple[float, float], colours: Colormap) -> ScalarMappable:
    """A heat map with lines between its cells: one image, where :func:`heat_map` has a shape for every cell."""
    rows, columns = table.shape
    image = ax.imshow(np.ma.masked_invalid(table), cmap=colours, norm=Normalize(*limits), interpolation="none",
                      extent=(0, columns, rows, 0), aspect="auto")  # fmt: skip
    bare(ax, rows, columns)
    if rows <= NAMED_ROWS and columns <= 4 * NAMED_ROWS:
        ax.hlines(range(1, rows), 0, columns, color=SURFACE, linewidth=0.8)
        ax.vlines(range(1, columns), 0, rows, color=SURFACE, linewidth=0.8)
    return image


def bare(ax: Axes, rows: int, columns: int) -> None:
    """No ticks, no frame; the first row on top."""
    ax.set_xlim(0, columns)
    ax.set_ylim(rows, 0)
    ax.set_xticks([])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def limits_of(table: Cells) -> tuple[float, float]:
    """The least and the greatest finite number, apart even where they are equal."""
    finite = table[np.isfinite(table)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def name_rows(ax: Axes, clients: Sequence[str]) -> None:
    """Name the rows, or say how many there are where they are too many."""
    if len(clients) > NAMED_ROWS:
        ax.set_yticks([])
        ax.set_ylabel(f"{len(clients)} clients", labelpad=14)
        return
    names = [client if len(client) <= 22 else f"{client[:21]}…" for client in clients]
    ax.set_yticks(np.arange(len(clients)) + 0.5, names, color=INK, fontsize=8)


def group_strip(ax: Axes, groups: Sequence[str | None]) -> None:
    """A coloured square before each row, and what the colours stand for below; nothing for more than six groups."""
    names = sorted({group for group in groups if group is not None}, key=natural)
    if not 1 < len(names) <= len(PALETTE):
        return
    colours = dict(zip(names, PALETTE, strict=False))
    beside = offset_copy(ax.transData, fig=ax.get_figure(root=True), x=-8, units="points")
    for row, group in enumerate(groups):
        if group is not None:
            ax.plot(0, row + 0.5, "s", markersize=6, color=colours[group], transform=beside, clip_on=False)
    ax.tick_params(axis="y", pad=14)
    handles = [Patch(color=colours[name], label=name) for name in names]
    columns = 3 if len(names) != 4 else 4
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, fontsize=8,
              handlelength=0.9, handleheight=0.9, columnspacing=1.2)  # fmt: skip


def cut(text: str, most: int) -> str:
    """``text`` with its end left out if it is longer than ``most``."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def blocks(groups: Sequence[str | None]) -> list[tuple[str | None, int, int]]:
    """``(group, first row, rows)`` of every run of rows of the same group; empty if there is one, or one per row."""
    runs, start = [], 0
    for group, members in groupby(groups):
        size = len(list(members))
        runs.append((group, start, size))
        start += size
    return runs if 1 < len(runs) < len(groups) else []


def part_groups(ax: Axes, groups: Sequence[str | None], height: float, named: bool, shift: float = 6) -> None:
    """A line between groups of rows, and to the right their names, where rows of ``height`` inches leave room."""
    for group, start, size in blocks(groups):
        if start:
            ax.axhline(start, color=INK, linewidth=0.9)
        if named and size * height * 72 >= 8:
            ax.annotate(cut(group or "no group", 18), (1, start + size / 2), xycoords=("axes fraction", "data"),
                        xytext=(shift, 0), textcoords="offset points", va="center", fontsize=8)  # fmt: skip


def write_cells(ax: Axes, table: Cells, texts: Sequence[Sequence[str]], strong: float) -> None:
    """Each finite cell's text, in a colour that stands out from a cell above ``strong``."""
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = ON_STRONG if value > strong else ON_PALE
            text = ax.text(
                column + 0.5, row + 0.5, texts[row][column], ha="center", va="center", fontsize=7, color=colour
            )
            text.set_in_layout(False)  # the text is inside its cell; measuring a thousand texts takes seconds


def colour_bar(ax: Axes, image: ScalarMappable, label: str, below: float) -> Colorbar:
    """A thin bar of colours, ``below`` inches under ``ax``."""
    figure = ax.figure
    inches = figure.dpi_scale_trans + ScaledTranslation(
        0, 0, BboxTransformTo(ax.bbox)
    )  # from the lower left corner of ax
    place = ax.inset_axes((0.0, -below - 0.09, 1.5, 0.09), transform=inches)
    bar = figure.colorbar(image, cax=place, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=2)
    bar.set_label(label, fontsize=8, loc="left")
    return bar
