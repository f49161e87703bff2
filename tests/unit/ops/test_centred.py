"""Distances after the clients' mean is taken off: the definition, and what follows from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from coterie.ops.centred import centred_distances, gram, lora_gram
from coterie.ops.cluster import cluster
from coterie.ops.streams import stream

torch.set_num_threads(1)


def loras(clients: int, ranks: list[int] | None = None) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """A [r, 9] and B [7, r] of ``clients`` on three modules."""
    draw = stream(0, "centred")
    of = ranks or [4] * clients
    a = [list(torch.randn(3, r, 9, generator=draw)) for r in of]
    return a, [list(torch.randn(3, 7, r, generator=draw)) for r in of]


def naive(vectors: list[Tensor], weights: list[float] | None = None) -> np.ndarray:
    """The definition, with the whole vectors."""
    units = torch.stack([v.double() / (v.double().norm() or 1) for v in vectors])
    w = torch.tensor(weights or [1 / len(vectors)] * len(vectors), dtype=torch.float64)
    left = units - (w @ units if weights != [] else 0)
    left = left / left.norm(dim=1, keepdim=True)
    d = (1 - left @ left.T).numpy()
    np.fill_diagonal(d, 0)
    return d


@pytest.mark.parametrize("weights", [None, [0.5, 0.25, 0.25, 0.0, 0.0, 0.0]])
@pytest.mark.parametrize("feature", ["A", "B", "BA"])
def test_centred_distances_are_the_definition(feature: str, weights: list[float] | None) -> None:
    a, b = loras(6, [1, 4, 2, 4, 6, 3] if feature == "BA" else None)
    made = {"A": a, "B": b, "BA": [[y @ x for x, y in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)]}
    vectors = [torch.cat([t.flatten() for t in client]) for client in made[feature]]
    inner = lora_gram(a, b, feature)  # type: ignore[arg-type]
    np.testing.assert_allclose(centred_distances(inner, weights), naive(vectors, weights), rtol=0, atol=1e-6)


def test_what_all_share_is_taken_off_and_sizes_do_not_count() -> None:
    """Two groups that only centring parts from each other, and one client that is a thousand times as long."""
    draw = stream(1, "shared")
    common, sides = torch.randn(60, generator=draw), torch.randn(2, 60, generator=draw)
    rows = [[common * 5 + sides[i % 2] + 0.3 * torch.randn(60, generator=draw)] for i in range(8)]
    inner, centred = gram(rows), centred_distances(gram(rows))
    assert (inner / np.sqrt(np.outer(np.diag(inner), np.diag(inner)))).min() > 0.8  # all alike before
    assert centred[0, 1] > 1 > 0.5 > centred[0, 2]
    assert cluster(centred, 4).labels == (0, 1) * 4
    rows[3] = [rows[3][0] * 1000]
    np.testing.assert_allclose(centred_distances(gram(rows)), centred, atol=1e-4)


def test_clients_that_are_all_alike_are_at_distance_1() -> None:
    d = centred_distances(gram([[torch.ones(5)] for _ in range(3)]))
    assert d.tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("rows", [[[torch.ones(3)], [torch.ones(4)]], [[torch.ones(3)], []], [[], []], []])
def test_clients_that_cannot_be_compared(rows: list[list[Tensor]]) -> None:
    with pytest.raises(ValueError, match="Gram matrix of"):
        gram(rows)


def test_a_tree_may_be_cut_by_the_silhouettes_of_other_distances() -> None:
    """By its own silhouette a tree of four groups in two pairs has two clusters; judged by others it has four."""
    points = np.array([0, 0.1, 1, 1.1, 10, 10.1, 11, 11.1])
    d = np.abs(points[:, None] - points)
    judge = 1.0 - np.kron(np.eye(4), np.ones((2, 2)))
    assert cluster(d, 6).k == 2
    found = cluster(d, 6, judged_by=judge)
    assert found.labels == (0, 0, 1, 1, 2, 2, 3, 3)
    assert found.silhouettes[4] == 1
