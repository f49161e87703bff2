"""The robust rules' own properties; ``tests/golden/test_robust_byzfl.py`` compares them with ByzFL."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from coterie.ops.robust import (
    Rule,
    agreement,
    capped,
    clipping,
    combination,
    combine,
    gram,
    limit,
    neighbour_mixing,
    norms,
    shortened,
)

RULES = get_args(Rule)


def rows(n: int = 8, d: int = 40, bad: int = 2, by: float = -50.0) -> Tensor:
    """Noisy copies of one vector of ones; the first ``bad`` are turned round and larger."""
    x = 1 + 0.3 * torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    x[:bad] *= by
    return x


def aggregated(rule: Any, x: Tensor, attackers: int, mixing: Tensor | None = None) -> Tensor:
    vectors = [{"x": row} for row in x]
    eye = torch.eye(len(x), dtype=torch.float64)
    return combine(rule, vectors, eye if mixing is None else mixing, gram(vectors), attackers)["x"]


@pytest.mark.parametrize("rule", sorted({*RULES} - {"mean"}))
def test_two_of_eight_do_not_turn_the_result(rule: str) -> None:
    x = rows()
    honest, found = x[2:].mean(0), aggregated(rule, x, 2)
    assert (found - honest).norm() < 0.6 * honest.norm()
    assert aggregated("mean", x, 2) @ honest < 0  # which is what they are for


@pytest.mark.parametrize("rule", RULES)
def test_the_order_does_not_matter_and_equal_vectors_stay(rule: str) -> None:
    x = rows()
    torch.testing.assert_close(aggregated(rule, x.flip(0), 2), aggregated(rule, x, 2))
    same = torch.ones(5, 3)
    torch.testing.assert_close(aggregated(rule, same, 2), same[0])


@pytest.mark.parametrize("rule", RULES)
def test_vectors_of_nothing_and_one_vector(rule: str) -> None:
    assert torch.equal(aggregated(rule, torch.zeros(4, 3), 1), torch.zeros(3))
    torch.testing.assert_close(aggregated(rule, torch.full((1, 3), 2.0), 0), torch.full((3,), 2.0))


@pytest.mark.parametrize("rule", RULES)
def test_half_of_the_vectors_cannot_be_attackers(rule: str) -> None:
    with pytest.raises(ValueError, match="2 attackers of 4"):
        aggregated(rule, rows(4), 2)


def test_the_clip_is_a_norm_of_the_round() -> None:
    x = rows(bad=1)
    products = gram([{"x": row} for row in x])
    factors = clipping(products, 0.5)
    sizes = norms(products)
    assert limit(sizes, 0.5) in sizes.tolist()
    assert factors[0] < 0.05
    assert bool((factors * sizes <= limit(sizes, 0.5) * (1 + 1e-12)).all())
    assert clipping(torch.zeros(3, 3), 0.5).tolist() == [1, 1, 1]


def test_mixing_is_a_mean_of_neighbours() -> None:
    mixing = neighbour_mixing(gram([{"x": row} for row in rows()]), 2)
    torch.testing.assert_close(mixing.sum(1), torch.ones(8, dtype=torch.float64))
    assert not mixing[2:, :2].any()  # nobody honest has an attacker among its neighbours


def test_a_rule_by_coordinate_has_no_coefficients() -> None:
    with pytest.raises(ValueError, match="median goes by coordinate"):
        combination("median", torch.eye(3).double(), 1)


def test_no_row_is_longer_than_the_median_one() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8], [0.0, 1e6]])
    torch.testing.assert_close(shortened(x), torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8], [0.0, 5.0]]))
    assert torch.equal(shortened(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_nobody_gives_more_in_all_than_a_multiple_of_the_median() -> None:
    honest = {"q": 1.0, "v": 3.0}
    loud = {"q": 1e15, "v": 0.0}
    assert capped([honest, loud, honest], 10.0) == [honest, {"q": 40.0, "v": 0.0}, honest]
    assert capped([honest, loud], 10.0) == [honest, loud]
    silent = {"q": 0.0, "v": 0.0}
    assert capped([silent, loud, silent], 1.0) == [silent, loud, silent]
    assert capped([honest, {"q": 0.0, "v": 4.0}, honest], 1.0)[1] == {"q": 0.0, "v": 4.0}  # another profile is no fault


def test_two_agree_on_what_both_want() -> None:
    found = agreement(torch.tensor([1.0, -3.0, 2.0, 0.0]), torch.tensor([2.0, -1.0, -2.0, 5.0]))
    assert found.tolist() == [1, -1, 0, 0]
