"""FedLEASE's allocation (arXiv 2509.15087, section 3.2): distances between LoRAs, their tree, and where to cut it.

Pure functions on tensors and arrays, in float64. N is the number of clients, L the number of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, leaves_list
from scipy.cluster.hierarchy import linkage as tree_of
from scipy.spatial.distance import squareform
from torch import Tensor

from coterie.ops.partition import partition
from coterie.types import CoterieError

Array = NDArray[np.float64]
Feature = Literal["B", "A", "BA"]
Linkage = Literal["average", "complete", "single"]
Way = Linkage | Literal["kmeans", "spectral"]
_T = TypeVar("_T")

_CHUNK = 1 << 23  # numbers in one block of the product's Gram matrix: 64 MiB in float64


@dataclass(frozen=True)
class Clustering:
    """``labels[i]`` in 0..k-1 is the cluster of client i, numbered by first appearance; ``silhouettes`` by k tried."""

    labels: tuple[int, ...]
    k: int
    silhouettes: Mapping[int, float]


def distances(features: Sequence[Sequence[Tensor]]) -> Array:
    """d(i, j) = mean over modules l of 1 - cos(v_il, v_jl), v the flattened ``features[i][l]``; [N, N], zero diagonal.

    A zero vector has cosine 0, so distance 1, to every vector, even to another zero vector. The mean of the cosines is
    one Gram matrix, of the concatenated unit-normalised vectors; it is summed up module by module, so that beside the
    input no more than one module of every client is held. Raises :class:`ValueError` where clients differ in modules or
    sizes.
    """
    return _mean_distance(features, _cosines)


def product_distances(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> Array:
    """:func:`distances` of the products B A, of which none is formed: <B_i A_i, B_j A_j> = tr((B_i^T B_j)(A_j A_i^T)).

    Shapes: ``a[i][l]`` [r, d_in], ``b[i][l]`` [d_out, r]; ranks may differ. Costs r times what B alone costs.
    """
    return _mean_distance([list(zip(*pair, strict=True)) for pair in zip(a, b, strict=True)], _product_cosines)


def lora_distances(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]], feature: Feature = "B") -> Array:
    """The distances [N, N] between LoRAs by their B (the paper's), their A or their product, all [client][module]."""
    match feature:
        case "B":
            return distances(b)
        case "A":
            return distances(a)
        case "BA":
            return product_distances(a, b)


def merges(d: Array, linkage: Linkage = "average") -> Array:
    """The tree of ``d`` [N, N] as its N - 1 merges [N - 1, 4], as :func:`scipy.cluster.hierarchy.linkage` has it."""
    tree: Array = tree_of(squareform(np.asarray(d, dtype=np.float64), checks=False), method=linkage)
    return tree


def leaves(d: Array) -> list[int]:
    """The numbers 0 to N - 1 in the order of the leaves of the tree of ``d`` [N, N].

    Of the orders that a tree allows, the one in which neighbours are closest in all.
    """
    if len(d) < 2:
        return list(range(len(d)))
    condensed = squareform(np.asarray(d, dtype=np.float64), checks=False)
    return [int(i) for i in leaves_list(tree_of(condensed, method="average", optimal_ordering=True))]


def silhouettes(d: Array, ks: Iterable[int], linkage: Way = "average") -> dict[int, float]:
    """The mean silhouette of the clients with distances ``d`` [N, N] in k clusters, for each of ``ks``.

    A client alone in its cluster counts as 0, as in Rousseeuw's paper; k = 1 and k = N have no silhouette and get -1.
    """
    return _silhouettes(d, _cuts(d, list(ks), linkage))


def cluster(
    d: Array,
    max_clusters: int,
    *,
    min_clusters: int = 2,
    threshold: float = 0.1,
    linkage: Way = "average",
    judged_by: Array | None = None,
) -> Clustering:
    """Cut the tree of ``d`` [N, N] where the silhouette is largest; the smallest k wins a tie.

    Silhouettes are those of the distances ``judged_by`` [N, N], of ``d`` by default. With ``linkage`` "kmeans" or
    "spectral" each k has clusters of its own instead of a cut of one tree (:mod:`coterie.ops.partition`).

    k runs from ``max(2, min_clusters)`` to ``min(max_clusters, N - 1)``. ``min_clusters = 1`` also allows one cluster,
    which is taken when no k has a silhouette above ``threshold`` (independent random vectors stay below 0.07, the tasks
    of `bench/results/fedlease.md` are near 0.24). Where no k is left to compare (two clients, say, or
    as many clusters as clients), k = ``min_clusters``.
    Raises :class:`CoterieError` for fewer clients than ``min_clusters``, :class:`ValueError` for other invalid limits.
    """
    clients = d.shape[0]
    if d.shape != (clients, clients) or not 1 <= min_clusters <= max_clusters:
        raise ValueError(f"distances of shape {d.shape}, {min_clusters} to {max_clusters} clusters")
    if min_clusters > clients:
        raise CoterieError(
            f"{clients} clients cannot form {min_clusters} or more clusters; set fewer clusters, or add clients"
        )
    ks = list(range(max(2, min_clusters), min(max_clusters, clients - 1) + 1))
    cuts = _cuts(d, [*ks, min_clusters], linkage)
    scores = _silhouettes(d if judged_by is None else judged_by, {k: cuts[k] for k in ks})
    best = max(ks, key=lambda k: scores[k]) if ks else min_clusters  # max takes the first, the smallest k, of equals
    if min_clusters == 1 and all(score <= threshold for score in scores.values()):
        best = 1
    return Clustering(by_first_appearance(cuts[best].tolist()), best, scores)


def _mean_distance(features: Sequence[Sequence[_T]], cosines: Callable[[list[_T]], Tensor]) -> Array:
    counts = {len(client) for client in features}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"distances between clients with {sorted(counts)} modules")
    (modules,) = counts
    total = torch.zeros(len(features), len(features), dtype=torch.float64)
    for module in range(modules):
        total += cosines([client[module] for client in features])
    d: Array = (1 - (total + total.T).numpy() / (2 * modules)).clip(0, 2)
    np.fill_diagonal(d, 0)
    return d


def _cosines(tensors: list[Tensor]) -> Tensor:
    """The cosines [N, N] of N flattened tensors of one size, 0 for a tensor of zeros."""
    if len({tensor.numel() for tensor in tensors}) != 1:
        raise ValueError(f"distances between tensors of shapes {sorted({tuple(t.shape) for t in tensors})}")
    units = torch.empty(len(tensors), tensors[0].numel(), dtype=torch.float64)
    for unit, tensor in zip(units, tensors, strict=True):
        unit.copy_(tensor.detach().reshape(-1))
    norms = torch.linalg.vector_norm(units, dim=1, keepdim=True)
    units.div_(norms.masked_fill_(norms == 0, 1))
    return units @ units.T


def _product_cosines(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The cosines [N, N] of the products B A of N pairs (A, B), 0 for a product of zeros."""
    inner = product_gram(pairs)
    norms = inner.diagonal().clamp(min=0).sqrt()
    norms = norms.masked_fill(norms == 0, 1)
    return inner.div_(norms).div_(norms.unsqueeze(1))


def product_gram(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The inner products [N, N] of the products B A of N pairs (A, B), in float64; no product is formed."""
    clients, rank = len(pairs), max(a.shape[0] for a, _ in pairs)
    left = _stack([b.detach().T for _, b in pairs], rank)
    right = _stack([a.detach() for a, _ in pairs], rank)
    inner = torch.empty(clients, clients, dtype=torch.float64)
    step = max(1, _CHUNK // (clients * rank * rank))
    for start in range(0, clients, step):
        rows = slice(start * rank, (start + step) * rank)
        blocks = (left[rows] @ left.T).mul_(right[rows] @ right.T)
        inner[start : start + step] = blocks.unflatten(1, (clients, rank)).sum(2).unflatten(0, (-1, rank)).sum(1)
    return inner


def _stack(matrices: list[Tensor], rank: int) -> Tensor:
    """Matrices [r_i, d] under each other, [N * rank, d] in float64; zeros fill up to rank."""
    if len({matrix.shape[1] for matrix in matrices}) != 1:
        raise ValueError(f"distances between matrices of widths {sorted({m.shape[1] for m in matrices})}")
    stacked = torch.zeros(len(matrices), rank, matrices[0].shape[1], dtype=torch.float64)
    for rows, matrix in zip(stacked, matrices, strict=True):
        rows[: matrix.shape[0]] = matrix
    return stacked.flatten(0, 1)


def _cuts(d: Array, ks: list[int], linkage: Way) -> dict[int, NDArray[np.int32]]:
    """Labels [N] for each k: the tree after its first N - k merges, so exactly k clusters also among equal heights."""
    clients = d.shape[0]
    if clients == 1:
        return {k: np.ones(1, np.int32) for k in ks}
    if linkage == "kmeans" or linkage == "spectral":
        trees = _cuts(d, ks, "average")
        return {k: partition(d, k, spectral=linkage == "spectral", otherwise=trees[k]) for k in ks}
    tree = merges(d, linkage)
    order = np.arange(clients - 1, dtype=np.float64)  # cut by the order of the merges: heights may be equal
    return {
        k: fcluster(tree, k, "maxclust_monocrit", monocrit=order) if k < clients else np.arange(clients, dtype=np.int32)
        for k in ks
    }


def _silhouettes(d: Array, cuts: Mapping[int, NDArray[np.int32]]) -> dict[int, float]:
    return {k: _silhouette(d, labels) if 1 < k < d.shape[0] else -1.0 for k, labels in cuts.items()}


def _silhouette(d: Array, labels: NDArray[np.int32]) -> float:
    """The mean over i of (b_i - a_i) / max(a_i, b_i): a_i is the mean distance to i's own cluster, b_i to the nearest.

    0 for the one member of a cluster, and where all distances are 0 (Rousseeuw, 1987).
    """
    clients, codes = np.arange(len(labels)), np.unique(labels, return_inverse=True)[1]
    members = np.bincount(codes)
    sums: Array = np.stack([np.bincount(codes, weights=row, minlength=len(members)) for row in d])  # [N, k]
    own = sums[clients, codes]
    sums[clients, codes] = np.inf
    nearest = (sums / members).min(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = own / (members - 1)[codes]
        values = (nearest - own) / np.maximum(own, nearest)
    return float(np.nan_to_num(values).mean())


def by_first_appearance(labels: Sequence[Hashable]) -> tuple[int, ...]:
    """Labels numbered from 0 in the order in which they come first."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return tuple(numbers[label] for label in labels)
