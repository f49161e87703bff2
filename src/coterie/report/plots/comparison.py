"""Several methods side by side: by round, by bytes, and by client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from coterie.report.plots.curves import End, frame, looks, name_curves
from coterie.report.plots.heat import NAMED_ROWS, bare, name_rows
from coterie.report.plots.style import LINE, MUTED, PALETTE, natural, styled
from coterie.units import size

Band = Sequence[tuple[int, float, float, float]]  # round, mean, lowest, highest
_SIZE = (6.6, 3.6)
_CLEAR = 6  # bands up to which each can be told from the others
_BIGGEST = 130.0  # area of a mark, points squared
_LEVEL = 1e-9  # differences below it are none: means of the same values differ in their last bits


@styled
def bands_by_round(bands: Mapping[str, Band], *, label: str, percent: bool) -> Figure:
    """A line per method, the mean over seeds, and behind it a band from the lowest seed to the highest."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    ax = figure.subplots()
    ends: dict[str, End] = {}
    for (name, band), (colour, dash) in zip(bands.items(), looks(), strict=False):
        if not band:
            continue
        rounds, mean, low, high = (list(of) for of in zip(*sorted(band), strict=True))
        ax.fill_between(rounds, low, high, color=colour, alpha=0.15 if len(bands) <= _CLEAR else 0.05, linewidth=0)
        ax.plot(rounds, mean, color=colour, linestyle=dash, linewidth=1.8, marker="o", markersize=3)
        ends[name] = (rounds[-1], mean[-1], colour, dash)
    ax.set_xlabel("round")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    frame(ax, label, percent)
    name_curves(ax, ends)
    return figure


@styled
def against_bytes(curves: Mapping[str, Sequence[tuple[float, float]]], *, label: str, percent: bool) -> Figure:
    """A line per method: ``{name: [(bytes, value), ...]}``. Points without bytes are left out."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    ax = figure.subplots()
    ends: dict[str, End] = {}
    for (name, curve), (colour, dash) in zip(curves.items(), looks(), strict=False):
        points = [(sent, value) for sent, value in sorted(curve) if sent > 0]
        if not points:
            continue
        sent, values = zip(*points, strict=True)
        ax.plot(sent, values, color=colour, linestyle=dash, linewidth=1.8, marker="o", markersize=3)
        ends[name] = (sent[-1], values[-1], colour, dash)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(LogLocator(base=4, numticks=8))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("sent and received by all clients")
    frame(ax, label, percent)
    _legend(figure, ends)
    return figure


@styled
def gains(gains: Mapping[str, Sequence[float]], *, label: str, percent: bool) -> Figure:
    """The share of clients (y) whose gain is at most x: a step line per method."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    ax = figure.subplots()
    ends: dict[str, End] = {}
    for (name, of), (colour, dash) in zip(gains.items(), looks(), strict=False):
        values = np.sort(np.asarray(of, dtype=np.float64))
        if not values.size:
            continue
        heights = np.arange(values.size + 1) / values.size
        ax.step([values[0], *values], heights, where="post", color=colour, linestyle=dash, linewidth=1.8)
        ends[name] = (float(values[-1]), 1.0, colour, dash)
    ax.axvline(0, color=MUTED, linewidth=1.0, linestyle=(0, (2, 3)), zorder=0)
    frame(ax, "share of the clients", percent=True)
    ax.set_xlabel(label)
    if percent:
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(figure, ends)
    return figure


@styled
def wins_and_losses(differences: Mapping[str, Mapping[str, float]], *, percent: bool) -> Figure:
    """Clients x methods: a mark for each difference (positive is better), larger for larger ones."""
    clients = sorted({client for by_client in differences.values() for client in by_client}, key=natural)
    largest = max((abs(d) for by_client in differences.values() for d in by_client.values()), default=0.0)
    width, height = 1.9 + 0.5 * len(differences), 1.5 + 0.24 * min(len(clients), NAMED_ROWS)
    figure = Figure(figsize=(max(4.6, min(width, 11.0)), min(height, 11.0)), layout="constrained")
    ax = figure.subplots()
    bare(ax, len(clients), len(differences))
    ax.hlines(np.arange(1, len(clients)), 0, len(differences), color=LINE, linewidth=0.6)
    for column, by_client in enumerate(differences.values()):
        for client, difference in by_client.items():
            marker, colour = _mark(difference)
            area = 8 + _BIGGEST * abs(difference) / largest if largest else 8
            ax.scatter(column + 0.5, clients.index(client) + 0.5, s=area, marker=marker, color=colour, linewidth=0)
    name_rows(ax, clients)
    ax.set_xticks(np.arange(len(differences)) + 0.5, list(differences), rotation=30, ha="right", fontsize=8)
    largest_text = f"{100 * largest:.1f} points" if percent else f"{largest:.3g}"
    marks = (("^", PALETTE[0], f"better, at most {largest_text}"), ("v", PALETTE[1], "worse"), (".", MUTED, "equal"))
    handles = [Line2D([], [], marker=m, color=c, linestyle="", markersize=8, label=text) for m, c, text in marks]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _mark(difference: float) -> tuple[str, str]:
    if abs(difference) <= _LEVEL:
        return ".", MUTED
    return ("^", PALETTE[0]) if difference > 0 else ("v", PALETTE[1])


def _legend(figure: Figure, ends: Mapping[str, End]) -> None:
    handles = [Line2D([], [], color=c, linestyle=d, linewidth=2, label=name) for name, (_, _, c, d) in ends.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
