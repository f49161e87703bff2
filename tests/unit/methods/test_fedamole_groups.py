"""FedAMoLE with ``clients_per_expert = "auto"``: every expert is for a group of clients that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coterie import codec
from coterie.methods.fedamole import FedAMoLE, FedAMoLESettings, FedAMoLEState
from coterie.methods.fedamole.groups import experts_each, for_groups, join_groups, make_groups
from coterie.methods.findings import Assignment, find
from coterie.methods.plan import Plan
from coterie.methods.robust import RobustSettings
from coterie.ops.assign import Limits
from coterie.ops.streams import stream
from coterie.requests import Observe, Observed
from coterie.types import NO_EXPERT, BaseSpec, ClientInfo, Key, Part, Reply, Target

RANK = 4
BASE = BaseSpec((Target("q", 6, 5), Target("v", 6, 5)))
CLIENTS = [ClientInfo(f"{g}{i}", 10, group=g) for g, size in (("a", 4), ("b", 3), ("c", 2)) for i in range(size)]
LATE = ClientInfo("late", 10, group="b")


def place(client: ClientInfo, module: str) -> Tensor:
    """Where a client's tokens lie: where its group's do, and a little aside."""
    return torch.eye(RANK)["abc".index(str(client.group))] + 0.05 * torch.randn(
        RANK, generator=stream(1, client.id, module)
    )


def alone(client: ClientInfo, module: str) -> Tensor:
    """Where a client's tokens lie where clients have nothing in common."""
    return torch.randn(RANK, generator=stream(2, client.id, module))


def make(
    clients: Sequence[ClientInfo] = CLIENTS,
    robust: RobustSettings = RobustSettings(),  # noqa: B008
    **settings: Any,
) -> tuple[FedAMoLE, FedAMoLEState]:
    method = FedAMoLE(
        FedAMoLESettings(**{"experts": 18, **settings}),
        Plan(rank=RANK, alpha=4, dropout=0.0, rounds=6, head="personal", robust=robust),
    )
    return method, method.init(BASE, clients)


def one_round(
    method: FedAMoLE, state: FedAMoLEState, rnd: int, clients: Sequence[ClientInfo] = CLIENTS, where: Any = place
) -> FedAMoLEState:
    replies = {
        me.id: Reply(
            {
                key: where(me, key.module) if key.part is Part.EMBEDDING else torch.ones(shape)
                for key, shape in method.expects(state, me, rnd).items()
            },
            me.num_train,
            {},
        )
        for me in clients
    }
    return codec.decode(FedAMoLEState, codec.encode(method.aggregate(state, replies, rnd)))


def holders(state: FedAMoLEState, module: str) -> list[str]:
    """The holders of each expert that anyone holds, sorted."""
    return sorted(" ".join(state.clients[i] for i in e.nonzero().flatten()) for e in state.holds[module] if e.any())


GROUPS = {"a": "a0 a1 a2 a3", "b": "b0 b1 b2", "c": "c0 c1"}


def test_each_group_has_as_many_experts_as_a_client_had_of_the_papers() -> None:
    method, state = make()
    assert all((z.sum(1) == 1).all() for z in state.holds.values())
    state = one_round(method, state, 1)
    for module in "qv":  # 18 experts at two of 9 clients were four for each
        assert holders(state, module) == sorted([*GROUPS.values()] * 4)
    found = find(method.describe(state), Assignment)
    assert found is not None
    assert found.pool.clients_per_expert is None
    assert {len(held) for held in found.experts["q"].values()} == {4}


def test_nobody_moves_later_and_a_late_client_joins_its_group() -> None:
    method, state = make()
    first = one_round(method, state, 1)
    second = one_round(method, first, 2)
    assert all(torch.equal(second.holds[m], first.holds[m]) for m in "qv")
    late = one_round(method, second, 3, [*CLIENTS, LATE])
    joined = sorted([GROUPS["a"], GROUPS["b"] + " late", GROUPS["c"]] * 4)
    assert all(holders(late, module) == joined for module in "qv")


def test_clients_that_have_nothing_in_common_share_all_experts() -> None:
    method, state = make()
    state = one_round(method, state, 1, where=alone)
    everyone = " ".join(c.id for c in CLIENTS)
    assert all(holders(state, module) == [everyone] * 4 for module in "qv")


def test_a_reply_without_embeddings_trains_experts_and_measures_nothing() -> None:
    """Such a reply stands in for clients that sent none, where the server adds noise."""
    method, state = make(clients_per_expert=2, prototype="experts", prototype_memory=0.0, weighting="examples")
    grown = [replace(c, num_train=10 * (i + 1)) for i, c in enumerate(CLIENTS)]
    expected = method.expects(state, grown[0], 1)
    whole = {
        c.id: Reply({k: torch.ones(s) for k, s in method.expects(state, c, 1).items()}, c.num_train) for c in grown
    }
    without = {k: v for k, v in whole["a0"].tensors.items() if k.part is not Part.EMBEDDING}
    assert len(without) < len(expected)
    after = method.aggregate(state, {**whole, "a0": replace(whole["a0"], tensors=without)}, 1)
    assert not after.token_embeddings["q"][0].any()
    held = state.holds["q"].any(1)
    assert torch.allclose(after.expert_embeddings["q"][held], torch.ones(int(held.sum()), RANK))


def test_groups_wait_for_every_client_and_one_that_never_replies_is_in_the_largest() -> None:
    method, start = make()
    state = start
    for rnd in (1, 2, 3):
        state = one_round(method, state, rnd, CLIENTS[:-1])
        assert all(torch.equal(state.holds[m], start.holds[m]) for m in "qv")
    state = one_round(method, state, 4, CLIENTS[:-1])
    assert state.groups == (0, 0, 0, 0, 1, 1, 1, 2, 0)
    assert all(holders(state, m) == sorted([GROUPS["a"] + " c1", GROUPS["b"], "c0"] * 4) for m in "qv")
    later = one_round(method, state, 5)
    assert all(holders(later, m) == sorted([*GROUPS.values()] * 4) for m in "qv")


def test_experts_keep_what_they_learned_when_a_client_joins() -> None:
    method, state = make()
    first = one_round(method, state, 1)
    late = one_round(method, first, 2, [*CLIENTS, LATE])
    for module in "qv":
        assert torch.equal(late.holds[module][:, :-1], first.holds[module])
        assert torch.equal(late.holds[module][:, -1], first.holds[module][:, 4])


@pytest.mark.parametrize("robust", [RobustSettings(rule="median"), RobustSettings(clip=0.5)])
def test_with_a_rule_experts_pick_two(robust: RobustSettings) -> None:
    method, state = make(robust=robust)
    state = one_round(method, state, 1)
    assert state.groups == ()
    assert all((z.sum(dim=1) == 2).all() for z in state.holds.values())
    (pool,) = (found.pool for found in method.describe(state) if isinstance(found, Assignment))
    assert pool is not None
    assert pool.clients_per_expert == 2


def test_experts_that_a_group_does_not_need_are_for_one_that_has_too_few() -> None:
    holds = torch.eye(3, dtype=torch.bool)[[0, 0, 0, 0, 1, 2]]
    homes = for_groups({"q": holds}, [0, 0, 1], 2)["q"]
    assert homes.tolist() == [
        [True, True, False],
        [True, True, False],
        [False, False, True],  # of the first group, which has two
        [False, False, False],
        [False, False, False],
        [False, False, True],
    ]
    few = for_groups({"q": holds[3:]}, [0, 1, 2], 2)["q"]
    assert few.sum(0).tolist() == [1, 1, 1]
    holds[0] = False
    after = for_groups({"q": holds}, [0, 0, 1], 2)["q"]
    assert after[:, 0].tolist() == [False, True, True, False, False, False]  # not the one that nobody trained


def test_a_client_without_embeddings_is_in_the_largest_group_for_the_time_being() -> None:
    likeness = np.full((6, 6), -0.5)
    likeness[:2, :2] = likeness[2:5, 2:5] = 1.0
    likeness[5] = likeness[:, 5] = 0.0
    assert make_groups(likeness, torch.arange(6) < 5, 3) == (0, 0, 1, 1, 1, 1)


def test_a_new_client_joins_those_that_it_is_like_and_its_own_place_does_not_count() -> None:
    known, first, last = torch.tensor([True, True, True]), torch.arange(3) == 0, torch.arange(4) == 3
    likeness = np.array([[1.0, 0.0, 0.4], [0.0, 1.0, 0.0], [0.4, 0.0, 1.0]])
    assert join_groups([0, 0, 1], likeness, known, first) == (1, 0, 1)
    likeness = np.zeros((4, 4))
    likeness[3] = -0.2, 0.0, -0.15, 1.0  # 1 has no embeddings, and is like nobody
    assert join_groups([0, 0, 1], likeness, torch.tensor([True, False, True, True]), last) == (0, 0, 1, 1)


def test_a_client_holds_as_many_experts_as_of_the_papers_within_the_limits() -> None:
    assert experts_each(24, [0] * 16, Limits(2, 2, 8)) == 3
    assert experts_each(100, [0] * 10, Limits(2, 2, 8)) == 8
    assert experts_each(4, [0] * 10, Limits(2, 2, 8)) == 2
    assert experts_each(1, [0] * 10, Limits(2, 2, 8)) == 1


def test_the_experts_of_a_small_pool_go_round_all_groups() -> None:
    assert experts_each(9, [0, 0, 1], Limits(2, 2, 8)) == 4  # 6 if there were one group
    three = [CLIENTS[0], CLIENTS[1], CLIENTS[4]]
    method, state = make(three, experts=9)
    state = one_round(method, state, 1, three)
    assert state.groups == (0, 0, 1)
    assert all(holders(state, m) == ["a0 a1"] * 4 + ["b0"] * 4 for m in "qv")


def test_few_clients_have_to_be_further_apart_to_be_of_two_groups() -> None:
    def blocks(n: int) -> np.ndarray:
        likeness = np.full((n, n), 0.5)
        likeness[: n // 2, : n // 2] = likeness[n // 2 :, n // 2 :] = 0.75  # a silhouette of 1 - .25 / .5
        return likeness

    assert set(make_groups(blocks(8), torch.ones(8, dtype=torch.bool), 4)) == {0}
    assert set(make_groups(blocks(10), torch.ones(10, dtype=torch.bool), 4)) == {0, 1}


def test_a_late_client_takes_no_expert_from_the_others() -> None:
    """With 10 clients a client holds 6 of 30 experts; 11 clients would hold 5 if they were counted anew."""
    clients = [ClientInfo(f"c{i:02}", 10, group="a") for i in range(10)]
    method, state = make(clients, experts=30)
    state = one_round(method, state, 1, clients, where=alone)
    held = {m: z.sum(dim=0).tolist() for m, z in state.holds.items()}
    late = one_round(method, state, 2, [*clients, ClientInfo("late", 10, group="a")], where=alone)
    assert held == {m: [6] * 10 for m in "qv"}
    assert {m: z.sum(dim=0).tolist() for m, z in late.holds.items()} == {m: [6] * 11 for m in "qv"}
    assert all(torch.equal(late.holds[m][:, :-1], state.holds[m]) for m in "qv")


def test_what_one_client_trained_and_nobody_holds_starts_anew_and_is_not_exported() -> None:
    method, start = make()
    state = one_round(method, start, 1)
    for module, z in state.holds.items():
        for e in range(18):
            for part in (Part.A, Part.B):
                key = Key(module, e, part)
                assert torch.equal(state.pool[key], start.pool[key]) == (not z[e].any())
    assert 0 < len(state.used) < 18
    assert method.experts(state).keys() == {f"expert-{e}" for e in state.used} | {"shared"}
    assert method.experts(start).keys() == {f"expert-{e}" for e in range(18)} | {"shared"}


def test_a_newcomer_gets_no_expert_that_nobody_has_trained() -> None:
    method, state = make()
    state = one_round(method, state, 1)
    program = method.onboard(method.welcome(state, LATE), BASE, LATE)
    request = next(program)
    assert isinstance(request, Observe)
    found = {Key(m, NO_EXPERT, Part.EMBEDDING): place(LATE, m) for m in "qv"}
    with pytest.raises(StopIteration) as stop:
        program.send(Observed({}, 1, found))
    for module, z in state.holds.items():
        of_group = {e for e, held in enumerate(z) if [CLIENTS[i].group for i in held.nonzero().flatten()] == ["b"] * 3}
        keys = stop.value.value.bank.tensors
        got = {key.expert for key in keys if key.module == module and key.part is Part.A and key.expert >= 0}
        assert got == of_group


@pytest.mark.parametrize(
    "settings",
    [
        {"assignment": "static"},
        {"assignment": "random"},
        {"assignment": "homogeneous"},
        {"prototype": "experts"},
        {"embed": "after"},
    ],
)
def test_experts_that_do_not_look_for_clients_like_their_holders_pick_two(settings: dict[str, str]) -> None:
    method, state = make(**settings)
    state = one_round(method, state, 1)
    assert state.groups == ()
    assert all((z.sum(dim=1) == 2).all() for z in state.holds.values())
