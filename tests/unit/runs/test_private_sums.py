"""Noise in secure sums: its size whoever is left, the sums themselves, what is refused, and what is counted."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pools
import short_runs
from coterie.config.load import check_config
from coterie.methods.base import Method
from coterie.methods.plan import Plan
from coterie.methods.privacy import PrivacySettings
from coterie.methods.registry import method_named, methods
from coterie.methods.robust import Group
from coterie.methods.secure import Members, SecureAggregationSettings, refusal, sessions_of
from coterie.methods.secure_client import Update, vector_of
from coterie.methods.secure_start import Begun
from coterie.methods.sum_noise import SumNoise, sum_noise
from coterie.ops.accounting import Noised, spent
from coterie.ops.noise import SecureNoise, SeededNoise
from coterie.runs.agreed import Agreed
from coterie.runs.events import Note, RoundDone
from coterie.runs.ledger import read_ledger
from coterie.runs.rounds import Runner
from coterie.runs.secure import Simulated, noise_of, simulated, summed
from coterie.runs.settings import RoundSettings
from coterie.secure import fixed_point
from coterie.secure.session import SecureSumError, Session
from coterie.secure.steps import STEPS, Ask, in_process
from coterie.types import CoterieError, Instruction, Key, Part, Reply
from few_rounds import OPTIM, SETTINGS
from secure_sums import session, vanishing

ON = SecureAggregationSettings(enabled=True)
PRIVACY = PrivacySettings(unit="client", noise_at="sum", clip=0.5, noise_multiplier=2.0, noise_source="seeded")
SIX = ("mood-0", "mood-1", "mood-2", "size-0", "size-1", "place-0")
THREE = SIX[:3]
WITH: dict[str, dict[str, Any]] = {
    "fedlease": {"allocation": "random", "max_experts": 2, "experts": 2, "warmup_rounds": 1},
    "fedamole": {"assignment": "static", "clients_per_expert": 3, "experts": 4, "max_experts": 4},
}
BOTH = ["fdlora", "fedamole", "feddpa", "fedit", "fedlease", "fedprox", "fedsa_lora", "ffa_lora", "rolora", "smartfed"]
ONE, OTHER, SHARED = Key("a", 0, Part.A), Key("a", 1, Part.A), Key("a", 0, Part.B)
WIDTH = 8_000


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def made(name: str, privacy: PrivacySettings = PRIVACY, secure: SecureAggregationSettings = ON) -> Method[Any]:
    kind = method_named(name)
    pool = {"pool": pools.for_tiny()} if name == "smartfed" else {}
    plan = Plan(rank=2, alpha=4, dropout=0.0, optim=OPTIM, rounds=2, secure=secure, privacy=privacy)
    return kind(kind.Settings(**{**SETTINGS.get(name, {}), **WITH.get(name, {}), **pool}), plan)


def gone(opener: Simulated, away: Mapping[str, Collection[str]]) -> Simulated:
    class Vanishing(Simulated):
        def ask(self, parties: Any) -> Ask:
            return vanishing(in_process(parties), away)

    return Vanishing(opener.settings, noise=opener.noise)


def opened(
    method: Method[Any],
    moved: Mapping[str, Mapping[Key, Tensor]],
    groups: Sequence[Group],
    away: Mapping[str, Collection[str]] | None = None,
    source: Any = None,
) -> Agreed:
    """What sums of ``groups`` make of clients that moved from 0 as far as ``moved``."""
    replies = {c: Reply(dict(tensors), 1) for c, tensors in moved.items()}
    starts = {c: {key: torch.zeros_like(value) for key, value in of.items()} for c, of in moved.items()}
    sent = {c: Instruction() for c in replies}
    opener = simulated(method)
    assert opener.noise is not None
    opener = gone(replace(opener, noise=replace(opener.noise, source=source or opener.noise.source)), away or {})
    return summed(method, opener, groups, replies, starts, sent, dict.fromkeys(replies, 1), 1)


def clients(number: int) -> list[str]:
    return [f"c{i:02d}" for i in range(number)]


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


@pytest.mark.parametrize("members", range(3, 60))
@pytest.mark.parametrize("threshold", [0.51, 0.6, 2 / 3, 0.9, 1.0])
def test_those_that_are_left_without_the_colluding_always_have_enough_noise(members: int, threshold: float) -> None:
    noise = SumNoise(PRIVACY.model_copy(update={"colluding": 2 * threshold - 1}), 1.5)
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


# runs ----------------------------------------------------------------------------------------------------------------


def run(
    method: Method[Any], folder: Path, sums: Any = None, rounds: int = 1, over: Sequence[str] = THREE
) -> tuple[Any, list[Any]]:
    folder.mkdir(exist_ok=True)
    engine = short_runs.engine_of(short_runs.clients(*over), folder)
    heard: list[Any] = []
    settings = RoundSettings(rounds, 0, quorum=0.1, export="last")
    return Runner(method, engine, settings, folder, heard.append, sums=sums).run(), heard


def test_a_sum_is_the_plain_sum_of_cut_updates_and_seeded_noise_to_the_grid(tmp_path: Path) -> None:
    plain = made("fedit", PrivacySettings(), SecureAggregationSettings())
    engine = short_runs.engine_of(short_runs.clients(*THREE), tmp_path)
    state = plain.init(engine.spec, engine.clients)
    instructions = plain.configure(state, engine.clients, 1)
    replies = {c: d.reply for c, d in engine.train(plain, instructions, 1) if d.reply}
    method = made("fedit")
    noise = noise_of(method)
    assert noise is not None
    own = noise.deviation(3, 3)
    expected = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in state.lora.items()}
    for c, reply in replies.items():
        update = {key: reply.tensors[key].double() - state.lora[key].double() for key in expected}
        length = math.sqrt(sum(float(value.square().sum()) for value in update.values()))
        for key, value in update.items():
            drawn = SeededNoise(0).normal(tuple(value.shape), "round 1", c, str(key))
            expected[key] += (min(1.0, PRIVACY.clip / length) * value + own * drawn) / 3
    found, heard = run(method, tmp_path / "run")
    assert len(expected) >= 4
    for key, value in expected.items():
        assert torch.allclose(found.lora[key].double(), state.lora[key].double() + value, atol=1e-6), key
    (done,) = [event for event in heard if isinstance(event, RoundDone)]
    assert all(of.shortened == 0 for of in (done.sums or {}).values()), "who was cut is not opened"
    assert not [event for event in heard if isinstance(event, Note) and "shortened" in event.text]
    for entry in done.clients.values():
        assert entry.loss is None


@pytest.mark.parametrize("name", ["fedamole", "fedlease", "smartfed"])
def test_methods_with_groups_and_statistics_of_their_own_run_with_both(name: str, tmp_path: Path) -> None:
    method = made(name)
    _, heard = run(method, tmp_path / "run", rounds=2, over=SIX)
    done = [event for event in heard if isinstance(event, RoundDone)]
    assert len(done) == 2
    assert all(of.error is None for event in done for of in (event.sums or {}).values())
    assert any(event.sums for event in done)
    assert {entry.kind for entry in read_ledger(tmp_path / "run").entries} == {"updates"}
    said = {name for event in done for entry in event.clients.values() for name in entry.said}
    assert said <= {"active"}, "a budget says nothing of rows"


@pytest.mark.parametrize("step", STEPS)
def test_two_of_six_may_vanish_in_any_step(step: str) -> None:
    over = clients(6)
    still = {c: {ONE: torch.zeros(50)} for c in over}
    agreed = opened(made("fedsa_lora"), still, [Group(tuple(over), frozenset({ONE}))], {step: over[:2]})
    (of,) = (agreed.sums or {}).values()
    left = over[2:] if step in ("keys", "shares", "values") else over
    assert of.error is None
    assert list(of.survivors) == left
    own = 2.0 * 0.5 / math.sqrt(3)
    drawn = [SeededNoise(0).normal((50,), "round 1", c, str(ONE)) for c in left]
    expected = own * torch.stack(drawn).mean(0)
    assert torch.allclose(agreed.replies[over[-1]].tensors[ONE].double(), expected, atol=1e-6)


def test_what_is_never_opened_is_counted_all_the_same(tmp_path: Path) -> None:
    method = made("fedit")
    state, heard = run(method, tmp_path / "run", gone(simulated(method), {"reveal": SIX[:1]}))
    (done,) = [event for event in heard if isinstance(event, RoundDone)]
    assert "are needed" in str(next(iter((done.sums or {}).values())).error)
    assert [entry.noised for entry in read_ledger(tmp_path / "run").entries] == [Noised(2.0)]
    assert all(torch.isfinite(value).all() for value in state.lora.values())


class KilledError(Exception):
    pass


def test_a_round_that_is_done_again_has_other_noise_and_is_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = made("fedit", PRIVACY.model_copy(update={"noise_source": "secure"}))
    commit, states = Runner._commit, []

    def killed(self: Runner[Any], state: Any, rnd: int) -> Any:
        if rnd == 2:
            states.append(state)
            raise KilledError
        return commit(self, state, rnd)

    monkeypatch.setattr(Runner, "_commit", killed)
    with pytest.raises(KilledError):
        run(method, tmp_path / "run", rounds=2)
    monkeypatch.setattr(Runner, "_commit", commit)
    state, _ = run(method, tmp_path / "run", rounds=2)
    entries = read_ledger(tmp_path / "run").entries
    assert [entry.round for entry in entries] == [1, 2, 2]
    assert len({entry.name for entry in entries}) == 3
    key = min(state.lora)
    assert not torch.equal(state.lora[key], states[0].lora[key])
    assert read_ledger(tmp_path / "run").spent(1e-5).epsilon == spent([Noised(2.0)] * 3, 1e-5).epsilon


@pytest.mark.parametrize("unit", ["example", "client"])
def test_noise_of_each_client_may_be_summed(unit: str, tmp_path: Path) -> None:
    """Of rows, or the whole noise of each client: what is made from it costs nothing."""
    settings = {"unit": unit, "noise_at": "client"}
    hidden, _ = run(made("fedit", PRIVACY.model_copy(update=settings)), tmp_path / "sums")
    open_, _ = run(made("fedit", PRIVACY.model_copy(update=settings), SecureAggregationSettings()), tmp_path / "open")
    assert all(torch.allclose(hidden.lora[key], value, atol=2e-6) for key, value in open_.lora.items())
    assert read_ledger(tmp_path / "sums") == read_ledger(tmp_path / "open")


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("privacy", "secure", "says"),
    [
        ({"noise_at": "server"}, {}, 'set noise_at = "sum"'),
        ({}, {"enabled": False}, "set [secure_aggregation] enabled = true"),
        ({"colluding": 0.4}, {}, "raise [secure_aggregation] threshold"),
        ({}, {"threshold": 0.6}, "protect from fewer than 0.2 of their clients"),
        ({}, {"bits": 50}, "bits = 48 or less"),
        ({}, {}, ""),
        ({"colluding": 0.2}, {"threshold": 0.6}, ""),
        ({"noise_at": "client"}, {}, ""),
        ({"unit": "example", "noise_at": "server"}, {}, ""),
    ],
)
def test_what_would_not_hold_is_refused_with_the_setting_that_helps(
    privacy: dict[str, Any], secure: dict[str, Any], says: str
) -> None:
    raw = {
        "data": {"folder": "x"},
        "lora": {"dropout": 0.0},
        "run": {"export": "last"},
        "method": {"name": "fedit"},
        "privacy": {"unit": "client", "noise_at": "sum", "clip": 1.0, "noise_multiplier": 1.0, **privacy},
        "secure_aggregation": {"enabled": True, **secure},
    }
    if not says:
        check_config(raw).make_method(Path())
        return
    with pytest.raises(CoterieError) as refused:
        check_config(raw).make_method(Path())
    assert says in str(refused.value)


def test_a_grid_that_is_too_coarse_for_the_noise_is_refused_at_the_start(tmp_path: Path) -> None:
    small = PRIVACY.model_copy(update={"noise_multiplier": 0.001})
    with pytest.raises(CoterieError, match=r"bits = 16: the noise of a client in a sum over 3 is .* raise bits"):
        run(made("fedit", small, ON.model_copy(update={"bits": 16})), tmp_path / "run")


def test_methods_run_with_both_if_they_run_with_each() -> None:
    alone = {
        n for n in methods() if n not in ("local",) and not refusal(ON, made(n, PrivacySettings()).releases(), False)
    }
    assert alone - {"ifca"} == {*BOTH}
    assert sum_noise(PrivacySettings(), (), 1) is None


def test_the_mean_that_liars_can_send_is_bounded_by_clip_and_noise() -> None:
    over = clients(6)
    method = made("fedsa_lora")

    class Lying(Simulated):
        def ask(self, parties: Any) -> Ask:
            honest = parties["c00"].vector

            def lie(of: Session) -> fixed_point.Integers:
                return honest(of) + fixed_point.encode(np.array([8.0, *[0.0] * (of.length - 1)]), of.bound, of.bits)

            parties["c00"].vector = lie
            return in_process(parties)

    opener = simulated(method)
    replies = {c: Reply({ONE: torch.zeros(4)}, 1) for c in over}
    starts = {c: {ONE: torch.zeros(4)} for c in over}
    group = [Group(tuple(over), frozenset({ONE}))]
    sent = {c: Instruction(starts[c]) for c in over}
    agreed = summed(method, Lying(ON, noise=opener.noise), group, replies, starts, sent, dict.fromkeys(over, 1), 1)
    assert [str(of.error)[:11] for of in (agreed.sums or {}).values()] == ["its mean is"]
    made_of = sessions_of(ON, group, _members(replies, starts), True, "run", opener.noise)["1"]
    assert opener.noise is not None
    assert opener.noise.longest(made_of, 6) < 12


def _members(replies: Any, starts: Any) -> Members:
    return Members(1, replies, starts, dict.fromkeys(replies, Begun({}, "", "")), dict.fromkeys(replies, 1))
