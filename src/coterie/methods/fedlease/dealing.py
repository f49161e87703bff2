"""Several experts for one FedLEASE cluster: how many, and which of its clients train which.

The members of a cluster are put in the order of the leaves of their tree (average linkage of the distances that the
clients were clustered by), and that order is cut into shares of equal size, give or take one. Neighbours, who are most
alike, share an expert; the order is read from the end that leaves the shares closer together. A cut of the tree itself
would join similar clients too, but inside a cluster it mostly parts single clients from all others, and their experts
would see the rows of one client.

With ``experts_per_cluster = "auto"`` a cluster has one expert for every time that it has the rows of the median
cluster, and at most one for two members. Rows are known exactly; how far the members of a cluster are apart is, with a
hundred rows each, mostly what training drew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median_low

import numpy as np

from coterie.methods.fedlease.allocation import Allocation
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.ops.cluster import leaves
from coterie.types import ClientId


def dealt(settings: FedLEASESettings, allocation: Allocation, rows: Mapping[ClientId, int]) -> Allocation:
    """``allocation`` with an expert for each client, by its clients' numbers of training rows (those known).

    Experts are numbered by cluster, and within a cluster by their first clients. The allocation as it is where every
    cluster has one expert.
    """
    if settings.experts_per_cluster == 1:
        return allocation
    clusters = [sorted(c for c, e in allocation.clusters.items() if e == k) for k in range(allocation.num_clusters)]
    shares = [
        share
        for members, number in zip(clusters, _numbers(settings, clusters, rows), strict=True)
        for share in sorted(_shares(allocation, members, number))
    ]
    own = {client: expert for expert, share in enumerate(shares) for client in share}
    cluster_of = [allocation.clusters[share[0]] for share in shares]
    text = tuple(allocation.text_clusters[k] for k in cluster_of) if allocation.text_clusters else ()
    return replace(allocation, own=dict(sorted(own.items())), text_clusters=text)


def _numbers(
    settings: FedLEASESettings, clusters: Sequence[Sequence[ClientId]], rows: Mapping[ClientId, int]
) -> list[int]:
    """The number of experts of each cluster."""
    if settings.experts_per_cluster != "auto":
        return [min(settings.experts_per_cluster, len(members)) for members in clusters]
    of = [sum(rows.get(c, 0) for c in members) for members in clusters]
    usual = max(1, median_low(of))
    return [max(1, min(len(members) // 2, n // usual)) for members, n in zip(clusters, of, strict=True)]


def _shares(allocation: Allocation, members: Sequence[ClientId], number: int) -> list[list[ClientId]]:
    """``members`` in ``number`` shares, each sorted. Those that were not compared come last, by name."""
    compared = [c for c in allocation.order if c in {*members}]
    at = [allocation.order.index(c) for c in compared]
    d = allocation.distances.numpy()[np.ix_(at, at)]
    order = leaves(d)

    def split(order: Sequence[int]) -> list[list[ClientId]]:
        names = [*(compared[i] for i in order), *(c for c in members if c not in compared)]
        return [sorted(map(str, share)) for share in np.array_split(np.array(names), number)]

    def spread(shares: list[list[ClientId]]) -> float:
        within = [[compared.index(c) for c in share if c in compared] for share in shares]
        return sum(float(d[np.ix_(share, share)].sum()) for share in within)

    return min(split(order), split(order[::-1]), key=spread)
