"""The clip bounds what one client changes, and the noise is what the accountant was told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import dp_accounting as dp
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from coterie.methods.privacy import PrivacySettings, Released, cut, private_reply
from coterie.methods.robust import Group
from coterie.ops.accounting import Noised, Sampled, multiplier_for, spent
from coterie.ops.noise import SecureNoise, SeededNoise
from coterie.types import NO_EXPERT, Key, Part, Reply

CLIP, Z = 0.5, 2.0
SETTINGS = PrivacySettings(unit="client", clip=CLIP, noise_multiplier=Z, embedding_clip=0.1)
SHARED = [Key("q", 0, Part.A), Key("q", 0, Part.B), Key("head", NO_EXPERT, Part.HEAD)]
OWN = [Key("q", 1, Part.A), Key("q", 1, Part.B)]
MEAN = Key("q", NO_EXPERT, Part.EMBEDDING)
CLIENTS = ("a", "b", "c", "d")
WIDTH = 40_000


def tensors(scale: float, seed: int, width: int = WIDTH) -> dict[Key, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {key: scale * torch.randn(width, generator=random) for key in (*SHARED, *OWN, MEAN)}


def released(changed: Mapping[str, dict[Key, Tensor]], multiplier: float, rate: float = 1.0) -> dict[str, Reply]:
    """What the server makes of clients of whom some sent what is ``changed``; a and b share an expert more."""
    start = tensors(1.0, 0)
    del start[MEAN]
    replies = {c: Reply(sent, 1) for c, sent in changed.items()}
    still = Reply({**start, MEAN: torch.zeros(WIDTH)}, 1)
    everyone = {c: replies.get(c, still) for c in CLIENTS}
    groups = [Group(CLIENTS, frozenset(SHARED)), Group(("a", "b"), frozenset(OWN)), Group(("c", "d"), frozenset(OWN))]
    made = Released(SETTINGS, multiplier, SeededNoise(1), rate)(
        groups, replies, everyone, dict.fromkeys(CLIENTS, start), 1
    )
    assert set(made.replies) >= {"a", "c"}, "whoever did not reply, each group has a member with its result"
    return dict(made.replies)


def sums(made: Mapping[str, Reply]) -> dict[tuple[str, Key], Tensor]:
    """What was released: each group's sum of updates, and each client's own values."""
    start = tensors(1.0, 0)
    found = {("all", key): 4 * (made["a"].tensors[key] - start[key]) for key in SHARED}
    for name in ("a", "c"):
        found |= {(name, key): 2 * (made[name].tensors[key] - start[key]) for key in OWN}
    found |= {(c, MEAN): made[c].tensors[MEAN] for c in made}
    return found


def length(values: list[Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values))


@pytest.mark.parametrize("size", [0.0001, 0.01, 1.0, 1e4])
def test_a_client_that_changes_in_full_moves_all_sums_together_by_no_more_than_the_clip(size: float) -> None:
    start = tensors(1.0, 0)
    rest = {c: {key: value + 0.01 * i for key, value in start.items()} for i, c in enumerate("acd")}
    moved = {key: start.get(key, torch.zeros(())) + value for key, value in tensors(size, 5).items()} | {
        MEAN: tensors(size, 5)[MEAN]
    }
    one = sums(released({**rest, "b": moved}, 0.0))
    other = sums(released({**rest, "b": {**start, MEAN: torch.zeros(WIDTH)}}, 0.0))
    assert one.keys() == other.keys()
    update = length([one[of] - other[of] for of in one if of[1] != MEAN])
    embedding = length([one[of] - other[of] for of in one if of[1] == MEAN])
    assert update <= CLIP * 1.01
    assert embedding <= 0.1 * 1.001
    if size >= 0.01:
        assert update == pytest.approx(CLIP, rel=0.02)
        assert embedding == pytest.approx(0.1, rel=0.001)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_the_noise_of_a_mean_is_the_accountants_over_the_groups_size(rate: float) -> None:
    start = tensors(1.0, 0)
    still = {**start, MEAN: torch.zeros(WIDTH)}
    made = released(dict.fromkeys(CLIENTS, still), Z, rate)
    for keys, members in ((SHARED, 4), (OWN, 2)):
        for key in keys:
            noise = made["a"].tensors[key] - start[key]
            assert float(noise.std()) == pytest.approx(Z * CLIP / (rate * members), rel=0.03)
            assert abs(float(noise.mean())) < 0.05
            assert torch.equal(made["a"].tensors[key], made["b"].tensors[key]), "a group has one result"
    assert not torch.equal(made["a"].tensors[OWN[0]], made["c"].tensors[OWN[0]])
    assert float(made["a"].tensors[MEAN].std()) == pytest.approx(Z * 0.1, rel=0.03)


def test_a_group_of_which_nobody_replied_is_noise_all_the_same() -> None:
    start = tensors(1.0, 0)
    made = released({"a": {**start, MEAN: torch.zeros(WIDTH)}}, Z)
    assert set(made) == {"a", "c"}
    assert float((made["c"].tensors[OWN[0]] - start[OWN[0]]).std()) == pytest.approx(Z * CLIP / 2, rel=0.03)
    assert MEAN in made["a"].tensors
    assert MEAN not in made["c"].tensors, "noise alone must not pass for what a client measured"


def test_a_client_hides_its_whole_reply_itself() -> None:
    start = tensors(1.0, 0)
    sent = {key: start.get(key, torch.zeros(())) + value for key, value in tensors(1.0, 5).items()}
    settings = SETTINGS.model_copy(update={"noise_at": "client"})
    reply = Reply(sent, 17, {"loss": 0.3, "kept": True})
    made = private_reply(settings, Z, reply, start, SecureNoise(), ["kept"], 1, "a")
    assert (made.num_examples, made.info) == (1, {"kept": True})
    clipped = private_reply(settings, 0.0, reply, start, SecureNoise(), [], 1, "a")
    assert length([clipped.tensors[key] - start[key] for key in (*SHARED, *OWN)]) == pytest.approx(CLIP, rel=0.02)
    for key in (*SHARED, *OWN, MEAN):
        std = float((made.tensors[key] - clipped.tensors[key]).std())
        assert std == pytest.approx(Z * (0.1 if key == MEAN else CLIP), rel=0.03)


def test_values_that_are_no_numbers_do_not_lift_the_clip() -> None:
    """A server may send a client tensors in which there are some."""
    start, sent = tensors(1.0, 0), tensors(100.0, 5)
    start[OWN[0]][:2] = torch.tensor([math.nan, math.inf])
    made = cut(SETTINGS, sent, start)
    assert all(bool(value.isfinite().all()) for value in made.values())
    assert length([made[key] for key in (*SHARED, *OWN)]) == pytest.approx(CLIP)


def test_secure_noise_is_normal_and_goes_by_key_and_purpose() -> None:
    source = SecureNoise()
    drawn = source.normal((100_001,), "values", 1)
    assert (float(drawn.mean()), float(drawn.std())) == pytest.approx((0, 1), abs=0.02)
    assert float((drawn.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.006)
    assert float((drawn.abs() > 2).double().mean()) == pytest.approx(0.0455, abs=0.004)
    assert torch.equal(drawn, SecureNoise(source.key).normal((100_001,), "values", 1))
    for other in (SecureNoise().normal((100_001,), "values", 1), source.normal((100_001,), "values", 2)):
        assert abs(float(torch.corrcoef(torch.stack([drawn, other]))[0, 1])) < 0.02


def test_epsilon_is_exact_for_gaussians_and_bounded_by_rdp() -> None:
    made = spent([Noised(3.0)] * 4 + [Noised(2.0)], 1e-5)
    one = (4 / 9 + 1 / 4) ** -0.5
    assert made.epsilon == pytest.approx(dp.get_epsilon_gaussian(one, 1e-5))
    accountant = dp.pld.PLDAccountant(dp.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp.GaussianDpEvent(3.0), 4).compose(dp.GaussianDpEvent(2.0))
    assert made.epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert made.epsilon < made.rdp < 1.3 * made.epsilon


@pytest.mark.parametrize("of", [Noised(1.0), pytest.param(Noised(1.0, "fixed", 100, 10), marks=pytest.mark.slow)])
def test_a_calculated_multiplier_spends_the_budget_and_hardly_less(of: Noised) -> None:
    multiplier = multiplier_for(3.0, 1e-5, (of,) * 5)
    made = [Noised(multiplier, of.sampled, of.members, of.drawn)] * 5
    assert 2.98 < spent(made, 1e-5).epsilon <= 3.0


def test_releases_that_are_alike_once_scaled_are_all_counted() -> None:
    one = 1.5609756097560976
    planned = (*(Noised(one),) * 10, *(Noised(math.nextafter(one, 2)),) * 10)
    multiplier = multiplier_for(3.0, 1e-5, planned)
    assert spent([replace(of, multiplier=multiplier * of.multiplier) for of in planned], 1e-5).epsilon <= 3.0


def test_sampling_amplifies_less_where_a_cohort_has_a_fixed_size() -> None:
    whole, fixed, poisson = (
        spent([Noised(2.0, sampled, 100, 5)] * 10, 1e-5) for sampled in ("all", "fixed", "poisson")
    )
    assert poisson.epsilon < fixed.epsilon < whole.epsilon
    assert (whole.accountant, fixed.accountant, poisson.accountant) == ("exact", "RDP", "PLD")


@pytest.mark.parametrize(
    ("setting", "value"), [("clip", 1e-44), ("clip", 1e30), ("noise_multiplier", 1e300), ("epsilon", 1e9)]
)
def test_numbers_with_which_rounding_decides_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ValidationError, match=setting):
        PrivacySettings(**{"unit": "example", "clip": 1.0, "noise_multiplier": 1.0, setting: value})


@pytest.mark.parametrize("sampled", ["all", "poisson"])
def test_noise_that_hides_nothing_costs_no_memory(sampled: Sampled) -> None:
    none, little = (Noised(of, sampled, 100, 4) for of in (1e-200, 0.05))
    assert spent([none], 1e-5).epsilon == math.inf
    cost = spent([little] * 50, 1e-5)
    assert 100 < cost.epsilon < math.inf
    assert cost.accountant == ("exact" if sampled == "all" else "RDP")
