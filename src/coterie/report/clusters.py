"""Shows clusters of clients: the distances that they come from, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coterie.methods.findings import Clusters
from coterie.report import plots
from coterie.report.plots import Picture
from coterie.report.read import Run

FINDING = Clusters


def show(clusters: Clusters, run: Run) -> Iterator[Picture]:
    """The distances between the clients, and the silhouettes of the numbers of clusters that were tried."""
    groups = {client: row.group for client, row in run.clients.items()}
    if len(clusters.order) == len(clusters.distances) > 1:
        note = "Clients that are close to each other stand out; frames are clusters."
        if any(groups.values()):
            note += " Squares: the group that a client's data come from; the method does not know it."
        figure = plots.client_distances(clusters, groups)
        yield Picture("client-distances", "Distances between clients", figure, note)
        if clusters.has_tree and np.isfinite(np.array(clusters.distances, dtype=float)).all():
            note = "Clients that are joined further left are closer to each other."
            yield Picture("dendrogram", "The tree of the clients", plots.dendrogram(clusters, groups), note)
    if clusters.silhouettes:
        note = f"{clusters.choice}. " * bool(clusters.choice) + "A higher silhouette: clusters that are further apart."
        yield Picture("silhouettes", "How many clusters", plots.silhouettes(clusters), note)
