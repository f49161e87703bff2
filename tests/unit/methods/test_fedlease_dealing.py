"""FedLEASE's ``experts_per_cluster``: which clients train which expert, and what is averaged over whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from coterie.methods.fedlease.allocation import Allocation
from coterie.methods.fedlease.dealing import dealt
from coterie.methods.fedlease.method import FedLEASE
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.findings import Clusters, Values, find
from coterie.methods.plan import Plan
from coterie.methods.robust import RobustSettings
from coterie.ops.streams import stream
from coterie.requests import Train, Trained
from coterie.types import ClientInfo, Key, Part
from halves import Play

PAIRS = ("a0", "a1", "a2", "a3", "b0", "b1")  # of the a, 0 and 2 are similar, and 1 and 3
CLIENTS = tuple(ClientInfo(c, 10, labels=("yes", "no"), group=c[0]) for c in PAIRS)


def trained(request: Train, client: ClientInfo) -> Trained:
    """As if what a client trains moved by its group, by its half of that, and a little by itself."""
    moved = {}
    for key in sorted(request.trainable):
        shape = request.bank.tensors[key].shape
        half = client.group, str(int(client.id[1]) % 2)
        parts = (str(client.group),), half, (client.id,)
        draws = [torch.randn(shape, generator=stream(5, *names, key.module, key.part.value)) for names in parts]
        moved[key] = request.bank.tensors[key] + 2 * draws[0] + draws[1] + 0.2 * draws[2]
    return Trained(moved, 1.0, client.num_train, 100, 5)


def play(head: Any = "personal", robust: Any = None, **settings: Any) -> Play:
    plan = Plan(rank=2, alpha=4, dropout=0.0, rounds=9, head=head, robust=robust or RobustSettings())
    fixed = {"distance": "B", "allocation": "oracle", "warmup_rounds": 1, "experts_per_cluster": 2}
    return Play(FedLEASE(FedLEASESettings(**{**fixed, **settings}), plan), CLIENTS)


def started(**settings: Any) -> Play:
    game = play(**settings)
    game.round(trained)
    return game


def allocation(sizes: Sequence[int]) -> Allocation:
    """Clusters of these sizes, of clients in a row that are the less alike the further they are apart."""
    names = [f"c{i:02}" for i in range(sum(sizes))]
    at = torch.arange(len(names), dtype=torch.float64)
    numbers = [k for k, size in enumerate(sizes) for _ in range(size)]
    return Allocation(dict(zip(names, numbers, strict=True)), {}, tuple(names), (at[:, None] - at[None, :]).abs())


def shares(of: Allocation) -> list[int]:
    return [len(of.members(e)) for e in range(of.num_experts)]


@pytest.mark.parametrize(
    ("sizes", "number", "expected"),
    [
        ((5, 2), 2, [3, 2, 1, 1]),
        ((5, 1), 3, [2, 2, 1, 1]),
        ((8, 2, 2), "auto", [2, 2, 2, 2, 2, 2]),
        ((8, 4, 4), "auto", [4, 4, 4, 4]),
        ((3, 1, 1), "auto", [3, 1, 1]),
        ((4, 4), "auto", [4, 4]),
    ],
)
def test_shares_are_equal_and_neighbours_share(sizes: Sequence[int], number: Any, expected: list[int]) -> None:
    before = allocation(sizes)
    after = dealt(FedLEASESettings(experts_per_cluster=number), before, dict.fromkeys(before.clusters, 10))
    assert sorted(shares(after)) == sorted(expected)
    assert after.clusters == before.clusters
    for e in range(after.num_experts):
        members = [int(c[1:]) for c in after.members(e)]
        assert max(members) - min(members) == len(members) - 1  # nobody of another expert in between
        assert {before.clusters[c] for c in after.members(e)} == {after.cluster_of(e)}


def test_one_expert_for_each_is_the_allocation_itself() -> None:
    before = allocation((3, 2))
    assert dealt(FedLEASESettings(), before, {}) is before


def test_similar_clients_share_an_expert_and_a_cluster_shares_router_and_head() -> None:
    game = started(head="shared")
    assert game.state.allocation.own == {"a0": 0, "a2": 0, "a1": 1, "a3": 1, "b0": 2, "b1": 3}
    replies = game.round(trained)
    sent = game.method.configure(game.state, CLIENTS, 3)
    for client, ins in sent.items():
        own = game.state.allocation.own[client]
        assert ins.info["own"] == own
        assert {k.expert for k in ins.tensors if k.part is Part.A} == {0, 1, 2, 3}
        assert ins.tensors[Key("q", -1, Part.ROUTER)].shape == (7, 6)
    for key, members in (
        (Key("q", 0, Part.B), ("a0", "a2")),
        (Key("v", 3, Part.A), ("b1",)),
        (Key("q", -1, Part.ROUTER), PAIRS[:4]),
        (Key("score.weight", -1, Part.HEAD), PAIRS[:4]),
    ):
        mean = torch.stack([replies[c].tensors[key] for c in members]).mean(0)
        torch.testing.assert_close(sent[members[0]].tensors[key], mean)
    found = game.method.describe(game.state)
    assert find(found, Clusters).number == 2  # type: ignore[union-attr]
    assert find(found, Values).values["own_experts"] == game.state.allocation.own  # type: ignore[union-attr]
    assert list(game.method.experts(game.state)) == ["expert-0", "expert-1", "expert-2", "expert-3"]


def test_the_rules_of_robust_group_experts_by_their_clients_and_routers_by_cluster() -> None:
    game = started(head="shared", robust=RobustSettings(rule="median", min_group=1))
    replies = game.round(trained)
    groups = game.method.groups(game.state, replies, dict.fromkeys(PAIRS, "same"))
    of = {(g.members, part) for g in groups for part in {key.part for key in g.keys}}
    halves_of_a = {(pair, part) for pair in (("a0", "a2"), ("a1", "a3")) for part in (Part.A, Part.B)}
    alone = {((c,), part) for c in ("b0", "b1") for part in (Part.A, Part.B)}
    clusters = {(members, part) for members in (PAIRS[:4], PAIRS[4:]) for part in (Part.ROUTER, Part.HEAD)}
    assert of == halves_of_a | alone | clusters


def test_a_late_client_joins_the_nearest_expert_and_its_cluster() -> None:
    game = play(allocation="learned", experts=2)
    game.round(trained, only=PAIRS[:3] + PAIRS[4:])
    assert "a3" not in game.state.allocation.clusters
    game.round(trained)
    own, clusters = game.state.allocation.own, game.state.allocation.clusters
    assert (own["a3"], clusters["a3"]) == (own["a1"], clusters["a1"])
    assert own["a1"] != own["a0"]


def test_several_experts_and_those_that_are_used_go_together() -> None:
    game = started(download="used")
    assert game.method.configure(game.state, CLIENTS, 2)["b1"].info == {"phase": "experts", "own": 3, "experts": 4}
    assert game.method.expects_info(game.state, CLIENTS[0], 2)["expert_use"].names == {"0", "1", "2", "3"}
