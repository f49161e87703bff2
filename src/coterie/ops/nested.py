"""Clusters by two distances: first by what clients' texts are about, then, within those, by what their LoRAs learned.

Texts need few rows, and cannot tell clients apart that label the same texts differently. LoRAs can, and need rows
enough to learn. So the texts' clusters come first, and one of them is split by LoRAs where these clearly part it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from coterie.ops.centred import centred_distances
from coterie.ops.cluster import Array, Clustering, Way, by_first_appearance, cluster

# What is more than chance, from the federations of bench/clusters: by texts, clients with one job reach a silhouette of
# .19, and different jobs .54 and more even with 5 rows a client.
TEXTS_APART = 0.3
_SPLITTABLE = 4  # a client alone counts 0 in a silhouette, so the smallest split is into two pairs


def loras_apart(clients: int) -> float:
    """The silhouette above which LoRAs split a cluster of texts. With fewer clients chance reaches higher.

    In bench/clusters four clients with one job reach .068 and eight .058; eight of which four have the labels turned
    round, .072 to .131 (seeds 0 to 2, by which this was set).
    """
    return 0.05 + 0.12 / clients


@dataclass(frozen=True)
class Split:
    """The best split of a cluster of texts by LoRAs: into how many parts, its silhouette, and what would be enough.

    ``small``: some part has too few clients, so there is no split.
    """

    parts: int
    silhouette: float
    enough: float
    small: bool = False


@dataclass(frozen=True)
class Nested:
    """``labels[i]`` is the cluster of client i, ``texts[i]`` its cluster by texts alone, by first appearance.

    ``by_texts`` has the silhouettes of the texts by number of clusters, ``by_loras`` the best split of each cluster of
    texts that is large enough for one. ``distances`` [N, N] has a tree that ``labels`` cut: they are below 1 within a
    cluster, at most 2 within a cluster of texts, and from 2 on between those.
    """

    labels: tuple[int, ...]
    texts: tuple[int, ...]
    by_texts: Mapping[int, float]
    by_loras: Mapping[int, Split]
    distances: Array


def nested(
    texts: Array, loras: Array, most: int, *, exactly: int = 0, linkage: Way = "average", least: int = 1
) -> Nested:
    """Clusters of N clients by the distances of their ``texts`` [N, N] and the inner products of their LoRAs [N, N].

    There may be one cluster, and at most ``most``, or there are ``exactly`` so many. LoRAs split no cluster of texts
    into parts of fewer than ``least`` clients, unless there have to be ``exactly`` so many. They are compared after the
    mean of the cluster's is taken off. What chance reaches is known for vectors of thousands of numbers; with fewer
    (tiny models) it reaches higher, and there may be too many clusters.
    """
    limit = exactly or most
    first = cluster(texts, limit, min_clusters=1, threshold=TEXTS_APART, linkage=linkage)
    together = np.equal.outer(first.labels, first.labels)
    distances = 2 + texts
    splits: dict[int, Clustering] = {}
    for text in range(first.k):
        members = np.flatnonzero(np.array(first.labels) == text)
        own = np.ix_(members, members)
        within = centred_distances(loras[own])
        distances[own] = within / 2
        if len(members) >= _SPLITTABLE:
            splits[text] = cluster(within, limit, min_clusters=1, threshold=loras_apart(len(members)), linkage=linkage)
    np.fill_diagonal(distances, 0)
    small = {text for text, of in splits.items() if min(map(of.labels.count, of.labels)) < least}
    labels = _split(first, {text: of for text, of in splits.items() if text not in small}, limit)
    distances += together & ~np.equal.outer(labels, labels)
    if exactly:
        labels = cluster(distances, exactly, min_clusters=exactly, linkage=linkage).labels
    best = {t: _best(of, first.labels.count(t), t in small) for t, of in splits.items() if of.silhouettes}
    return Nested(labels, first.labels, first.silhouettes, best, distances)


def _split(first: Clustering, splits: Mapping[int, Clustering], most: int) -> tuple[int, ...]:
    """The clusters of texts, those that LoRAs part split, the clearest first until there are ``most`` clusters."""
    labels = [(text, 0) for text in first.labels]
    number = first.k
    apart = {text: split for text, split in splits.items() if split.k > 1}
    for text, split in sorted(apart.items(), key=lambda item: -item[1].silhouettes[item[1].k]):
        if number + split.k - 1 <= most:
            number += split.k - 1
            parts = iter(split.labels)
            labels = [(text, next(parts)) if label[0] == text else label for label in labels]
    return by_first_appearance(labels)


def _best(split: Clustering, clients: int, small: bool) -> Split:
    parts = max(split.silhouettes, key=lambda k: split.silhouettes[k])
    return Split(parts, split.silhouettes[parts], loras_apart(clients), small)
