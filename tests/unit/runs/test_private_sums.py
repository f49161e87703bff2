"""Runs with noise in secure sums: the sums themselves, what is refused, and what is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import short_runs
from coterie.config.load import check_config
from coterie.methods.base import Method
from coterie.methods.privacy import PrivacySettings
from coterie.methods.registry import methods
from coterie.methods.robust import Group
from coterie.methods.secure import Members, SecureAggregationSettings, refusal, sessions_of
from coterie.methods.secure_start import Begun
from coterie.methods.sum_noise import sum_noise
from coterie.ops.accounting import Noised, spent
from coterie.ops.noise import SeededNoise
from coterie.runs.events import Note, RoundDone
from coterie.runs.ledger import read_ledger
from coterie.runs.rounds import Runner
from coterie.runs.secure import Simulated, noise_of, simulated, summed
from coterie.runs.settings import RoundSettings
from coterie.secure import fixed_point
from coterie.secure.session import Session
from coterie.secure.steps import STEPS, Ask, in_process
from coterie.types import CoterieError, Instruction, Key, Part, Reply
from private_sums import ON, PRIVACY, clients, gone, made, opened

SIX = ("mood-0", "mood-1", "mood-2", "size-0", "size-1", "place-0")
THREE = SIX[:3]
BOTH = ["fdlora", "fedamole", "feddpa", "fedit", "fedlease", "fedprox", "fedsa_lora", "ffa_lora", "rolora", "smartfed"]
ONE, OTHER = Key("a", 0, Part.A), Key("b", 0, Part.A)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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


def test_what_is_in_no_sum_stays_as_it_was() -> None:
    over = clients(4)
    moved = {c: {ONE: torch.ones(4), OTHER: torch.ones(4)} for c in over}
    agreed = opened(made("fedsa_lora"), moved, [Group(tuple(over[:3]), frozenset({ONE}))])
    assert len(agreed.replies) == 4
    for reply in agreed.replies.values():
        assert torch.equal(reply.tensors[OTHER], torch.zeros(4)), "an update without noise"
    assert torch.equal(agreed.replies[over[3]].tensors[ONE], torch.zeros(4))
    assert agreed.notes == [f"tensors of {c} are in no secure sum, and stay as they were" for c in over]


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
    small = PRIVACY.model_copy(update={"noise_multiplier": 0.001, "epsilon": 1e5})
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
