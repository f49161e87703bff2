"""Low-rank products against the full matrices that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coterie.ops.lowrank import Product, compact, decomposed, norm, stacked, truncated
from coterie.ops.streams import stream


def product(rank: int, d_out: int = 7, d_in: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64) -> Product:
    draw = stream(seed, "product", rank)
    return (
        torch.randn(d_out, rank, generator=draw, dtype=dtype),
        torch.randn(rank, d_in, generator=draw, dtype=dtype),
    )


def full(factors: Product) -> Tensor:
    return factors[0] @ factors[1]


def test_a_stack_is_the_weighted_sum() -> None:
    products = [product(rank, seed=i) for i, rank in enumerate((2, 3, 1))]
    made = stacked(products, [0.5, 0.3, -0.2])
    assert made[0].shape == (7, 6)
    torch.testing.assert_close(full(made), sum(w * full(p) for w, p in zip([0.5, 0.3, -0.2], products, strict=True)))


@pytest.mark.parametrize("rank", [1, 3, 6, 12])
def test_the_decomposition_is_that_of_the_full_matrix(rank: int) -> None:
    made = product(rank)
    u, s, vt = decomposed(made)
    torch.testing.assert_close(u @ torch.diag(s) @ vt, full(made))
    torch.testing.assert_close(s, torch.linalg.svdvals(full(made))[: len(s)])
    assert len(s) == min(rank, 7)
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


def test_truncation_is_the_nearest_product_of_the_rank() -> None:
    made = product(6)
    cut = truncated(made, 2)
    assert (cut[0].shape, cut[1].shape) == ((7, 2), (2, 9))
    rest = torch.linalg.svdvals(full(made))[2:]
    assert float((full(made) - full(cut)).norm()) == pytest.approx(float(rest.norm()))


def test_truncation_to_a_larger_rank_pads_with_zeros() -> None:
    made = product(2, dtype=torch.float32)
    cut = truncated(made, 5)
    assert cut[0].dtype is torch.float32
    assert (cut[0].shape, cut[1].shape) == ((7, 5), (5, 9))
    assert not cut[0][:, 2:].any()
    torch.testing.assert_close(full(cut), full(made))


def test_a_product_of_nothing() -> None:
    nothing = torch.zeros(7, 2), torch.zeros(2, 9)
    assert not full(truncated(nothing, 2)).any()
    assert norm(nothing) == 0


def test_compacting_keeps_the_product_and_bounds_the_rank() -> None:
    wide = product(20)
    assert compact(wide)[0].shape == (7, 7)
    torch.testing.assert_close(full(compact(wide)), full(wide))
    assert compact(product(3))[0].shape == (7, 3)


def test_the_norm_is_frobenius() -> None:
    assert norm(product(4)) == pytest.approx(float(full(product(4)).norm()))


def test_a_rank_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="rank 0"):
        truncated(product(2), 0)


def test_the_strides_of_a_single_column_change_no_bit() -> None:
    """One column has many contiguous strides: what came over a network has others than what trained."""
    for seed in range(20):
        b, a = product(1, 64, 48, seed=seed)
        other = b.as_strided(b.shape, (1, 64)), a.as_strided(a.shape, (1, 1))
        assert all(torch.equal(one, same) for one, same in zip(other, (b, a), strict=True))
        assert norm(other) == norm((b, a))
        assert all(torch.equal(*pair) for pair in zip(decomposed(other), decomposed((b, a)), strict=True))
