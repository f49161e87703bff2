"""Pictures of an assignment, where every module has its own experts: which client holds, uses and shares which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from coterie.report.plots.heat import (
    BLUES,
    EMPTY,
    NAMED_ROWS,
    SPARSE,
    bare,
    blocks,
    colour_bar,
    cut,
    grid_map,
    heat_map,
    limits_of,
    name_rows,
    part_groups,
    write_cells,
)
from coterie.report.plots.style import INK, MUTED, Cells, styled

Groups = Sequence[str | None]
Name = tuple[str, str]  # of a panel: module, measure
Size = tuple[float, float]  # inches wide and high
_WIDTH = 10.6  # inches that the page has room for
_POINT = 1 / 72  # inches
_PAST = LinearSegmentedColormap.from_list("past", ["#c3cad1", "#c3cad1"]).with_extremes(bad=EMPTY)
_CLEAR = SPARSE.with_extremes(bad=(0, 0, 0, 0))
_MARKS = LinearSegmentedColormap.from_list("marks", [BLUES(0.3), BLUES(0.65), BLUES(1.0)])


@dataclass(frozen=True)
class Panel:
    """One module: the numbers of its ``experts``, and a value for each, [clients, experts], NaN where there is none.

    ``past`` marks the cells that had a value once.
    """

    experts: Sequence[int]
    values: Cells
    past: Cells | None = None


@styled
def assigned_experts(panels: Mapping[str, Panel], clients: Sequence[str], groups: Groups) -> Figure:
    """Clients x experts, a panel per module; the values are the numbers of rounds a client has held an expert.

    What is held is blue, with its number where that fits; what was held in the past and is lost is grey.
    """
    limits = (0.0, max(float(np.nanmax(panel.values, initial=1.0)) for panel in panels.values()))

    def draw(ax: Axes, name: Name, cell: Size) -> ScalarMappable:
        return _draw(ax, panels[name[0]], cell, limits, lambda value: f"{value:.0f}")

    named = {(module, ""): panel for module, panel in panels.items()}
    figure, drawn = _grid([[*named]], named, clients, groups, draw)
    ax, image = next(iter(drawn.values()))
    bar = colour_bar(ax, image, "rounds held so far", _room_below(ax))
    bar.ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


@styled
def used_experts(usage: Mapping[str, Mapping[str, Panel]], clients: Sequence[str], groups: Groups) -> Figure:
    """Clients x experts for each measure and module: ``usage[measure][module]``, empty where none is held."""
    panels = {(module, measure): panel for measure, row in usage.items() for module, panel in row.items()}
    limits = {measure: max(float(np.nanmax(panel.values, initial=0.0)) for panel in row.values()) or 1.0
              for measure, row in usage.items()}  # fmt: skip
    rows = [[(module, measure) for module in row] for measure, row in usage.items()]
    if len(rows[0]) < len(rows) or (_widest(panels) > 12 and len(clients) <= 16):  # wide cells, so that numbers fit
        rows = [list(row) for row in zip(*rows, strict=True)]

    def draw(ax: Axes, name: Name, cell: Size) -> ScalarMappable:
        return _draw(ax, panels[name], cell, (0.0, limits[name[1]]), _fraction)

    figure, drawn = _grid(rows, panels, clients, groups, draw)
    for measure, place in zip(usage, rows[-1], strict=False):
        image = next(image for (_, shown), (_, image) in drawn.items() if shown == measure)
        colour_bar(drawn[place][0], image, measure, _room_below(drawn[place][0]))
    return figure


@styled
def held_experts(counts: NDArray[np.int_], modules: Sequence[str], clients: Sequence[str], groups: Groups) -> Figure:
    """Clients x modules: how many experts a client holds [clients, modules], and the range over modules."""
    n, high = len(clients), _row_height(len(clients))
    left, right = _margins(clients, groups)
    ranges = n <= NAMED_ROWS
    room = _WIDTH - left - right - 0.55 * ranges
    wide = min(max(1.5 / len(modules), 0.3), room / len(modules))
    labels = 0.14 + 4.5 * _POINT * max(map(len, modules))
    size = (max(4.4, left + right + 0.55 * ranges + wide * len(modules)), n * high + labels + 0.85)
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    image = grid_map(ax, counts.astype(float), limits_of(counts.astype(float)), BLUES)
    name_rows(ax, clients)
    step = math.ceil(9 * _POINT / wide)
    named = range(0, len(modules), step)
    ax.set_xticks([m + 0.5 for m in named], [modules[m] for m in named], rotation=90, fontsize=7.5)
    if wide >= (4.4 * len(str(counts.max())) + 2) * _POINT and high >= 9 * _POINT:
        low, top = limits_of(counts.astype(float))
        write_cells(ax, counts.astype(float), counts.astype(str).tolist(), low + 0.55 * (top - low))
    if ranges:
        for row, held in enumerate(counts):
            _beside(ax, row + 0.5, f"{held.min()} to {held.max()}")
    part_groups(ax, groups, high, named=True, shift=46 if ranges else 6)
    label = f"experts held: {counts.min()} to {counts.max()}, mean {counts.mean():.1f}"
    if counts.min() < counts.max():
        bar = colour_bar(ax, image, label, labels)
        bar.ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
        ax.set_xlabel(label, fontsize=8, loc="left")
    return figure


@styled
def held_together(shares: Cells, clients: Sequence[str], groups: Groups) -> Figure:
    """Clients x clients: the share of the experts of two clients that both hold, with a frame around each group."""
    n, (left, right) = len(clients), _margins(clients, groups)
    side = max(min(0.3 * n, 3.6), min(0.2 * n, 6.2))
    figure = Figure(figsize=(left + max(side + right, 2.9), side + 0.85), layout="constrained")
    ax = figure.subplots()
    table = shares.copy()
    np.fill_diagonal(table, np.nan)  # one by definition; it would take the range of colours for itself
    limits = (0.0, float(np.nanmax(table, initial=0.0)) or 1.0)
    image = heat_map(ax, table, limits, BLUES)
    ax.set_aspect("equal")
    name_rows(ax, clients)
    if n <= 12:
        write_cells(ax, table, [[f"{100 * v:.0f}" for v in row] for row in table], 0.55 * limits[1])
    for group, start, size in blocks(groups):
        ax.add_patch(Rectangle((start, start), size, size, fill=False, edgecolor=INK, linewidth=1.8, clip_on=False))
        if size * side / n >= 8 * _POINT:
            _beside(ax, start + size / 2, cut(group or "no group", 18), INK, 8.5)
    bar = colour_bar(ax, image, "experts that both hold, of those that either holds", 0.2)
    bar.ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if limits[1] >= 0.05 else 1))
    return figure


def _grid(
    names: Sequence[Sequence[Name]],
    panels: Mapping[Name, Panel],
    clients: Sequence[str],
    groups: Groups,
    draw: Callable[[Axes, Name, Size], ScalarMappable],
) -> tuple[Figure, dict[Name, tuple[Axes, ScalarMappable]]]:
    """The panels in rows and columns, labelled, drawn by ``draw`` with the inches of a cell: axes and image by name."""
    columns, high = len(names[0]), _row_height(len(clients))
    left, right = _margins(clients, groups)
    wide = min(max(0.28 * _widest(panels), 1.9), (_WIDTH - left - right - 0.2 * (columns - 1)) / columns)
    size = (left + right + columns * (wide + 0.2) - 0.2, len(names) * (len(clients) * high + 0.6) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    drawn = {}
    for row, line in zip(names, figure.subplots(len(names), columns, squeeze=False), strict=True):
        for name, ax in zip(row, line, strict=True):
            cell = (wide / panels[name].values.shape[1], high)
            drawn[name] = (ax, draw(ax, name, cell))
            ax.set_title(_title(name, int(wide / 0.078)), fontsize=9)
            _name_experts(ax, panels[name].experts, cell[0], name in names[-1])
            part_groups(ax, groups, high, named=name == row[-1])
            if name == row[0]:
                name_rows(ax, clients)
            else:
                ax.set_yticks([])
    return figure, drawn


def _draw(
    ax: Axes, panel: Panel, cell: Size, limits: tuple[float, float], text: Callable[[float], str]
) -> ScalarMappable:
    """The values as cells, or as marks if cells would be too small to see and most are empty."""
    held = np.isfinite(panel.values)
    past = None if panel.past is None else np.where(panel.past & ~held, 1.0, np.nan)
    if min(cell) < 2.2 * _POINT and held.mean() < 0.3:
        ax.set_facecolor(EMPTY)
        if past is not None:
            _draw_marks(ax, past, cell, (0.0, 1.0), _PAST, 1.0)
        return _draw_marks(ax, panel.values, cell, limits, _MARKS, 1.7)
    if past is not None:
        grid_map(ax, past, (0.0, 1.0), _PAST)
    image = grid_map(ax, panel.values, limits, SPARSE if panel.past is None else _CLEAR)
    texts = [[text(value) if np.isfinite(value) else "" for value in row] for row in panel.values]
    longest = max((4.4 * len(word) - 2.2 * word.count(".") for line in texts for word in line), default=0.0)
    if cell[0] >= (longest + 2) * _POINT and cell[1] >= 9 * _POINT:
        write_cells(ax, panel.values, texts, 0.45 * limits[1])
    return image


def _draw_marks(
    ax: Axes, values: Cells, cell: Size, limits: tuple[float, float], colours: Colormap, least: float
) -> ScalarMappable:
    """A mark for each value, no less than ``least`` points wide and high."""
    wide, high = (max(inches / _POINT, least) for inches in cell)
    mark = Path([(-wide, -high), (wide, -high), (wide, high), (-wide, high), (-wide, -high)])
    rows, columns = np.nonzero(np.isfinite(values))
    bare(ax, *values.shape)
    return ax.scatter(columns + 0.5, rows + 0.5, c=values[rows, columns], s=max(wide, high) ** 2, marker=mark,
                      cmap=colours, norm=Normalize(*limits), linewidths=0, rasterized=True)  # fmt: skip


def _name_experts(ax: Axes, experts: Sequence[int], wide: float, last: bool) -> None:
    """The experts' numbers where they fit, upright if need be; else how many there are."""
    digits, room = len(str(max(experts, default=0))), wide / _POINT
    fits = room >= 8
    if fits:
        places = [column + 0.5 for column in range(len(experts))]
        upright = 0 if room >= 4.6 * digits + 3 else 90
        ax.set_xticks(places, [str(e) for e in experts], fontsize=7, rotation=upright)
    if last:
        ax.set_xlabel("expert" if fits else f"{len(experts)} experts", fontsize=8)


def _room_below(ax: Axes) -> float:
    """Inches that the experts' numbers and their title take."""
    upright = any(label.get_rotation() for label in ax.get_xticklabels())
    longest = max((len(label.get_text()) for label in ax.get_xticklabels()), default=0)
    return 0.27 + ((0.06 * longest + 0.06) if upright else 0.14 if longest else 0.0)


def _title(name: Name, most: int) -> str:
    """The measure in full, and as much of the module's name as there is room for."""
    measure = f": {name[1]}" if name[1] else ""
    return cut(name[0], max(most - len(measure), 4)) + measure


def _widest(panels: Mapping[Name, Panel]) -> int:
    return max(len(panel.experts) for panel in panels.values())


def _row_height(rows: int) -> float:
    """Inches."""
    return 0.2 if rows <= 12 else 0.165 if rows <= NAMED_ROWS else 3.6 / rows


def _margins(clients: Sequence[str], groups: Groups) -> tuple[float, float]:
    """Inches beside the cells: for the names of rows, and of groups."""
    left = 0.3 + 0.062 * max(len(cut(c, 22)) for c in clients) if len(clients) <= NAMED_ROWS else 0.5
    right = 0.3 + 0.062 * max((len(cut(group or "no group", 18)) for group, _, _ in blocks(groups)), default=-2)
    return left, right


def _fraction(value: float) -> str:
    return f"{value:.2f}"[1:] if value < 0.995 else f"{value:.1f}"


def _beside(ax: Axes, row: float, text: str, colour: str = MUTED, size: float = 7.5) -> None:
    ax.annotate(text, (1, row), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
                va="center", fontsize=size, color=colour)  # fmt: skip
