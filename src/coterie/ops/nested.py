"""Clusters by two distances: first by what clients' texts are about, then, within those, by what their LoRAs learned.

Texts need few rows, and cannot tell clients apart that label the same texts differently. LoRAs can, and need rows
enough to learn. So the texts' clusters come first, and one of them is split by LoRAs where these clearly part it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from coterie.ops.centred import centred_distances
from coterie.ops.cluster import Array, Clustering, Linkage, Way, by_first_appearance, cluster

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

    ``small``: some part has too few clients, so there is no split. ``no_room``: with so many parts there would be more
    clusters than there may be, so there are fewer parts, or one.
    """

    parts: int
    silhouette: float
    enough: float
    small: bool = False
    no_room: bool = False


@dataclass(frozen=True)
class Nested:
    """``labels[i]`` is the cluster of client i, ``texts[i]`` its cluster by texts alone, by first appearance.

    ``by_texts`` has the silhouettes of the texts by number of clusters, ``by_loras`` the best split of each cluster of
    texts that is large enough for one. ``distances`` [N, N] has a tree that ``labels`` cut: they are below 1 within a
    cluster, at most 2 within a cluster of texts, and from 2 on between those. There may be ``most`` clusters, or
    have to be ``exactly`` so many.
    """

    labels: tuple[int, ...]
    texts: tuple[int, ...]
    by_texts: Mapping[int, float]
    by_loras: Mapping[int, Split]
    distances: Array
    most: int
    exactly: int = 0


def nested(
    texts: Array, loras: Array, most: int, *, exactly: int = 0, linkage: Way = "average", least: int = 1
) -> Nested:
    """Clusters of N clients by the distances of their ``texts`` [N, N] and the inner products of their LoRAs [N, N].

    There may be one cluster, and at most ``most``, or there are ``exactly`` so many. LoRAs split no cluster of texts
    into parts of fewer than ``least`` clients, unless there have to be ``exactly`` so many. They are compared after the
    mean of the cluster's is taken off. What chance reaches is known for vectors of thousands of numbers; with fewer
    (tiny models) it reaches higher, and there may be too many clusters.

    With ``linkage`` "kmeans" or "spectral", too, a tree (the average one) makes them ``exactly`` so many: it keeps to
    what texts and LoRAs have decided. k-means and spectral clustering may not, and take distances up to 2 only.
    """
    limit = exactly or most
    first = cluster(texts, limit, min_clusters=1, threshold=TEXTS_APART, linkage=linkage)
    groups = [np.flatnonzero(np.array(first.labels) == text) for text in range(first.k)]
    within = [centred_distances(loras[np.ix_(members, members)]) for members in groups]

    def into(text: int, parts: int) -> Clustering:
        return cluster(within[text], parts, min_clusters=1, threshold=loras_apart(len(groups[text])), linkage=linkage)

    wanted = {text: into(text, limit) for text, members in enumerate(groups) if len(members) >= _SPLITTABLE}
    labels, small = _split(first, wanted, into, limit, least)
    distances = 2 + texts
    for members, apart in zip(groups, within, strict=True):
        distances[np.ix_(members, members)] = apart / 2
    np.fill_diagonal(distances, 0)
    distances += np.equal.outer(first.labels, first.labels) & ~np.equal.outer(labels, labels)
    if exactly:
        tree: Linkage = "average" if linkage == "kmeans" or linkage == "spectral" else linkage
        labels = cluster(distances, exactly, min_clusters=exactly, linkage=tree).labels
    made = [len({labels[i] for i in members}) for members in groups]
    best = {text: _best(of, made[text], text in small) for text, of in wanted.items() if of.silhouettes}
    return Nested(labels, first.labels, first.silhouettes, best, distances, limit, exactly)


def _split(
    first: Clustering, wanted: Mapping[int, Clustering], into: Callable[[int, int], Clustering], most: int, least: int
) -> tuple[tuple[int, ...], set[int]]:
    """The clusters of texts, those that LoRAs part split, and those of texts that would have parts below ``least``.

    The clearest is split first. One whose best split, among those ``wanted``, would make more than ``most`` clusters
    has the best of those that do not: ``into(text, parts)`` is that with at most so many parts.
    """
    labels = [(text, 0) for text in first.labels]
    number, small = first.k, set()
    apart = {text: split for text, split in wanted.items() if split.k > 1}
    for text, best in sorted(apart.items(), key=lambda item: -item[1].silhouettes[item[1].k]):
        room = most - number + 1
        split = best if best.k <= room else into(text, room)
        if min(map(split.labels.count, split.labels)) < least:
            small.add(text)
            continue
        number += split.k - 1
        parts = iter(split.labels)
        labels = [(text, next(parts)) if label[0] == text else label for label in labels]
    return by_first_appearance(labels), small


def _best(wanted: Clustering, made: int, small: bool) -> Split:
    parts = max(wanted.silhouettes, key=lambda k: wanted.silhouettes[k])
    enough = loras_apart(len(wanted.labels))
    return Split(parts, wanted.silhouettes[parts], enough, small, no_room=made < wanted.k and not small)
