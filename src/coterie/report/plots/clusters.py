"""Clusters of clients: the distances they come from, how many there are, and the demo that shows both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.cluster import hierarchy

from coterie.methods.findings import Clusters
from coterie.ops.cluster import Linkage, merges
from coterie.report.plots.curves import Curve, draw_curves
from coterie.report.plots.heat import NAMED_ROWS, NEAR, group_strip, heat_map, limits_of, name_rows
from coterie.report.plots.style import INK, LINE, MUTED, PALETTE, png, styled


@styled
def client_distances(clusters: Clusters, groups: Mapping[str, str | None] | None = None) -> Figure:
    """A heat map of the distances between clients, sorted and framed by cluster.

    ``groups`` (the domain that a simulation knows) colours a strip at the side, to compare with the clusters.
    """
    side = 2.4 + 0.2 * min(len(clusters.order), NAMED_ROWS)
    figure = Figure(figsize=(max(4.6, min(side + 1.0, 7.6)), max(3.6, min(side, 7.6))), layout="constrained")
    _distances(figure.subplots(), clusters, groups or {})
    return figure


@styled
def silhouettes(clusters: Clusters) -> Figure:
    """The silhouette of each number of clusters; the chosen one stands out."""
    ranked, chosen = sorted(clusters.silhouettes.items()), clusters.number
    ks, values = [k for k, _ in ranked], [v for _, v in ranked]
    figure = Figure(figsize=(min(2.2 + 0.45 * len(ks), 6.4), 2.5), layout="constrained")
    ax = figure.subplots()
    drawn = [0.0 if math.isnan(v) else v for v in values]
    bars = ax.bar(ks, drawn, width=0.62, color=[PALETTE[0] if k == chosen else LINE for k in ks])
    ax.bar_label(bars, labels=["-" if math.isnan(v) else f"{v:.3f}" for v in values], padding=2, fontsize=8)
    ax.axhline(0, color=MUTED, linewidth=0.8)
    ax.set_xticks(ks)
    ax.set_xlabel("number of clusters")
    ax.set_ylabel("silhouette")
    ax.margins(y=0.15)
    ax.spines["left"].set_visible(False)
    ax.set_yticks([])
    ax.tick_params(length=0)
    return figure


@styled
def dendrogram(clusters: Clusters, groups: Mapping[str, str | None] | None = None) -> Figure:
    """The tree of the clients: each merge at the distance of what it joins, and the cut that leaves the clusters.

    Needs two clients or more, and distances that are numbers.
    """
    clients, known = clusters.order, groups or {}
    tree = merges(np.array(clusters.distances, dtype=float), cast(Linkage, clusters.linkage))
    drawn = hierarchy.dendrogram(tree, no_plot=True)
    leaves = drawn["leaves"] or ()
    figure = Figure(figsize=(6.4, max(1.8, min(0.9 + 0.2 * len(clients), 9.0))), layout="constrained")
    ax = figure.subplots()
    cut = _cut(tree[:, 2].tolist(), clusters.number)
    for heights, rows in zip(drawn["dcoord"], drawn["icoord"], strict=True):
        ax.plot(heights, rows, color=INK if cut is None or max(heights) <= cut else MUTED, linewidth=1.3)
    if cut is not None:
        ax.axvline(cut, color=PALETTE[0], linewidth=1.1, linestyle=(0, (4, 3)))
        ax.annotate(f"{clusters.number} clusters", (cut, 1), xycoords=("data", "axes fraction"), xytext=(3, 2),
                    textcoords="offset points", color=PALETTE[0], fontsize=8, annotation_clip=False)  # fmt: skip
    named = [f"{clients[i]}  ({known[clients[i]]})" if known.get(clients[i]) else clients[i] for i in leaves]
    ax.set_yticks([5 + 10 * i for i in range(len(named))], named if len(named) <= NAMED_ROWS else [""] * len(named))
    low, high = float(tree[0, 2]), float(tree[-1, 2])
    ax.set_xlim(left=max(0.0, low - 0.6 * max(high - low, 0.1 * high)))
    ax.set_xlabel(f"distance ({clusters.linkage} linkage)")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    return figure


def _cut(heights: Sequence[float], number: int) -> float | None:
    """A height between the merges that leave ``number`` clusters and the next one; None where the tree is not cut."""
    if not 1 < number <= len(heights):
        return None
    return float(heights[-number] + heights[-number + 1]) / 2


@styled
def demo_picture(path: Path, clusters: Clusters, groups: Mapping[str, str | None], curves: Mapping[str, Curve]) -> None:
    """One PNG with two panels: the distances with their clusters, and the mean accuracy by round per method."""
    figure = Figure(figsize=(11.0, 4.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.05))
    _distances(left, clusters, groups)
    left.set_title("Distances between clients, and the clusters found", pad=30)
    draw_curves(right, curves, {}, "mean accuracy of the clients", True, None)
    right.set_title("Accuracy by round", pad=30)
    png(figure, path)


def _distances(ax: Axes, clusters: Clusters, groups: Mapping[str, str | None]) -> None:
    order, cluster_of = clusters.order, clusters.members
    rows = sorted(range(len(order)), key=lambda i: (cluster_of.get(order[i], -1), groups.get(order[i]) or "", i))
    clients = [order[i] for i in rows]
    table = np.array(clusters.distances, dtype=float)[np.ix_(rows, rows)]
    np.fill_diagonal(table, np.nan)  # zero by definition; it would take the range of colours for itself
    image = heat_map(ax, table, limits_of(table), NEAR)
    ax.set_aspect("equal")
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((0.0, -0.075, 1.0, 0.03)), orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.set_label("distance: near to far", fontsize=8)
    name_rows(ax, clients)
    group_strip(ax, [groups.get(client) for client in clients])
    start = 0
    for cluster, members in groupby(clients, key=cluster_of.get):
        size = len(list(members))
        ax.add_patch(Rectangle((start, start), size, size, fill=False, edgecolor=INK, linewidth=1.8, clip_on=False))
        text = "no cluster" if cluster is None else f"cluster {cluster}"
        ax.text(len(clients) * 1.025, start + size / 2, text, va="center", fontsize=8.5)
        start += size
