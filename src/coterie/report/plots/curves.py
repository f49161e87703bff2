"""Lines by round, named at their ends where they are few."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from coterie.report.plots.style import MUTED, PALETTE, number, styled

Dash = Literal["-", "--", ":"] | tuple[float, tuple[float, ...]]
_DASHES: tuple[Dash, ...] = ("-", "--", ":")
End = tuple[float, float, str, Dash]  # of a curve: where it ends, value, colour, dashes
Curve = Sequence[tuple[int, float]]
_DIRECT_LABELS = 6  # curves up to which each is labelled at its end


@styled
def lines_by_round(
    curves: Mapping[str, Curve],
    faint: Mapping[str, Curve] | None = None,
    *,
    label: str = "accuracy",
    percent: bool = True,
    mark: int | None = None,
    level: tuple[str, float] | None = None,
) -> Figure:
    """One line per method or client: ``{name: [(round, value), ...]}``; ``faint`` ones are context without a name.

    ``mark`` is a round to point at: the one that validation chose. ``level`` is a named value to compare with: a
    dashed line.
    """
    figure = Figure(figsize=(4.7, 2.9), layout="constrained")
    draw_curves(figure.subplots(), curves, faint or {}, label, percent, mark, level)
    return figure


def draw_curves(
    ax: Axes,
    curves: Mapping[str, Curve],
    faint: Mapping[str, Curve],
    label: str,
    percent: bool,
    mark: int | None,
    level: tuple[str, float] | None = None,
) -> None:
    """:func:`lines_by_round` on ``ax``."""
    for curve in faint.values():
        rounds, values = _finite(curve)
        ax.plot(rounds, values, color=MUTED, alpha=0.35, linewidth=0.9, zorder=1)
    ends: dict[str, End] = {}
    for (name, curve), (colour, dash) in zip(curves.items(), looks(), strict=False):
        rounds, values = _finite(curve)
        ax.plot(rounds, values, color=colour, linestyle=dash, linewidth=2.0, marker="o", markersize=3.5, zorder=3)
        if values:
            ends[name] = (rounds[-1], values[-1], colour, dash)
    if level is not None:
        seen = [rnd for curve in curves.values() for rnd, _ in curve]
        span, dashes = (min(seen, default=0), max(seen, default=1)), (0, (4, 3))
        ax.plot(span, [level[1]] * 2, color=MUTED, linewidth=1.4, linestyle=dashes, zorder=2)
        ends[level[0]] = (span[1], level[1], MUTED, dashes)
    ax.set_xlabel("round")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    frame(ax, label, percent)
    if mark is not None:
        ax.axvline(mark, color=MUTED, linewidth=1.0, linestyle=(0, (2, 3)), zorder=0)
        ax.annotate(f"best: {mark}", (mark, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2),
                    textcoords="offset points", ha="center", fontsize=8, color=MUTED)  # fmt: skip
    name_curves(ax, ends)


def looks() -> Iterator[tuple[str, Dash]]:
    """Colours and dashes that tell curves apart, without end."""
    return cycle([(colour, dash) for dash in _DASHES for colour in PALETTE])


def frame(ax: Axes, label: str, percent: bool) -> None:
    """What the axes of curves have: a name, a grid, per cent where the values are shares."""
    ax.set_ylabel(label)
    if percent:
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))  # no half per cent
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.05 else 1))
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    ax.spines["left"].set_visible(False)
    ax.tick_params(length=0)


def name_curves(ax: Axes, ends: Mapping[str, End]) -> None:
    """Name the curves: at their ends, or in a legend where they are many."""
    if len(ends) > _DIRECT_LABELS:
        handles = [Line2D([], [], color=c, linestyle=d, linewidth=2, label=name) for name, (_, _, c, d) in ends.items()]
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, fontsize=8)
        return
    low, high = ax.get_ylim()
    last = max((x for x, _, _, _ in ends.values()), default=0)
    places = _spread([y for _, y, _, _ in ends.values()], 0.07 * (high - low))
    for name, place in zip(ends, places, strict=True):
        ax.annotate(name, (last, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8.5,
                    annotation_clip=False)  # fmt: skip


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """``values`` in the same order, moved as little as possible so that any two are at least ``gap`` apart."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    blocks: list[tuple[float, list[int]]] = []  # (middle, members): labels that touch are moved together
    for i in order:
        blocks.append((values[i], [i]))
        while len(blocks) > 1 and _touch(blocks[-2], blocks[-1], gap):
            (_, left), (_, right) = blocks[-2:]
            members = left + right
            blocks[-2:] = [(sum(values[m] for m in members) / len(members), members)]
    places = [0.0] * len(values)
    for middle, members in blocks:
        for rank, i in enumerate(members):
            places[i] = middle + (rank - (len(members) - 1) / 2) * gap
    return places


def _touch(lower: tuple[float, list[int]], upper: tuple[float, list[int]], gap: float) -> bool:
    return upper[0] - lower[0] < gap * (len(lower[1]) + len(upper[1])) / 2


def _finite(curve: Curve) -> tuple[list[int], list[float]]:
    points = sorted((rnd, number(value)) for rnd, value in curve)
    kept = [(rnd, value) for rnd, value in points if math.isfinite(value)]
    return [rnd for rnd, _ in kept], [value for _, value in kept]
