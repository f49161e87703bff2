"""k clusters of clients by k-means or spectral clustering, from their distances alone.

Distances are 1 - cos, or means of such, so 1 - d is a Gram matrix: its eigenvectors give every client coordinates in
which squared distances are 2 d. Every draw is from a fixed seed: the same distances give the same clusters.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

Array = NDArray[np.float64]
Labels = NDArray[np.int32]

_RESTARTS = 50


def partition(d: Array, k: int, *, spectral: bool, otherwise: Labels) -> Labels:
    """Labels [N] of exactly k clusters of N clients with the distances ``d`` [N, N].

    ``spectral``: k-means on the first k eigenvectors of the normalised affinities 1 - d / 2, each client's row scaled
    to length 1 (Ng, Jordan and Weiss, 2001). ``otherwise`` [N] are the labels where no start finds k clusters, as when
    clients are at the same point; also for k = 1 and k = N.
    """
    if not 1 < k < len(d):
        return otherwise
    points = _spectral_points(d, k) if spectral else _points(d)
    best, least = otherwise, np.inf
    draw = np.random.default_rng(0)
    for _ in range(_RESTARTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a cluster that stays empty: this start does not count
            labels = kmeans2(points, k, iter=50, minit="++", rng=draw)[1].astype(np.int32)
        if len(np.unique(labels)) == k and (spread := _spread(points, labels, k)) < least - 1e-12:
            best, least = labels, spread
    return best


def _spread(points: Array, labels: Labels, k: int) -> float:
    """The sum of squared distances to the centres of the clusters."""
    return sum(float(np.square(of - of.mean(axis=0)).sum()) for of in (points[labels == j] for j in range(k)))


def _points(d: Array) -> Array:
    """Coordinates [N, N] of the clients."""
    values, vectors = np.linalg.eigh(1 - d)
    points: Array = vectors * np.sqrt(values.clip(min=0))
    return points


def _spectral_points(d: Array, k: int) -> Array:
    affinities = 1 - d / 2
    degrees = np.sqrt(affinities.sum(axis=1))
    _, vectors = np.linalg.eigh(affinities / degrees / degrees[:, None])
    first = vectors[:, -k:]
    lengths = np.linalg.norm(first, axis=1, keepdims=True)
    points: Array = first / np.where(lengths > 0, lengths, 1)
    return points
