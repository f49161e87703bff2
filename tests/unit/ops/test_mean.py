"""Weighted means and the aggregation error, against the explicit formulas."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.ops.mean import aggregation_error, mean, relative_error, share_limit


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mean_is_weighted_and_normalised_once() -> None:
    values = [{"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(4.0)}, {"b": torch.tensor(8.0), "a": torch.zeros(2)}]
    result = mean(values, [3, 1])
    assert list(result) == ["a", "b"]
    assert result["a"].tolist() == [0.75, 1.5]
    assert result["b"].item() == 5.0


def test_mean_of_one_is_that_one() -> None:
    value = {"a": random(3, 4, seed=0).float()}
    assert torch.equal(mean([value], [7.5])["a"], value["a"])


def test_a_weight_of_0_leaves_a_value_out() -> None:
    assert mean([{"a": torch.ones(2)}, {"a": torch.full((2,), 7.0)}], [3, 0])["a"].tolist() == [1, 1]


def test_mean_takes_weights_of_any_scale() -> None:
    values = [{"a": random(5, seed=seed)} for seed in range(3)]
    torch.testing.assert_close(mean(values, [1e-9, 2e-9, 3e-9])["a"], mean(values, [1e9, 2e9, 3e9])["a"])


def test_mean_adds_in_the_order_given() -> None:
    values = [torch.tensor(x) for x in (1e8, -1e8, 1.0, 0.5)]
    expected = torch.tensor(0.0)
    for value in values:
        expected = expected + 0.25 * value
    assert torch.equal(mean([{0: value} for value in values], [1] * 4)[0], expected)
    swapped = mean([{0: values[i]} for i in (2, 0, 3, 1)], [1] * 4)[0]
    assert not torch.equal(swapped, expected)  # float32 addition is not associative: the order is part of the result


def test_mean_leaves_its_inputs_alone() -> None:
    values = [{"a": torch.ones(2)}, {"a": torch.zeros(2)}]
    result = mean(values, [1, 1])
    result["a"].fill_(9)
    assert (values[0]["a"].tolist(), values[1]["a"].tolist()) == ([1, 1], [0, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_mean_keeps_the_dtype_and_sums_in_float32_at_least(dtype: torch.dtype) -> None:
    count = 1000  # summed in bfloat16, 0.001 a time, the sum would stop growing at 0.5 or so
    result = mean([{0: torch.ones(3, dtype=dtype)}] * count, [1.0] * count)[0]
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), torch.ones(3).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("values", "weights", "reason"),
    [
        ([], [], "mean of 0"),
        ([{"a": torch.ones(1)}], [1, 2], "mean of 1"),
        ([{"a": torch.ones(1)}] * 2, [0, 0], "with weights"),
        ([{"a": torch.ones(1)}] * 2, [3, -1], "with weights"),
        ([{"a": torch.ones(1)}] * 2, [1, float("nan")], "with weights"),
        ([{"a": torch.ones(1)}] * 2, [1, float("inf")], "with weights"),
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], [1, 1], "different keys"),
        ([{"a": torch.ones(1)}, {}], [1, 1], "different keys"),
        ([{"a": torch.ones(2, 3)}, {"a": torch.ones(1, 3)}], [1, 1], r"different shapes: a \[\[2, 3\], \[1, 3\]\]"),
        ([{"a": torch.ones(2)}, {"a": torch.ones(())}], [1, 1], "different shapes"),
    ],
    ids=["none", "count", "zero", "negative", "nan", "inf", "keys", "missing", "shape", "broadcast"],
)
def test_mean_refuses(values: list[dict[str, Tensor]], weights: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        mean(values, weights)


def explicit(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[float]) -> tuple[float, float]:
    """The two squared norms with every [d_out, d_in] matrix formed, in float64."""
    total = sum(weights)
    share = [w / total for w in weights]
    products = sum(w * (y.double() @ x.double()) for w, x, y in zip(share, a, b, strict=True))
    a_mean = sum(w * x.double() for w, x in zip(share, a, strict=True))
    b_mean = sum(w * y.double() for w, y in zip(share, b, strict=True))
    assert isinstance(products, Tensor)
    return float((products - b_mean @ a_mean).square().sum()), float(products.square().sum())


@settings(deadline=None, max_examples=60)
@given(
    rank=st.integers(1, 4),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_the_aggregation_error_is_the_explicit_one(
    rank: int, d_in: int, d_out: int, weights: list[float], seed: int, dtype: torch.dtype
) -> None:
    a = [random(rank, d_in, seed=seed + 2 * i).to(dtype) for i in range(len(weights))]
    b = [random(d_out, rank, seed=seed + 2 * i + 1).to(dtype) for i in range(len(weights))]
    found, expected = aggregation_error(a, b, weights), explicit(a, b, weights)
    scale = max(float(y.double().norm() * x.double().norm()) for x, y in zip(a, b, strict=True)) ** 2
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)


@pytest.mark.parametrize("seed", range(8))
def test_the_aggregation_error_is_zero_where_all_share_one_factor(seed: int) -> None:
    a, b = random(4, 12, seed=seed), [random(10, 4, seed=100 * seed + i) for i in range(5)]
    difference, whole = aggregation_error([a] * 5, b, [1, 2, 3, 4, 5])
    assert whole > 1
    assert 0 <= difference <= 1e-12 * whole  # sums that cancel may end just below 0, whose root is no number


def test_the_aggregation_error_of_a_case_by_hand() -> None:
    # BA is [[1]] and [[4]]: mean(BA) = 2.5, mean(B) mean(A) = 1.5^2 = 2.25.
    one, two = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    assert aggregation_error([one, two], [one, two], [1, 1]) == pytest.approx((0.0625, 6.25))
    # With weights 3 : 1: mean(BA) = 1.75, mean(B) mean(A) = 1.25^2.
    assert aggregation_error([one, two], [one, two], [3, 1]) == pytest.approx(((1.75 - 1.5625) ** 2, 1.75**2))


@pytest.mark.parametrize("weights", [[0, 0], [1], [1, -1]], ids=str)
def test_the_aggregation_error_refuses_bad_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="with weights"):
        aggregation_error([torch.ones(1, 2)] * 2, [torch.ones(2, 1)] * 2, weights)


def test_the_relative_error_adds_up_over_modules_before_it_divides() -> None:
    assert relative_error([(1.0, 9.0), (3.0, 16.0)]) == pytest.approx((4 / 25) ** 0.5)
    assert relative_error([(1e-12, 4e-12)]) == pytest.approx(0.5)
    assert relative_error([(0.0, 0.0)]) == 0.0
    assert relative_error([]) == 0.0


@pytest.mark.parametrize(
    ("weights", "share", "limit"),
    [
        ([100, 60, 10**9], 0.5, 160),
        ([10**9, 10**9, 6, 4], 0.4, 20),
        ([10, 10, 10, 10], 0.25, 10),
        ([3, 2, 1], 0.9, 5.4),
    ],
)
def test_at_the_limit_the_largest_have_their_share(weights: list[float], share: float, limit: float) -> None:
    assert share_limit(weights, share) == pytest.approx(limit)


@pytest.mark.parametrize("share", [0.01, 0.33, 0.35, 0.49])
def test_a_share_below_an_equal_one_makes_all_equal_and_no_less(share: float) -> None:
    assert share_limit([36, 36], share) == 36
    assert share_limit([5, 36, 700], min(share, 0.33)) == 5
