"""Allocation beyond the golden cases: products, trees with ties, limits, and clients that arrive in another order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import silhouette_score
from torch import Tensor

from coterie.ops.cluster import cluster, distances, lora_distances, product_distances, silhouettes
from coterie.ops.streams import stream
from coterie.types import CoterieError

torch.set_num_threads(1)


def loras(
    clients: int, ranks: list[int] | None = None, groups: int = 1
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """A [r, 9] and B [7, r] (float32) of ``clients`` on three modules, in ``groups`` that share a direction."""
    draw = stream(0, "loras")
    centres = [torch.randn(3, 7, 4, generator=draw) for _ in range(groups)]
    a, b = [], []
    for client in range(clients):
        r = ranks[client] if ranks else 4
        a.append(list(torch.randn(3, r, 9, generator=draw)))
        b.append(
            list((centres[client % groups][..., :r] if r <= 4 else 0) + 0.3 * torch.randn(3, 7, r, generator=draw))
        )
    return a, b


def naive(vectors: list[list[Tensor]]) -> np.ndarray:
    """The definition, pair by pair and module by module."""
    d = np.zeros((len(vectors), len(vectors)))
    for i, mine in enumerate(vectors):
        for j, other in enumerate(vectors):
            if i != j:
                d[i, j] = np.mean([1 - cosine(x.double(), y.double()) for x, y in zip(mine, other, strict=True)])
    return d


def cosine(x: Tensor, y: Tensor) -> float:
    size = float(x.norm() * y.norm())
    return float((x * y).sum()) / size if size else 0.0


@pytest.mark.parametrize("feature", ["B", "A"])
def test_distances_are_the_definition(feature: str) -> None:
    a, b = loras(6, groups=2)
    b[3] = [torch.zeros_like(t) for t in b[3]]
    b[5][1].zero_()  # one module of zeros
    a[0] = [torch.zeros_like(t) for t in a[0]]
    a[1] = [torch.zeros_like(t) for t in a[1]]
    d = lora_distances(a, b, feature)
    np.testing.assert_allclose(d, naive({"B": b, "A": a}[feature]), rtol=0, atol=1e-14)
    alone, other = (3, 0) if feature == "B" else (0, 1)  # two clients of zeros are at distance 1 as well
    assert d[alone, other] == 1
    assert d[alone, alone] == 0


@pytest.mark.parametrize("ranks", [None, [1, 4, 2, 4, 6, 3]])
def test_products_are_compared_without_being_formed(ranks: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = loras(6, ranks)
    b[2][0].zero_()
    wanted = naive(
        [[y.double() @ x.double() for x, y in zip(mine, other, strict=True)] for mine, other in zip(a, b, strict=True)]
    )
    np.testing.assert_allclose(lora_distances(a, b, "BA"), wanted, rtol=0, atol=1e-13)
    monkeypatch.setattr("coterie.ops.cluster._CHUNK", 1)  # one client's rows at a time
    np.testing.assert_allclose(product_distances(a, b), wanted, rtol=0, atol=1e-13)


def test_distances_in_bfloat16_and_with_gradients_on() -> None:
    _, b = loras(4)
    low = [[t.bfloat16() for t in client] for client in b]
    grad = [[t.float().requires_grad_() for t in client] for client in low]
    assert np.array_equal(distances(low), distances(grad))


@pytest.mark.parametrize(
    "vectors",
    [
        [[torch.ones(3)], [torch.ones(3), torch.ones(3)]],
        [[torch.ones(3)], [torch.ones(4)]],
        [[], []],
        [],
    ],
)
def test_clients_that_cannot_be_compared(vectors: list[list[Tensor]]) -> None:
    with pytest.raises(ValueError, match="distances between"):
        distances(vectors)


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
@pytest.mark.parametrize("ties", [False, True])
def test_exactly_k_clusters_as_scikit_learn_has_them(linkage: str, ties: bool) -> None:
    """Among equal heights too, where a cut by height finds fewer than k."""
    random = np.random.default_rng(0)
    compared = 0
    for _ in range(40):
        n = int(random.integers(2, 12))
        d = random.integers(1, 4, (n, n)).astype(float) if ties else random.random((n, n))
        d = np.triu(d, 1) + np.triu(d, 1).T
        for k in range(1, n + 1):
            ours = cluster(d, k, min_clusters=k, linkage=linkage, threshold=-2.0).labels
            theirs = AgglomerativeClustering(n_clusters=k, metric="precomputed", linkage=linkage).fit_predict(d)
            assert len(set(ours)) == k
            assert same_partition(ours, theirs)
            compared += 1
    assert compared > 200


def test_labels_are_numbered_by_first_appearance_whatever_the_order() -> None:
    _, b = loras(12, groups=3)
    d = distances(b)
    found = cluster(d, 8)
    assert found.k == 3
    assert found.labels == (0, 1, 2) * 4
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(12)
        again = cluster(d[np.ix_(order, order)], 8)
        assert list(dict.fromkeys(again.labels)) == [0, 1, 2]
        assert same_partition(again.labels, [found.labels[i] for i in order])
        assert again.silhouettes == pytest.approx(found.silhouettes, abs=1e-12)


def test_the_smallest_k_wins_a_tie() -> None:
    """Four clients, all at distance 1: every silhouette is 0."""
    d = np.ones((5, 5)) - np.eye(5)
    assert cluster(d, 5).silhouettes == {2: 0, 3: 0, 4: 0}
    assert cluster(d, 5).k == 2
    assert cluster(d, 5, min_clusters=3).k == 3


def test_one_cluster_only_where_it_is_allowed_and_nothing_stands_out() -> None:
    alike, apart = (distances(loras(8, groups=groups)[1]) for groups in (1, 2))
    best = max(cluster(alike, 4).silhouettes.values())
    assert cluster(alike, 4).k >= 2
    assert cluster(alike, 4, min_clusters=1, threshold=best).k == 1
    assert cluster(alike, 4, min_clusters=1, threshold=best).labels == (0,) * 8
    assert cluster(alike, 4, min_clusters=1, threshold=best - 1e-9).k == cluster(alike, 4).k
    assert cluster(apart, 4, min_clusters=1).k == 2


def test_noise_stays_below_the_default_threshold() -> None:
    """Independent random vectors have no clusters; the default threshold tells them from data that have."""
    tried = [
        cluster(
            distances([[torch.randn(80, generator=draw) for _ in range(12)] for _ in range(n)]), n - 1, min_clusters=1
        )
        for n in (4, 6, 8, 16)
        for seed in range(5)
        for draw in [stream(seed, "noise", n)]
    ]
    assert len(tried) == 20
    assert {found.k for found in tried} == {1}


@pytest.mark.parametrize(
    ("clients", "limits", "k", "tried"),
    [
        (1, (1, 4), 1, []),
        (2, (2, 4), 2, []),  # k = 2 = N has no silhouette, and is all there is
        (2, (1, 4), 1, []),
        (3, (2, 9), 2, [2]),
        (4, (4, 4), 4, []),  # as many clusters as clients, asked for
        (5, (1, 1), 1, []),
        (6, (3, 4), None, [3, 4]),
    ],
)
def test_limits(clients: int, limits: tuple[int, int], k: int | None, tried: list[int]) -> None:
    _, b = loras(clients)
    found = cluster(distances(b), limits[1], min_clusters=limits[0])
    assert list(found.silhouettes) == tried
    assert len(set(found.labels)) == found.k
    assert k is None or found.k == k


def test_more_clusters_than_clients() -> None:
    _, b = loras(3)
    with pytest.raises(CoterieError, match="3 clients cannot form 4 or more clusters"):
        cluster(distances(b), 6, min_clusters=4)
    with pytest.raises(CoterieError, match="1 clients cannot form 2 or more clusters"):
        cluster(np.zeros((1, 1)), 6)


def test_limits_at_odds() -> None:
    for low, high in ((3, 2), (0, 2)):
        with pytest.raises(ValueError, match="clusters"):
            cluster(np.zeros((4, 4)), high, min_clusters=low)
    with pytest.raises(ValueError, match="shape"):
        cluster(np.zeros((4, 3)), 2)


@pytest.mark.parametrize("clients", [3, 5, 40])
def test_silhouettes_are_sklearns_to_the_bit(clients: int) -> None:
    points = np.random.default_rng(clients).normal(size=(clients, 3))
    d = np.linalg.norm(points[:, None] - points, axis=2)
    for linkage in ("average", "single"):
        found = silhouettes(d, range(2, clients), linkage)
        model = {k: AgglomerativeClustering(k, metric="precomputed", linkage=linkage) for k in found}
        assert found == {k: silhouette_score(d, model[k].fit_predict(d), metric="precomputed") for k in found}


def test_silhouettes_of_one_cluster_and_of_as_many_as_clients() -> None:
    _, b = loras(4)
    found = silhouettes(distances(b), [4, 1, 2])
    assert list(found) == [4, 1, 2]
    assert found[4] == found[1] == -1
    assert -1 < found[2] < 1


def same_partition(one, other) -> bool:
    return len(set(zip(one, other, strict=True))) == len(set(one)) == len(set(other))
