"""Shows clusters of clients: the distances that they come from, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coterie.methods.findings import Clusters
from coterie.report import plots
from coterie.report.plots import Picture
from coterie.report.read import Run

FINDING = Clusters


def show(found: Clusters, run: Run) -> Iterator[Picture]:
    """The distances between the clients, and the silhouettes of the numbers of clusters that were tried."""
    groups = {client: row.group for client, row in run.clients.items()}
    if len(found.order) == len(found.distances) > 1:
        note = "Clients that are close to each other stand out; frames are clusters."
        if any(groups.values()):
            note += " Squares: the group that a client's data come from; the method does not know it."
        figure = plots.client_distances(found, groups)
        yield Picture("client-distances", "Distances between clients", figure, note)
        if np.isfinite(np.array(found.distances, dtype=float)).all():
            note = "Clients that are joined further left are closer to each other."
            yield Picture("dendrogram", "The tree of the clients", plots.dendrogram(found, groups), note)
    if found.silhouettes:
        note = f"{found.choice}. " * bool(found.choice) + "A higher silhouette: clusters that are further apart."
        yield Picture("silhouettes", "How many clusters", plots.silhouettes(found), note)
