"""The pictures of a run, a comparison and the demo. Plain data in, a matplotlib Figure out; no pyplot, no display.

Colours are told apart by readers with any colour vision, and never carry a meaning alone: lines are labelled, cells
that fit hold their number. ``svg`` gives a picture that follows the light or dark colours of the page it stands on.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import cycle, groupby
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import offset_copy

P = ParamSpec("P")
R = TypeVar("R")
Curve = Sequence[tuple[int, float]]

# Okabe and Ito's colours without yellow and black, which vanish on a light or a dark page.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, MUTED, LINE, SURFACE = "#1f2328", "#656d77", "#d0d7de", "#fffffe"
_GAP, _ON_PALE, _ON_STRONG = "#fefeff", "#0b2239", "#fdfeff"  # between cells; the numbers in them
_PAGE_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    SURFACE: "var(--surface)",
    _GAP: "var(--gap)",
    _ON_PALE: "var(--on-pale)",
    _ON_STRONG: "var(--on-strong)",
}
_SHADES = ["#e4edf5", "#9cc3de", "#4a90bf", "#1c5f95", "#0b3560"]
_BLUES = LinearSegmentedColormap.from_list("coterie", _SHADES).with_extremes(bad=("#8b949e", 0.25))
_NEAR = _BLUES.reversed()  # what is near stands out
_CELLS_WITH_GAPS = 40  # rows up to which cells stand apart and every client is named
_DIRECT_LABELS = 6  # curves up to which each is labelled at its end
_STYLE: Any = {
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": SURFACE,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "text.parse_math": False,  # a client may be called "$a$"
    "svg.fonttype": "none",
    "svg.hashsalt": "coterie",
}


def _styled(draw: Callable[P, R]) -> Callable[P, R]:
    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return inside


@_styled
def client_distances(
    order: Sequence[str],
    distances: Sequence[Sequence[float]],
    clusters: Mapping[str, int],
    groups: Mapping[str, str | None] | None = None,
) -> Figure:
    """A heat map of the distances between clients [n, n], rows in ``order``, sorted and outlined by cluster.

    ``groups`` (the domain that a simulation knows) colours a strip at the side, to compare with the clusters.
    """
    side = 2.4 + 0.2 * min(len(order), _CELLS_WITH_GAPS)
    figure = Figure(figsize=(max(4.6, min(side + 1.0, 7.6)), max(3.6, min(side, 7.6))), layout="constrained")
    _distances(figure.subplots(), order, distances, clusters, groups or {})
    return figure


@_styled
def accuracy_by_round(
    curves: Mapping[str, Curve],
    faint: Mapping[str, Curve] | None = None,
    *,
    label: str = "accuracy",
    percent: bool = True,
    mark: int | None = None,
) -> Figure:
    """One line per method or client: ``{name: [(round, value), ...]}``; ``faint`` ones are context without a name.

    ``mark`` is a round to point at: the one that validation chose.
    """
    figure = Figure(figsize=(4.7, 2.9), layout="constrained")
    _curves(figure.subplots(), curves, faint or {}, label, percent, mark)
    return figure


@_styled
def expert_usage(usage: Mapping[str, Mapping[str, Sequence[float]]], own: Mapping[str, int] | None = None) -> Figure:
    """Clients x experts: the mean gate weight, and the share of the tokens that use the expert at all.

    ``usage`` is ``{client: {"weight": [...], "share": [...]}}``; ``own`` names the expert to outline in each row.
    """
    clients = sorted(usage, key=lambda c: ((own or {}).get(c, -1), natural(c)))
    panels = [(key, title) for key, title in _USAGE.items() if any(usage[c].get(key) for c in clients)]
    widest = max((len(usage[c].get(key, ())) for c in clients for key, _ in panels), default=1)
    width = 1.4 + len(panels) * max(1.6, 0.42 * widest)
    figure = Figure(figsize=(min(max(width, 4.2), 8.0), min(1.2 + 0.23 * len(clients), 8.0)), layout="constrained")
    axes = figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
    for ax, (key, title) in zip(axes, panels, strict=False):
        table = np.full((len(clients), widest), np.nan)
        for row, client in enumerate(clients):
            values = usage[client].get(key, ())
            table[row, : len(values)] = [_number(v) for v in values]
        _usage_panel(ax, table, clients, own or {})
        ax.set_title(title)
    return figure


_USAGE = {"weight": "mean gate weight", "share": "share of tokens"}


@_styled
def silhouettes(scores: Mapping[str, float] | Mapping[int, float], chosen: int | None = None) -> Figure:
    """The silhouette of each number of clusters; the chosen one stands out."""
    found = sorted((int(k), _number(v)) for k, v in scores.items())
    ks, values = [k for k, _ in found], [v for _, v in found]
    figure = Figure(figsize=(min(2.2 + 0.45 * len(ks), 6.4), 2.5), layout="constrained")
    ax = figure.subplots()
    drawn = [0.0 if math.isnan(v) else v for v in values]
    bars = ax.bar(ks, drawn, width=0.62, color=[PALETTE[0] if k == chosen else LINE for k in ks])
    ax.bar_label(bars, labels=["-" if math.isnan(v) else f"{v:.2f}" for v in values], padding=2, fontsize=8)
    ax.axhline(0, color=MUTED, linewidth=0.8)
    ax.set_xticks(ks)
    ax.set_xlabel("number of clusters")
    ax.set_ylabel("silhouette")
    ax.margins(y=0.15)
    ax.spines["left"].set_visible(False)
    ax.set_yticks([])
    ax.tick_params(length=0)
    return figure


@_styled
def demo_picture(
    path: Path,
    order: Sequence[str],
    distances: Sequence[Sequence[float]],
    clusters: Mapping[str, int],
    groups: Mapping[str, str | None] | None,
    curves: Mapping[str, Curve],
) -> None:
    """One PNG with two panels: the distances with their clusters, and the mean accuracy by round per method."""
    figure = Figure(figsize=(11.0, 4.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.05))
    _distances(left, order, distances, clusters, groups or {})
    left.set_title("Distances between clients, and the clusters found", pad=30)
    _curves(right, curves, {}, "mean accuracy of the clients", True, None)
    right.set_title("Accuracy by round", pad=30)
    png(figure, path)


def png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, with nothing in it that changes from day to day."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})


@_styled
def svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element for a page that sets --ink, --muted, --line and --surface.

    ``name`` is what the picture shows, for readers who do not see it; ids inside the page are made unique with it.
    """
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that our font has not: the page's font will draw it
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    own = re.sub(r"\W+", "-", name.lower()).strip("-")
    text = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=xlink:href="#)', f"{own}-", text)
    text = re.sub(r"font(-family)?: [^;\"]*'[^;\"]*", _page_font, text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)  # it would rule the page
    narrowest = f'style="min-width: {0.95 * 72 * figure.get_figwidth():.0f}px"'  # below that the text is too small
    for colour, variable in _PAGE_COLOURS.items():
        text = text.replace(colour, variable)
    return text.replace(
        "<svg ", f'<svg role="img" aria-label="{own.replace("-", " ")}" stroke-linejoin="round" {narrowest} ', 1
    )


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key that puts ``client-2`` before ``client-10``."""
    parts = re.findall(r"\d+|\D+", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _page_font(found: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", found[0])
    weight = "font-weight: bold; " if "bold" in found[0] or " 700 " in found[0] else ""
    return f"{weight}font-size: {size[0]}; font-family: inherit" if size else "font-family: inherit"


def _distances(
    ax: Axes,
    order: Sequence[str],
    distances: Sequence[Sequence[float]],
    clusters: Mapping[str, int],
    groups: Mapping[str, str | None],
) -> None:
    rows = sorted(range(len(order)), key=lambda i: (clusters.get(order[i], -1), groups.get(order[i]) or "", i))
    clients = [order[i] for i in rows]
    table = np.array([[_number(v) for v in row] for row in distances], dtype=float)[np.ix_(rows, rows)]
    np.fill_diagonal(table, np.nan)  # zero by definition; it would take the range of colours for itself
    image = _heat_map(ax, table, _limits(table), _NEAR)
    ax.set_aspect("equal")
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((0.0, -0.075, 1.0, 0.03)), orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.set_label("distance: near to far", fontsize=8)
    _name_rows(ax, clients)
    _group_strip(ax, [groups.get(client) for client in clients])
    start = 0
    for cluster, members in groupby(clients, key=lambda client: clusters.get(client)):
        size = len(list(members))
        ax.add_patch(Rectangle((start, start), size, size, fill=False, edgecolor=INK, linewidth=1.8, clip_on=False))
        text = "no cluster" if cluster is None else f"cluster {cluster}"
        ax.text(len(clients) * 1.025, start + size / 2, text, va="center", fontsize=8.5)
        start += size


def _heat_map(ax: Axes, table: np.ndarray[Any, Any], limits: tuple[float, float], colours: Colormap) -> Any:
    """Cells [rows, columns], the first row on top, cell (i, j) at x from j to j + 1 and y from i to i + 1."""
    rows, columns = table.shape
    norm, masked = Normalize(*limits), np.ma.masked_invalid(table)
    if rows <= _CELLS_WITH_GAPS:
        image: Any = ax.pcolormesh(masked, cmap=colours, norm=norm, edgecolors=_GAP, linewidth=0.8)
    else:
        image = ax.imshow(
            masked, cmap=colours, norm=norm, interpolation="none", extent=(0, columns, rows, 0), aspect="auto"
        )
    ax.set_xlim(0, columns)
    ax.set_ylim(rows, 0)
    ax.set_xticks([])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def _limits(table: np.ndarray[Any, Any]) -> tuple[float, float]:
    finite = table[np.isfinite(table)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _name_rows(ax: Axes, clients: Sequence[str]) -> None:
    if len(clients) > _CELLS_WITH_GAPS:
        ax.set_yticks([])
        ax.set_ylabel(f"{len(clients)} clients", labelpad=14)
        return
    names = [client if len(client) <= 22 else f"{client[:21]}…" for client in clients]
    ax.set_yticks(np.arange(len(clients)) + 0.5, names, color=INK, fontsize=8)


def _group_strip(ax: Axes, groups: Sequence[str | None]) -> None:
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


def _usage_panel(ax: Axes, table: np.ndarray[Any, Any], clients: Sequence[str], own: Mapping[str, int]) -> None:
    rows, columns = table.shape
    _heat_map(ax, table, (0.0, 1.0), _BLUES)
    _name_rows(ax, clients)
    named = range(0, columns, math.ceil(columns / 16))
    ax.set_xticks([e + 0.5 for e in named], [str(e) for e in named])
    ax.set_xlabel("expert")
    for row, client in enumerate(clients):
        if 0 <= own.get(client, -1) < columns:
            cell = Rectangle((own[client], row), 1, 1, fill=False, edgecolor=PALETTE[1], linewidth=1.6, clip_on=False)
            ax.add_patch(cell)
    if rows <= _CELLS_WITH_GAPS and columns <= 8:
        for (row, column), value in np.ndenumerate(table):
            if math.isfinite(value):
                colour = _ON_STRONG if value > 0.55 else _ON_PALE
                ax.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)


def _curves(
    ax: Axes, curves: Mapping[str, Curve], faint: Mapping[str, Curve], label: str, percent: bool, mark: int | None
) -> None:
    for curve in faint.values():
        rounds, values = _finite(curve)
        ax.plot(rounds, values, color=MUTED, alpha=0.35, linewidth=0.9, zorder=1)
    looks = cycle([(colour, dash) for dash in ("-", "--", ":") for colour in PALETTE])
    ends = {}
    for (name, curve), (colour, dash) in zip(curves.items(), looks, strict=False):
        rounds, values = _finite(curve)
        ax.plot(rounds, values, color=colour, linestyle=dash, linewidth=2.0, marker="o", markersize=3.5, zorder=3)
        if values:
            ends[name] = (rounds[-1], values[-1], colour, dash)
    ax.set_xlabel("round")
    ax.set_ylabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    ax.spines["left"].set_visible(False)
    ax.tick_params(length=0)
    if mark is not None:
        ax.axvline(mark, color=MUTED, linewidth=1.0, linestyle=(0, (2, 3)), zorder=0)
        ax.annotate(f"best: {mark}", (mark, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2),
                    textcoords="offset points", ha="center", fontsize=8, color=MUTED)  # fmt: skip
    _name_curves(ax, ends)


def _name_curves(ax: Axes, ends: Mapping[str, tuple[int, float, str, Any]]) -> None:
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
    """``values`` moved as little as keeps every two of them ``gap`` apart, in the same order."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    blocks: list[tuple[float, list[int]]] = []  # (middle, members): labels that touch move as one
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
    points = sorted((rnd, _number(value)) for rnd, value in curve)
    kept = [(rnd, value) for rnd, value in points if math.isfinite(value)]
    return [rnd for rnd, _ in kept], [value for _, value in kept]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
