"""The size of the noise of a secure sum, whoever is left, and its rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from coterie.methods.robust import Group
from coterie.methods.secure_client import Update, vector_of
from coterie.methods.sum_noise import SumNoise
from coterie.ops.noise import SecureNoise, SeededNoise
from coterie.secure import fixed_point
from coterie.secure.session import SecureSumError
from coterie.types import Key, Part
from private_sums import ON, PRIVACY, clients, made, opened
from secure_sums import session

ONE, OTHER, SHARED = Key("a", 0, Part.A), Key("a", 1, Part.A), Key("a", 0, Part.B)
WIDTH = 8_000


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# the size of the noise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("members", "away"), [(6, 0), (6, 2), (9, 3), (3, 0)])
def test_the_sum_has_the_central_noise_where_the_fewest_are_left_less_the_colluding(members: int, away: int) -> None:
    over = clients(members)
    still = {c: {ONE: torch.zeros(WIDTH)} for c in over}
    agreed = opened(
        made("fedsa_lora"), still, [Group(tuple(over), frozenset({ONE}))], {"values": over[:away]}, SecureNoise()
    )
    left, needed = members - away, max(3, math.ceil(2 * members / 3))
    colluding = math.ceil(members / 3) - 1
    mean = agreed.replies[over[-1]].tensors[ONE].double()
    central = PRIVACY.noise_multiplier * PRIVACY.clip
    assert float(mean.std()) * left == pytest.approx(central * math.sqrt(left / (needed - colluding)), rel=0.04)
    if away == members - needed:  # what those that do not collude have added is the central mechanism's
        honest = float(mean.std()) * left * math.sqrt((left - colluding) / left)
        assert honest == pytest.approx(central, rel=0.04)
    assert float(mean.mean()) == pytest.approx(0, abs=5 * float(mean.std()) / math.sqrt(WIDTH))


@pytest.mark.parametrize("threshold", [0.51, 0.6, 2 / 3, 0.9, 1.0])
def test_those_that_are_left_without_the_colluding_always_have_enough_noise(threshold: float) -> None:
    noise = SumNoise(PRIVACY.model_copy(update={"colluding": 2 * threshold - 1}), 1.5)
    for members in range(3, 60):
        of = session(members, threshold=threshold)
        honest = of.needed - noise.colluding(members)
        assert honest >= 1
        assert noise.deviation(members, of.needed) * math.sqrt(honest) == pytest.approx(1.5 * PRIVACY.clip)
        assert noise.colluding(members) < (2 * threshold - 1) * members or noise.colluding(members) == 0
        assert 2 * of.shares_needed(members) - members > noise.colluding(members)  # what the protocol is safe from


def test_a_client_in_many_groups_moves_all_sums_together_by_no_more_than_the_clip() -> None:
    """Without noise: what one client changes, over its groups, with rounding."""
    over = clients(6)
    groups = [
        Group(tuple(over), frozenset({SHARED})),
        Group(tuple(over[:3]), frozenset({ONE})),
        Group(tuple(over[3:]), frozenset({OTHER})),
    ]
    own = {c: ONE if c in over[:3] else OTHER for c in over}
    draw = torch.Generator().manual_seed(0)
    base = {c: {SHARED: 0.001 * torch.randn(500, generator=draw), own[c]: torch.zeros(500)} for c in over}
    large = {SHARED: torch.randn(500, generator=draw), ONE: torch.randn(500, generator=draw)}
    method = made(
        "fedsa_lora", PRIVACY.model_copy(update={"noise_multiplier": 1e-5}), ON.model_copy(update={"bits": 40})
    )
    one = opened(method, {**base, "c00": large}, groups)
    none = opened(method, {**base, "c00": {key: torch.zeros(500) for key in large}}, groups)
    weigh = {SHARED: 6, ONE: 3}
    moved = math.sqrt(
        sum(
            float((n * (one.replies["c01"].tensors[k] - none.replies["c01"].tensors[k]).double()).square().sum())
            for k, n in weigh.items()
        )
    )
    assert moved == pytest.approx(PRIVACY.clip, rel=1e-3)


# rounding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 24, 40])
def test_rounding_makes_no_update_longer_and_noise_is_rounded_whatever_the_update(bits: int) -> None:
    draw = np.random.default_rng(0)
    values = draw.standard_normal(5000)
    values *= 0.5 / np.linalg.norm(values)
    noise = 0.2 * draw.standard_normal(5000)
    still = fixed_point.encode_noisy(values, np.zeros(5000), 4.0, bits)
    rounded = fixed_point.decode(still, 4.0, bits)
    assert np.linalg.norm(rounded) <= np.linalg.norm(values)
    assert (np.abs(rounded - values) <= 4.0 / 2 ** (bits - 1)).all()
    alone = fixed_point.encode_noisy(np.zeros(5000), noise, 4.0, bits)
    assert (fixed_point.encode_noisy(values, noise, 4.0, bits) == still + alone).all()


def test_a_value_beyond_the_range_is_an_error_at_the_site_and_never_a_wrong_sum() -> None:
    of = session(3, length=2 + 2, layout=(f"{ONE} 2",), bound=1.0)

    class Huge(SeededNoise):
        def normal(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
            return torch.full(shape, 1e3, dtype=torch.float64)

    with pytest.raises(SecureSumError, match="does not fit the sum: a value is outside the range"):
        vector_of(Update({ONE: torch.zeros(2)}, 1, False), "s0", of, SumNoise(PRIVACY, 2.0, Huge(0)))
    coarse = replace(of, total=1e13)
    with pytest.raises(SecureSumError, match="too coarse"):
        vector_of(Update({ONE: torch.zeros(2)}, 1, False), "s0", coarse, SumNoise(PRIVACY, 2.0, SeededNoise(0)))


def test_no_value_of_the_secure_source_is_beyond_the_range() -> None:
    """Each of its four draws is at most sqrt(-2 ln 2^-53), and their sum is divided by 2."""
    assert 4 / 2 * math.sqrt(2 * 53 * math.log(2)) < 18
    noise = SumNoise(PRIVACY, 3.0)
    assert noise.bound(16, 11) == PRIVACY.clip + 18 * noise.deviation(16, 11)
