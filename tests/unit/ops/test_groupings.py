"""k-means and spectral clustering on distances, against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score

from coterie.ops.cluster import cluster
from coterie.ops.partition import partition


def cosine_distances(seed: int, groups: int = 3, each: int = 5, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [N, 6] in a few groups, and their distances."""
    draw = np.random.default_rng(seed)
    vectors = np.repeat(draw.normal(size=(groups, 6)), each, axis=0) + noise * draw.normal(size=(groups * each, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    d = 1 - vectors @ vectors.T
    np.fill_diagonal(d, 0)
    return vectors, d


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_scikit_learns(seed: int) -> None:
    vectors, d = cosine_distances(seed)
    none = np.zeros(len(d), np.int32)
    for k in (2, 3, 4):
        theirs = KMeans(k, n_init=20, random_state=0).fit(vectors)
        ours = partition(d, k, spectral=False, otherwise=none)
        spread = sum(np.square(vectors[ours == j] - vectors[ours == j].mean(0)).sum() for j in range(k))
        assert spread == pytest.approx(theirs.inertia_, rel=1e-6)
    _, d = cosine_distances(seed, noise=0.2)
    spectral = SpectralClustering(3, affinity="precomputed", random_state=0).fit_predict(1 - d / 2)
    assert adjusted_rand_score(spectral, partition(d, 3, spectral=True, otherwise=none)) == 1


@pytest.mark.parametrize("linkage", ["kmeans", "spectral"])
def test_the_silhouette_chooses_among_them(linkage: str) -> None:
    _, d = cosine_distances(0, noise=0.1)
    found = cluster(d, 6, linkage=linkage)  # type: ignore[arg-type]
    assert found.labels == (0,) * 5 + (1,) * 5 + (2,) * 5
    assert set(found.silhouettes) == {2, 3, 4, 5, 6}
    assert cluster(d, 6, linkage=linkage) == found  # type: ignore[arg-type]


@pytest.mark.parametrize("spectral", [False, True])
def test_where_points_coincide_there_are_still_k_clusters(spectral: bool) -> None:
    otherwise = np.array([0, 0, 1, 2], np.int32)
    found = partition(np.zeros((4, 4)), 3, spectral=spectral, otherwise=otherwise)
    assert len(set(found.tolist())) == 3
    for k in (1, 4):
        assert partition(np.zeros((4, 4)), k, spectral=spectral, otherwise=otherwise) is otherwise
