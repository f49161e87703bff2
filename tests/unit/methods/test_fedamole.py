"""FedAMoLE's two halves without a model: who holds what, what is averaged, what survives, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from coterie import codec
from coterie.methods.fedamole import FedAMoLE, FedAMoLESettings, FedAMoLEState
from coterie.methods.fedamole.selection import within_reach
from coterie.methods.findings import Assignment, ExpertPool, find
from coterie.methods.plan import Plan
from coterie.methods.robust import RobustSettings
from coterie.ops.assign import Limits
from coterie.ops.streams import stream
from coterie.requests import HoldOut, Observe, Observed, Train, Trained
from coterie.types import (
    NO_EXPERT,
    SHARED,
    BaseSpec,
    ClientInfo,
    CoterieError,
    HeadParameter,
    Key,
    Part,
    Personal,
    Reply,
    Target,
)

RANK, ROUNDS = 4, 6
BASE = BaseSpec((Target("q", 6, 5), Target("v", 6, 5)), (HeadParameter("score.weight", (-1, 6), "normal"),))
CLIENTS = [ClientInfo(f"{g}{i}", 10 + i, labels=(g, "no"), group=g) for g in "abc" for i in range(3)]
INFO = {c.id: c for c in CLIENTS}
PAPER = {"embed": "after", "embed_rows": "held_out", "inertia": 0.0, "prototype": "experts"}


def make(head: str = "personal", clients: Any = CLIENTS, **settings: Any) -> tuple[FedAMoLE, FedAMoLEState]:
    plan = Plan(rank=RANK, alpha=4, dropout=0.0, rounds=ROUNDS, head=head)  # type: ignore[arg-type]
    method = FedAMoLE(FedAMoLESettings(**{"experts": 12, **PAPER, **settings}), plan)
    return method, method.init(BASE, clients)


def train(request: Train, client: ClientInfo) -> Trained:
    moved = {
        key: request.bank.tensors[key]
        + torch.randn(request.bank.tensors[key].shape, generator=stream(2, client.id, str(key)))
        for key in sorted(request.trainable)
    }
    return Trained(moved, 1.0, client.num_train, 100, 5, balance=1.5)


def observe(request: Observe, client: ClientInfo) -> Observed:
    """Tokens and experts of a client lie where its group does, and a little aside."""
    place = {g: 6 * torch.eye(RANK)[i] for i, g in enumerate("abc")}[str(client.group)]
    keys = [key for key in request.bank.tensors if key.part is Part.ROUTER or (key.part is Part.A and key.expert >= 0)]
    aside = {key: 0.1 * torch.randn(RANK, generator=stream(3, client.id, str(key))) for key in keys}
    found = {key._replace(part=Part.EMBEDDING): place + aside[key] for key in keys}
    return Observed({}, 10, request.wanted(found))


def one_round(
    method: FedAMoLE, state: FedAMoLEState, rnd: int, only: Any = None, late: Sequence[ClientInfo] = ()
) -> FedAMoLEState:
    cohort = [c for c in (*CLIENTS, *late) if only is None or c.id in only]
    infos = {c.id: c for c in cohort}
    replies: dict[str, Reply] = {}
    for client, ins in method.configure(state, cohort, rnd).items():
        me = infos[client]
        program = method.client(ins, me, method.begin(BASE, me))
        request = next(program)
        assert isinstance(request, Train)
        assert request.trainable == request.bank.tensors.keys()
        assert request.hold_out == HoldOut(0.05, 200)
        result = None
        try:
            look = program.send(train(request, me))
            assert isinstance(look, Observe)
            assert look.hold_out == request.hold_out
            trained = train(request, me).tensors
            assert all(torch.equal(look.bank.tensors[key], value) for key, value in trained.items())
            program.send(observe(look, me))
        except StopIteration as stop:
            result = stop.value
        assert result is not None
        expected = method.expects(state, me, rnd)
        assert {k: tuple(v.shape) for k, v in result.reply.tensors.items()} == dict(expected)
        assert result.reply.info["balance"] == 1.5
        replies[client] = result.reply
    state = method.aggregate(state, replies, rnd)
    return codec.decode(FedAMoLEState, codec.encode(state))  # what a crash would leave of it


def same_group(state: FedAMoLEState) -> float:
    """Share of the pairs of holders of the same expert that are of the same group."""
    pairs = []
    for z in state.holds.values():
        for row in z:
            held = [state.clients[i] for i in row.nonzero().flatten().tolist()]
            pairs += [INFO[a].group == INFO[b].group for a, b in combinations(held, 2)]
    assert len(pairs) >= 24
    return sum(pairs) / len(pairs)


def test_everyone_starts_with_experts_within_the_bounds_and_other_ones_in_each_module() -> None:
    _, state = make(max_experts=4)
    assert set(state.holds) == {"q", "v"}
    for z in state.holds.values():
        assert z.shape == (12, 9)
        assert (z.sum(1) == 2).all()
        assert ((z.sum(0) >= 2) & (z.sum(0) <= 4)).all()
    assert not torch.equal(state.holds["q"], state.holds["v"])
    starts = [state.pool[Key("q", e, Part.A)] for e in (SHARED, *range(12))]
    assert len({str(a.tolist()) for a in starts}) == 13
    assert not any(state.pool[Key("q", e, Part.B)].any() for e in (SHARED, *range(12)))
    assert state.pool[Key("q", NO_EXPERT, Part.ROUTER)].shape == (RANK, 6)


LATE = [ClientInfo("late", 9, labels=("a", "no"), group="a")]


@pytest.mark.parametrize("embed", ["after", "before"])
def test_a_late_client_starts_with_the_shared_expert_and_is_chosen_like_the_others_from_then_on(embed: str) -> None:
    method, state = make(experts=None)
    state = one_round(method, state, 1)
    sent = method.configure(state, [*CLIENTS, *LATE], 2)["late"].tensors
    kinds = {(key.expert, key.part) for key in sent}
    assert kinds == {(SHARED, Part.A), (SHARED, Part.B), (NO_EXPERT, Part.ROUTER)}
    assert all(value is state.pool[key] for key, value in sent.items())
    replied = [key for key in method.expects(state, LATE[0], 2) if key.part is Part.EMBEDDING]
    assert replied == [Key("q", NO_EXPERT, Part.EMBEDDING), Key("v", NO_EXPERT, Part.EMBEDDING)]

    state = one_round(method, state, 2, late=LATE)
    assert state.clients == (*sorted(INFO), "late")
    for module, z in state.holds.items():
        assert z.shape == (27, 10)
        assert (z.sum(1) == 2).all()
        assert 2 <= z[:, -1].sum() <= 8
        assert state.token_embeddings[module][-1].any()
    held = {key.expert for key in method.configure(state, LATE, 3)["late"].tensors if key.module == "q"}
    assert held == {SHARED, NO_EXPERT, *state.holds["q"][:, -1].nonzero().flatten().tolist()}
    state = one_round(method, one_round(method, state, 3, late=LATE), 4)  # it is away in round 4
    with_others = [state.clients[i] for z in state.holds.values() for e in z if e[-1] for i in e.nonzero().flatten()]
    near = [INFO[c].group == "a" for c in with_others if c != "late"]
    assert len(near) >= 4
    assert sum(near) / len(near) > 0.75
    found = find(method.describe(state), Assignment)
    assert found is not None
    assert found.pool is not None
    assert found.pool.experts == 27  # that of the start, not three for each of ten
    assert set(found.experts["q"]) == {*INFO, "late"}


def test_a_late_client_of_the_last_round_and_one_that_has_not_replied_hold_the_shared_expert() -> None:
    method, state = make()
    state = one_round(method, state, ROUNDS, late=LATE)
    assert not any(z[:, -1].any() for z in state.holds.values())
    for me in (*LATE, ClientInfo("never", 3)):
        assert {key.expert for key in method.configure(state, [me], ROUNDS + 1)[me.id].tensors} == {SHARED, NO_EXPERT}


@pytest.mark.parametrize("mode", ["static", "oracle", "random", "homogeneous"])
def test_late_clients_of_the_controls(mode: str) -> None:
    """Where experts are assigned once, a late client keeps to the shared expert."""
    method, state = make(assignment=mode, experts=18)
    for rnd in range(1, 4):
        state = one_round(method, state, rnd, late=LATE)
    numbers = torch.stack([z.sum(0) for z in state.holds.values()])
    assert (numbers[:, :-1] >= 2).all()
    assert (numbers[:, -1] == 0).all() if mode in ("static", "oracle") else (numbers[:, -1] >= 2).all()
    if mode == "homogeneous":  # 36 picks for 10 clients
        assert {int(n) for n in numbers.flatten()} == {3, 4}


@pytest.mark.parametrize(
    ("experts", "homogeneous", "expected"),
    [
        (27, False, Limits(2, 2, 8)),  # 54 picks for 10 clients are enough
        (8, False, Limits(2, 1, 8)),
        (4, False, Limits(2, 0, 8)),
        (10, True, Limits(2, 2, 8, homogeneous=True)),
        (27, True, Limits(2, 5, 6)),
        (4, True, Limits(2, 0, 1)),
    ],
)
def test_limits_change_only_where_late_clients_leave_too_few_picks(
    experts: int, homogeneous: bool, expected: Limits
) -> None:
    assert within_reach(Limits(2, 2, 8, homogeneous), experts, 10) == expected


@pytest.mark.parametrize(("number", "numbers"), [(3, {2}), (9, {1, 2}), (20, {0, 1})])
def test_where_the_pool_is_too_small_for_all_late_clients_each_holds_an_equal_share_at_least(
    number: int, numbers: set[int]
) -> None:
    many = [ClientInfo(f"late-{i:02}", 9, group="abc"[i % 3]) for i in range(number)]
    method, state = make(max_experts=3)  # 24 picks for 9 clients
    state = one_round(method, state, 1, late=many)
    assert state.clients == (*sorted(INFO), *(client.id for client in many))
    for z in state.holds.values():
        assert (z.sum(1) == 2).all()
        least, most = int(z.sum(0).min()), int(z.sum(0).max())
        assert least == 24 // (9 + number)
        assert most <= 3
    assert numbers == {24 // (9 + number), -(-24 // (9 + number))}
    state = one_round(method, state, 2, late=many)
    assert len(state.clients) == 9 + number


def test_experts_choose_the_clients_whose_data_fits_them() -> None:
    method, state = make()
    for rnd in range(1, 4):
        state = one_round(method, state, rnd)
    assert same_group(make()[1]) < 0.45
    assert same_group(state) > 0.75


def test_an_expert_that_starts_at_one_client_chooses_by_that_clients_data_alone() -> None:
    agreed = {}
    for first in (None, 1):
        method, state = make(first_holders=first)
        for z in state.holds.values():
            assert (z.sum(1) == (first or 2)).all()
            assert int(z.sum(0).min()) == (1 if first else 2)  # 12 experts for 9 clients, or 24
        state = one_round(method, state, 1)
        assert all((z.sum(1) == 2).all() and (z.sum(0) >= 2).all() for z in state.holds.values())
        agreed[first] = same_group(state)
    assert agreed[1] > 0.85 > agreed[None]


def test_by_their_holders_experts_find_their_domain_at_once_and_stay() -> None:
    method, state = make(prototype="holders")
    assert all((z.sum(1) == 1).all() for z in state.holds.values())
    state = one_round(method, state, 1)
    assert same_group(state) == 1
    later = one_round(method, one_round(method, state, 2, late=LATE), 3, late=LATE)
    assert same_group(one_round(method, state, 2)) == 1
    joined = [[later.clients[i] for i in e.nonzero().flatten()] for z in later.holds.values() for e in z if e[-1]]
    assert len(joined) >= 4  # of both modules
    assert {INFO[c].group for held in joined for c in held if c != "late"} == {"a"}


@pytest.mark.parametrize("experts", [12, 24])
def test_experts_choose_once_every_client_has_replied_as_after_a_full_first_round(experts: int) -> None:
    method, start = make(experts=experts, prototype="holders", inertia=2.0)
    full = one_round(method, start, 1)
    first = one_round(method, start, 1, only=["a0", "b1", "c0"])
    assert all(torch.equal(first.holds[m], start.holds[m]) for m in "qv")
    state = one_round(method, first, 2)
    assert all(torch.equal(state.holds[m], full.holds[m]) for m in "qv")
    later = one_round(method, state, 3)
    assert all(torch.equal(later.holds[m], state.holds[m]) for m in "qv")


def test_experts_wait_three_rounds_for_a_client_and_leave_it_when_they_know_better() -> None:
    method, start = make(experts=24, prototype="holders", inertia=2.0)
    some, state = [c for c in INFO if c not in ("a2", "b2")], start
    for rnd in (1, 2, 3):
        state = one_round(method, state, rnd, only=some)
        assert all(torch.equal(state.holds[m], start.holds[m]) for m in "qv")
    state = one_round(method, state, 4, only=some)
    before = same_group(state)
    state = one_round(method, state, 5)
    assert same_group(state) > 0.9 > before


@pytest.mark.parametrize("mode", ["static", "oracle", "random"])
def test_where_experts_do_not_choose_they_start_at_all_their_clients(mode: str) -> None:
    _, state = make(assignment=mode, first_holders=1)
    assert all((z.sum(1) == 2).all() for z in state.holds.values())


def test_more_first_holders_than_clients_of_an_expert_are_refused() -> None:
    with pytest.raises(
        ValueError, match="first_holders = 3 is above clients_per_expert, which auto counts as 2; lower it"
    ):
        make(first_holders=3)
    with pytest.raises(ValueError, match="first_holders = 2 is above clients_per_expert = 1; lower it"):
        make(first_holders=2, clients_per_expert=1)


@pytest.mark.parametrize("mode", ["dynamic", "static", "random", "homogeneous"])
def test_the_modes(mode: str) -> None:
    method, state = make(assignment=mode, experts=18)
    first = state
    for rnd in range(1, ROUNDS + 1):
        before = state
        state = one_round(method, state, rnd)
        changed = any(not torch.equal(state.holds[m], before.holds[m]) for m in "qv")
        if rnd == ROUNDS or mode == "static":
            assert not changed
    assert mode == "static" or not torch.equal(state.holds["q"], first.holds["q"])
    (sent, *_) = method.configure(state, CLIENTS, 1).values()
    assert sent.info["embed"] == (mode in ("dynamic", "homogeneous"))
    if mode == "homogeneous":
        assert {int(n) for z in state.holds.values() for n in z.sum(0)} == {4}


def test_an_expert_is_the_mean_over_its_holders_that_replied_and_stays_where_none_did() -> None:
    method, state = make()
    away = {state.clients[i] for i in state.holds["q"][3].nonzero().flatten().tolist()}
    came = [c for c in CLIENTS if c.id not in away]
    replies = {
        c.id: Reply({k: train_value(c, k, v) for k, v in method._part_of_pool(state, c.id).items()}, c.num_train)
        for c in came
    }
    after = method.aggregate(state, replies, 1)
    checked = 0
    for key, value in state.pool.items():
        sent = [r.tensors[key] for r in replies.values() if key in r.tensors]
        wanted = torch.stack(sent).mean(0) if sent else value
        torch.testing.assert_close(after.pool[key], wanted)
        checked += len(sent) > 1
    assert torch.equal(after.pool[Key("q", 3, Part.A)], state.pool[Key("q", 3, Part.A)])
    assert checked > 10


def train_value(client: ClientInfo, key: Key, value: torch.Tensor) -> torch.Tensor:
    return value + torch.randn(value.shape, generator=stream(5, client.id, str(key)))


def test_by_examples_a_larger_client_weighs_more() -> None:
    method, state = make(weighting="examples")
    held = state.holds["q"][0].nonzero().flatten().tolist()
    a, b = (state.clients[i] for i in held)
    key = Key("q", 0, Part.A)
    sent = {c: {k: train_value(INFO[c], k, v) for k, v in method._part_of_pool(state, c).items()} for c in (a, b)}
    after = method.aggregate(state, {a: Reply(sent[a], 30), b: Reply(sent[b], 10)}, 1)
    torch.testing.assert_close(after.pool[key], 0.75 * sent[a][key] + 0.25 * sent[b][key])


def test_a_client_that_missed_rounds_keeps_its_last_embedding_and_the_federation_goes_on() -> None:
    method, state = make()
    everyone = [c.id for c in CLIENTS]
    state = one_round(method, state, 1)
    last = state.token_embeddings["q"][state.clients.index("a0")]
    state = one_round(method, state, 2, only=[c for c in everyone if c != "a0"])
    assert torch.equal(state.token_embeddings["q"][state.clients.index("a0")], last)
    assert state.holds["q"][:, state.clients.index("a0")].sum() >= 2
    fresh = one_round(method, make()[1], 1, only=["a0", "b0"])
    assert not fresh.token_embeddings["q"][fresh.clients.index("a1")].any()
    shares = method._scores(fresh)[0]  # unknown clients stand between the known ones, and all alike
    unknown = [i for i, c in enumerate(fresh.clients) if c not in ("a0", "b0")]
    a, b = (shares[:, fresh.clients.index(c)] for c in ("a0", "b0"))
    assert np.allclose(shares[:, unknown], shares[:, unknown[:1]], rtol=1e-9)
    held = fresh.expert_embeddings["q"].any(dim=1).numpy()  # the others' embeddings are 0: all clients alike
    between = (shares[:, unknown[0]] <= np.maximum(a, b)) & (shares[:, unknown[0]] >= np.minimum(a, b))
    assert between[held].all()


def test_the_server_keeps_every_expert_once() -> None:
    method, state = make()
    sent = method.configure(state, CLIENTS, 1)
    shared = [key for ins in sent.values() for key in ins.tensors]
    assert len(shared) > len(set(shared)) > 0
    assert all(value is state.pool[key] for ins in sent.values() for key, value in ins.tensors.items())


def test_the_number_of_experts_follows_the_clients_as_the_papers_does() -> None:
    _, state = make(experts=None)
    assert state.holds["q"].shape == (27, 9)


def test_shared_heads_are_averaged_by_label_space() -> None:
    method, state = make(head="shared")
    state = one_round(method, state, 1)
    assert len(state.heads.values) == 3


def test_what_is_exported_and_described() -> None:
    method, state = make()
    assert set(method.experts(state)) == {"shared", *(f"expert-{e}" for e in range(12))}
    assert {key.expert for tensors in method.experts(state).values() for key in tensors} == {0}
    found = find(method.describe(state), Assignment)
    assert found is not None
    assert found.pool == ExpertPool(experts=12, clients_per_expert=2, max_experts=8, mode="dynamic")
    assert set(found.experts["q"]) == set(INFO)
    assert sum(len(held) for held in found.experts["v"].values()) == 24


def test_own_masks_and_padding_are_asked_for() -> None:
    method, state = make(dropout_masks="per_expert", padding="counted", balance=0.5)
    me = CLIENTS[0]
    program = method.client(method.configure(state, CLIENTS, 1)[me.id], me, Personal())
    request = next(program)
    assert isinstance(request, Train)
    assert request.bank.own_masks
    assert request.balance is not None
    assert (request.balance.weight, request.balance.padding) == (0.5, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 4}, "experts"),
        ({"experts": 60, "max_experts": 8}, "max_experts"),
        ({"clients_per_expert": 10}, "clients_per_expert"),
        ({"experts": 10, "assignment": "homogeneous"}, "homogeneous|same number"),
        ({"top_k": 9}, "top_k = 9 is above max_experts = 8"),
        ({"top_k": 3, "experts": 6}, "top_k = 3 needs 27 picks .*lower top_k to at most 1"),
        ({"embedding_fraction": 0.99}, "client a0 has 10 training row.*embedding_fraction = 0.99"),
    ],
)
def test_what_cannot_be_met_is_refused_before_the_run(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CoterieError, match=message):
        make(**settings)


def test_a_client_with_one_row_is_refused() -> None:
    with pytest.raises(CoterieError, match=r"client tiny has 1 training row.*add rows"):
        make(clients=[*CLIENTS, ClientInfo("tiny", 1)])


def test_with_a_rule_a_client_with_a_long_embedding_does_not_get_every_expert() -> None:
    """A token embedding a thousand times as long draws every expert that it is not turned away from."""
    taken = {}
    for rule in ("mean", "median"):
        method, state = make(clients_per_expert=1, min_experts=1, top_k=1, max_experts=12)
        method = FedAMoLE(method.settings, replace(method.plan, robust=RobustSettings(rule=rule)))  # type: ignore[arg-type]
        longer = {m: t.clone() for m, t in state.token_embeddings.items()}
        ones = {m: torch.ones(12, RANK) for m in longer}
        for module, t in longer.items():
            t[:] = torch.nn.functional.normalize(torch.rand(t.shape, generator=stream(5, module)) + 0.1)
            t[0] *= 1000
        state = replace(state, token_embeddings=longer, expert_embeddings=ones)
        found = method._assign(state, method._scores(state))
        taken[rule] = max(int(z[:, 0].sum()) for z in found.holds.values())
    assert taken["mean"] == 4  # all but one each for the other eight
    assert taken["median"] < 4
