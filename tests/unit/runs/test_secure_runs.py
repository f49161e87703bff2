"""Secure sums in a simulation: the same averages as in the clear, refusals, and what a run says of its sums."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pools
import short_runs
from coterie.config.load import check_config
from coterie.methods.base import Method
from coterie.methods.plan import Plan
from coterie.methods.registry import method_named, methods
from coterie.methods.robust import Group
from coterie.methods.secure import Members, SecureAggregationSettings, refusal
from coterie.runs.agreed import Agreed
from coterie.runs.events import Note, RoundDone
from coterie.runs.rounds import Runner
from coterie.runs.secure import Simulated, summed
from coterie.runs.settings import RoundSettings
from coterie.secure import fixed_point
from coterie.secure.fixed_point import Integers
from coterie.secure.steps import Ask, Party, in_process
from coterie.types import CoterieError, Instruction, Key, Part, Reply
from few_rounds import OPTIM, ROUNDS, SETTINGS
from secure_sums import vanishing

ON = SecureAggregationSettings(enabled=True)
WITH: dict[str, dict[str, Any]] = {
    "fedlease": {"allocation": "random", "max_experts": 2, "experts": 2, "warmup_rounds": 1},
    "fedamole": {"assignment": "static", "clients_per_expert": 3, "experts": 4, "max_experts": 4},
    "ifca": {"clusters": 1},
}
REFUSED = {"centralised", "fedalt", "fedex_lora", "flexlora", "flora", "hetlora", "local"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def made(name: str, secure: SecureAggregationSettings, **settings: Any) -> Method[Any]:
    kind = method_named(name)
    pool = {"pool": pools.for_tiny()} if name == "smartfed" else {}
    plan = Plan(rank=2, alpha=4, dropout=0.1, optim=OPTIM, rounds=ROUNDS, secure=secure)
    return kind(kind.Settings(**{**SETTINGS.get(name, {}), **WITH.get(name, {}), **pool, **settings}), plan)


def leaves(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors in a state, by where they are."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, Mapping):
        return {k: v for name, each in value.items() for k, v in leaves(each, f"{path}/{name}").items()}
    fields = getattr(value, "__dataclass_fields__", {})
    return {k: v for name in fields for k, v in leaves(getattr(value, name), f"{path}/{name}").items()}


def run(
    method: Method[Any], folder: Path, over: Collection[str], sums: Any = None, rounds: int = 1
) -> tuple[Any, list[Any]]:
    folder.mkdir()
    engine = short_runs.engine_of(short_runs.clients(*over), folder)
    heard: list[Any] = []
    settings = RoundSettings(rounds, 0, quorum=0.1, update_bound=1e9)
    return Runner(method, engine, settings, folder, heard.append, sums=sums).run(), heard


SIX = ("mood-0", "mood-1", "mood-2", "size-0", "size-1", "place-0")


@pytest.mark.parametrize(
    ("name", "more"), [*((name, {}) for name in sorted(methods().keys() - REFUSED)), ("smartfed", {"router": "signed"})]
)
def test_sums_are_those_of_plain_averaging_up_to_the_grid(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    # FedLEASE's clusters share a router from round 2 on; another round of training spreads the last bits' differences.
    rounds, tolerance = (2, 1e-3) if name == "fedlease" else (1, 2e-6)
    more = {**more, "budgets": {}} if more else no_usage(name)
    plain, _ = run(made(name, SecureAggregationSettings(), **more), tmp_path / "plain", SIX, rounds=rounds)
    more.pop("quota", None)
    hidden, heard = run(made(name, ON, **more), tmp_path / "hidden", SIX, rounds=rounds)
    mine, theirs = leaves(hidden), leaves(plain)
    compared = [path for path in theirs if "distances" not in path]
    assert len(compared) >= 4
    for path in compared:
        assert torch.allclose(mine[path], theirs[path], atol=tolerance, rtol=0), path
    done = [event for event in heard if isinstance(event, RoundDone)]
    assert len(done) == rounds
    assert all(event.sums for event in done)
    for event in done:
        assert all(of.error is None and len(of.survivors) == len(of.members) for of in (event.sums or {}).values())
        assert "aggregation_error" not in event.describe
        assert all(entry.loss is None for entry in event.clients.values())


def no_usage(name: str) -> dict[str, Any]:
    """What secure sums do without, so that a run in the clear is the same."""
    return {"quota": "uniform"} if name == "smartfed" else {}


def gone(step: str, away: Collection[str], settings: SecureAggregationSettings = ON) -> Simulated:
    class Vanishing(Simulated):
        def ask(self, parties: Any) -> Ask:
            return vanishing(in_process(parties), {step: away})

    return Vanishing(settings)


@pytest.mark.parametrize("step", ["keys", "shares", "values", "survivors", "reveal"])
def test_clients_that_vanish_are_left_out_and_named(step: str, tmp_path: Path) -> None:
    _, heard = run(made("fedit", ON), tmp_path / "run", SIX, gone(step, SIX[:2]))
    for event in (event for event in heard if isinstance(event, RoundDone)):
        ((_, of),) = (event.sums or {}).items()
        early = step in ("keys", "shares", "values")
        assert of.error is None
        assert set(of.members) - set(of.survivors) == (set(SIX[:2]) if early else set())
        assert event.failed == {c: f"gone before the step '{step}' of its secure sum" for c in SIX[:2] if early}


def test_a_sum_with_too_few_clients_is_not_opened_and_the_run_says_so(tmp_path: Path) -> None:
    method = made("fedit", ON)
    state, heard = run(method, tmp_path / "run", SIX, gone("values", SIX[:3]))
    started = method.init(short_runs.loaded("classification")[0].spec, [])
    assert all(torch.allclose(state.lora[key], value, atol=1e-7) for key, value in started.lora.items())
    notes = [event.text for event in heard if isinstance(event, Note) and "sum" in event.text]
    assert len(notes) == 1
    assert "was not opened: 3 of its 6 sites were left after the step 'values', and 4 are needed" in notes[0]


def test_updates_that_are_too_long_are_shortened_and_counted(tmp_path: Path) -> None:
    settings = replace_settings(clip=1e-3)
    state, heard = run(made("fedit", settings), tmp_path / "run", SIX[:3])
    started = made("fedit", settings).init(short_runs.loaded("classification")[0].spec, [])
    moved = sum(float((state.lora[k] - v).square().sum()) for k, v in started.lora.items()) ** 0.5
    assert moved == pytest.approx(1e-3, rel=0.5)
    notes = [event.text for event in heard if isinstance(event, Note)]
    assert [text for text in notes if "shortened" in text] == [
        "updates are shortened before they are added up: 3 of 3 of this round were longer than [secure_aggregation] "
        "clip = 0.001; if they are honest, raise it"
    ]


def replace_settings(**changes: Any) -> SecureAggregationSettings:
    return ON.model_copy(update=changes)


@pytest.mark.parametrize("name", sorted(methods()))
def test_methods_that_need_values_by_client_are_refused_with_an_alternative(name: str) -> None:
    needs = name in REFUSED | {"fedlease", "fedamole"}  # with their defaults
    fault = refusal(ON, made(name, ON, **DEFAULTS.get(name, {})).releases(), robust=False)
    assert bool(fault) == needs
    if fault:
        assert "leave [secure_aggregation] out" in fault
        assert "set " in fault or "choose " in fault or "nothing" in fault


DEFAULTS: dict[str, dict[str, Any]] = {"fedlease": {"allocation": "learned"}, "fedamole": {"assignment": "dynamic"}}


def test_robust_rules_are_refused_with_the_bound_that_is_left() -> None:
    raw: dict[str, Any] = {
        "data": {"folder": "x"},
        "method": {"name": "fedit"},
        "secure_aggregation": {"enabled": True},
    }
    check_config(raw).make_method(Path())
    with pytest.raises(CoterieError, match=r"does not work with fedit here: \[robust\] compares .* is not caught"):
        check_config({**raw, "robust": {"rule": "median"}}).make_method(Path())
    with pytest.raises(CoterieError, match=r'clients are clustered by them; set .*allocation = "oracle"'):
        check_config({**raw, "method": {"name": "fedlease"}}).make_method(Path())


def test_groups_that_are_never_opened_and_sums_that_overflow_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=r"sum over mood-0, mood-1 would never be opened: 3 clients are needed"):
        run(made("fedit", ON), tmp_path / "two", SIX[:2])
    with pytest.raises(CoterieError, match=r"bits = 63: 6 such values could overflow 64 bits; set bits to 60 or less"):
        run(made("fedit", replace_settings(bits=63)), tmp_path / "wide", SIX)


def test_a_vector_is_masked_on_its_way(tmp_path: Path) -> None:
    """What the server's driver receives in the step of the values is nothing like the values."""
    seen: list[bytes] = []

    class Listening(Simulated):
        def ask(self, parties: Any) -> Ask:
            inner = in_process(parties)

            def asked(step: str, messages: Mapping[str, bytes]) -> Mapping[str, bytes]:
                answers = inner(step, messages)
                seen.extend(answers.values() if step == "values" else ())
                return answers

            return asked

    run(made("fedit", ON), tmp_path / "run", SIX[:3], Listening(ON))
    assert len(seen) == 3
    for blob in seen:
        high = torch.frombuffer(bytearray(blob[-800:]), dtype=torch.uint8).double()
        assert 90 < float(high.mean()) < 165  # bytes as random ones; those of small integers are 0 or 255


ONE, OTHER = Key("a", 0, Part.A), Key("b", 0, Part.A)
GROUPS = [Group(("a", "b", "c"), frozenset({ONE})), Group(("d", "e", "f"), frozenset({OTHER}))]


def two_groups(lie: Callable[[Integers], Integers], method: Method[Any], liar: str = "a") -> Agreed:
    """The sums over a, b, c and over d, e, f, all of whose tensors went from 0 to 1; the liar changes its vector."""

    class Lying(Simulated):
        def ask(self, parties: Mapping[str, Party]) -> Ask:
            honest = parties[liar].vector
            parties[liar].vector = lambda session: lie(honest(session).copy())
            return in_process(parties)

    replies = {c: Reply({ONE if c in "abc" else OTHER: torch.ones(3)}, 10) for c in "abcdef"}
    starts = {c: {key: torch.zeros(3) for key in reply.tensors} for c, reply in replies.items()}
    sent = {c: Instruction(starts[c]) for c in replies}
    opener = Lying(ON)
    return summed(method, opener, GROUPS, replies, starts, sent, dict.fromkeys(replies, 10), 1)


def placed(at: int, value: float) -> Callable[[Integers], Integers]:
    def lie(vector: Integers) -> Integers:
        vector[at] = fixed_point.encode(np.array([value]), ON.clip, ON.bits)[0]
        return vector

    return lie


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (placed(-2, -90.0), "its weights add up to"),
        (placed(-2, (-2 / 3 + 1e-9) * 100), "its weights add up to 1.0"),
        (placed(-2, 34.0), "its weights add up to"),
        (placed(0, 100.0), "its mean is 101 long, and no client may send more than 100"),
    ],
)
def test_one_lying_site_spoils_its_own_sum_at_most_and_not_beyond_clip(lie: Any, reason: str) -> None:
    agreed = two_groups(lie, made("fedsa_lora", ON))
    mine, theirs = (agreed.sums or {}).values()
    assert reason in str(mine.error)
    assert theirs.error is None
    assert agreed.replies["b"].tensors[ONE].tolist() == [0, 0, 0]
    assert torch.allclose(agreed.replies["e"].tensors[OTHER], torch.ones(3))


def test_a_client_that_another_group_limits_is_weighed_as_it_weighs_itself() -> None:
    """``[run] max_share`` leaves it 10 of its 50 examples, and the session allows 20: it counts for 20."""
    replies = {c: Reply({ONE: torch.full((3,), float(v))}, n) for c, v, n in (("a", 1, 10), ("b", 0, 20), ("c", 0, 20))}
    starts = {c: {ONE: torch.zeros(3)} for c in replies}
    sent, has = {c: Instruction(starts[c]) for c in replies}, {"a": 50, "b": 20, "c": 20}
    opener = Spoken(ON, has=has)
    agreed = summed(made("fedsa_lora", ON), opener, GROUPS[:1], replies, starts, sent, has, 1)
    assert [of.error for of in (agreed.sums or {}).values()] == [None]
    assert torch.allclose(agreed.replies["b"].tensors[ONE], torch.full((3,), 1 / 3), atol=1e-6)


@dataclass
class Spoken(Simulated):
    """Clients that weigh themselves, as sites do, by all the examples that they have."""

    has: Mapping[str, int] = field(default_factory=dict)

    def carrier(self, sessions: Any, clients: Members) -> Ask:
        replies = {c: replace(r, num_examples=self.has[c]) for c, r in clients.replies.items()}
        return super().carrier(sessions, replace(clients, replies=replies))


@pytest.mark.parametrize("neighbours", [1, 2, 9])
def test_too_few_neighbours_are_refused(neighbours: int) -> None:
    with pytest.raises(ValueError, match="must be 0 or at least 10"):
        SecureAggregationSettings(neighbours=neighbours)
    SecureAggregationSettings(neighbours=0)
    SecureAggregationSettings(neighbours=10)
