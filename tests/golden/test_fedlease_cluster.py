"""Distances, silhouettes and clusters against the published FedLEASE allocation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from coterie.ops.cluster import cluster, distances, lora_distances, silhouettes

FILES = sorted(Path(__file__).parent.glob("fedlease_cluster_*.npz"))
pytestmark = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)

# The reference computes cosines in float32, we in float64: what is left between us is its rounding, and the 1e-8 that
# it adds to the norms.
FLOAT32 = 1e-6


def test_every_golden_clustering_is_covered(path: Path) -> None:
    assert len(FILES) == 7
    assert path.exists()


def test_distances(path: Path) -> None:
    golden = np.load(path, allow_pickle=False)
    for name in ("query", "value"):
        found = distances([list(client) for client in torch.from_numpy(golden[f"B_{name}"])])
        np.testing.assert_allclose(found, golden[f"D_{name}"], rtol=0, atol=FLOAT32)
    together = of_all_modules(golden)
    np.testing.assert_allclose(together, golden["D"], rtol=0, atol=FLOAT32)
    assert np.array_equal(together, together.T)
    assert not together.diagonal().any()


def test_a_client_of_zeros_is_at_distance_one(path: Path) -> None:
    golden = np.load(path, allow_pickle=False)
    zero = np.flatnonzero(~golden["B_query"].any(axis=(1, 2, 3)))
    assert len(zero) == ("zero_client" in path.stem)
    for client in zero:
        assert np.array_equal(np.delete(of_all_modules(golden)[client], client), np.ones(len(golden["D"]) - 1))


def test_silhouettes(path: Path) -> None:
    """For every k of the reference, k = N among them (n5_k5): there it records -1, and so do we when asked."""
    golden = np.load(path, allow_pickle=False)
    found = silhouettes(of_all_modules(golden), golden["ks"].tolist())
    assert list(found) == golden["ks"].tolist()
    np.testing.assert_allclose(list(found.values()), golden["silhouette"], rtol=0, atol=2 * FLOAT32)
    assert (len(golden["D"]) in found) == ("n5_k5" in path.stem)


def test_clusters_for_every_k(path: Path) -> None:
    golden = np.load(path, allow_pickle=False)
    compared = 0
    for k, labels in zip(golden["ks"].tolist(), golden["labels_per_k"], strict=True):
        found = cluster(of_all_modules(golden), k, min_clusters=k)
        assert partition(found.labels) == partition(labels)
        compared += 1
    assert compared == len(golden["ks"]) >= 3


def test_the_cluster_count_chosen(path: Path) -> None:
    """The same k and partition, up to the names of the clusters.

    Ours tries k up to N - 1, the reference up to ``k_max`` whatever N is: k = N has no silhouette (-1 there), so it
    never wins, and n5_k5 ends as n5_k4. (With ``k_max`` > N the reference stops with an error; we do not.)
    """
    golden = np.load(path, allow_pickle=False)
    clients = len(golden["D"])
    found = cluster(of_all_modules(golden), int(golden["k_max"]))
    assert found.k == int(golden["k"])
    assert partition(found.labels) == partition(golden["labels"])
    assert list(found.silhouettes) == [k for k in golden["ks"].tolist() if k < clients]
    assert cluster(of_all_modules(golden), clients + 5).k >= 2


def of_all_modules(golden) -> np.ndarray:
    """One distance over query and value modules together; the reference averages the distances of the two kinds."""
    b = torch.cat([torch.from_numpy(golden["B_query"]), torch.from_numpy(golden["B_value"])], dim=1)
    return lora_distances([], [list(client) for client in b], "B")


def partition(labels) -> set[frozenset[int]]:
    return {
        frozenset(np.flatnonzero(np.asarray(labels) == label).tolist()) for label in set(np.asarray(labels).tolist())
    }
