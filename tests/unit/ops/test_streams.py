"""Random streams: pinned values, independence, and no trace in the global state."""

import hashlib
import math

import pytest
import torch
from torch import Tensor, nn

from coterie.ops.streams import kaiming_uniform, stream, stream_seed

PINNED = {
    (0,): (2033344993903900207, [1028413, 35530, 325422, 652944]),
    (0, 3, "client-7", "batches"): (1020154252168996277, [349292, 999532, 207548, 167402]),
    (2**40, "A", "encoder.layer.0.attention.self.query"): (
        2281203619154213231,
        [100795, 506260, 883054, 41927],
    ),
}


def draws(*purpose: str | int, count: int = 4096) -> Tensor:
    seed, *rest = purpose
    return torch.rand(count, generator=stream(int(seed), *rest))


@pytest.mark.parametrize("purpose", PINNED, ids=str)
def test_known_values(purpose: tuple[int, ...]) -> None:
    seed, numbers = PINNED[purpose]
    assert stream_seed(*purpose) == seed
    # A wide range would be drawn otherwise by old versions of torch.
    assert torch.randint(0, 2**20, (4,), generator=stream(*purpose)).tolist() == numbers


def test_a_seed_is_the_head_of_a_sha256() -> None:
    digest = hashlib.sha256(b"5\x1f1\x1fa\x1fbatches").digest()
    assert stream_seed(5, 1, "a", "batches") == int.from_bytes(digest[:8], "little") // 2


def test_the_same_purpose_gives_the_same_draws_and_no_generator_is_shared() -> None:
    first = stream(1, 2, "a")
    torch.rand(10, generator=first)
    assert torch.equal(draws(1, 2, "a"), draws(1, 2, "a"))
    assert not torch.equal(torch.rand(4, generator=first), draws(1, 2, "a", count=4))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, 1, "a", "batches"), (1, 1, "a", "batches")),
        ((0, 1, "a", "batches"), (0, 2, "a", "batches")),
        ((0, 1, "a", "batches"), (0, 1, "b", "batches")),
        ((0, 1, "a", "batches"), (0, 1, "a", "dropout")),
        ((0, 1, 2), (0, 12)),
        ((0, "ab", "c"), (0, "a", "bc")),
        ((1, 2), (12,)),
        ((0, "a", "b"), (0, "b", "a")),
    ],
    ids=str,
)
def test_other_purposes_give_independent_draws(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    pair = torch.stack([draws(*one), draws(*other)]).double()
    assert not torch.equal(pair[0], pair[1])
    assert abs(torch.corrcoef(pair)[0, 1].item()) < 4 / math.sqrt(pair.shape[1])


def test_many_streams_start_apart() -> None:
    purposes = [(0, rnd, f"client-{c}", what) for rnd in range(20) for c in range(20) for what in ("train", "drop")]
    starts = {tuple(draws(*purpose, count=2).tolist()) for purpose in purposes}
    assert len(starts) == len(purposes) == 800


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = kaiming_uniform((3, 5), stream(0, "A"))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(kaiming_uniform((3, 5), stream(0, "A")), one)


@pytest.mark.parametrize("d_in", [1, 7, 384])
def test_kaiming_uniform_fills_its_interval(d_in: int) -> None:
    bound = 1 / math.sqrt(d_in)
    values = kaiming_uniform((3000, d_in), stream(0, "A"))
    assert (values.shape, values.dtype) == ((3000, d_in), torch.float32)
    assert values.abs().max() <= bound * (1 + 1e-6)
    assert values.min() < -0.99 * bound
    assert values.max() > 0.99 * bound
    assert abs(values.double().mean()) < 4 * bound / math.sqrt(3 * values.numel())
    assert values.double().var().item() == pytest.approx(bound**2 / 3, rel=0.05)


def test_kaiming_uniform_is_torchs_own() -> None:
    expected = nn.init.kaiming_uniform_(torch.empty(8, 384), a=math.sqrt(5), generator=stream(0, "A"))
    torch.testing.assert_close(kaiming_uniform((8, 384), stream(0, "A")), expected, rtol=1e-6, atol=0)


def test_kaiming_uniform_is_float32_whatever_the_default() -> None:
    expected = kaiming_uniform((2, 3), stream(0, "A"))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(kaiming_uniform((2, 3), stream(0, "A")), expected)
    finally:
        torch.set_default_dtype(torch.float32)
