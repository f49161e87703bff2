"""Robust aggregation in groups: which replies form one, what each becomes, and what a rule says of a client."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from coterie.config.load import check_config
from coterie.methods.fedamole import FedAMoLE, FedAMoLESettings
from coterie.methods.fedlease import allocation
from coterie.methods.fedlease.method import FedLEASE
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.fedlease.state import FedLEASEState
from coterie.methods.findings import Values, find
from coterie.methods.parts import label_space
from coterie.methods.plan import Plan
from coterie.methods.registry import methods
from coterie.methods.robust import Group, RobustSettings, aggregated, alone, grouped
from coterie.ops.robust import Rule
from coterie.types import NO_EXPERT, BaseSpec, ClientInfo, CoterieError, Key, Part, Reply, Target, Tensors
from halves import CLIENTS, Play

A, B, HEAD = Key("q", 0, Part.A), Key("q", 0, Part.B), Key("score", NO_EXPERT, Part.HEAD)
RULES = [rule for rule in get_args(Rule) if rule != "mean"]
ELSEWHERE = {"fedlease", "fedamole", "smartfed"}  # their clients need answers that these halves do not give


def noisy(seed: int, by: float = 1.0) -> torch.Tensor:
    return by * (1 + 0.2 * torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))


def federation(attackers: int, clients: int = 8, by: float = -50.0) -> tuple[dict[str, Reply], dict[str, Tensors]]:
    """Clients that moved alike from one start; the first ``attackers`` turned round."""
    start = {A: torch.full((4, 3), 5.0), B: torch.zeros(4, 3)}
    replies = {
        f"c{i}": Reply(
            {k: v + noisy(2 * i + n, by if i < attackers else 1.0) for n, (k, v) in enumerate(start.items())}, 9
        )
        for i in range(clients)
    }
    return replies, dict.fromkeys(replies, start)


def together(replies: dict[str, Reply], private: bool = False) -> Group:
    return Group(tuple(replies), frozenset({A, B}), private)


@pytest.mark.parametrize("rule", RULES)
def test_two_of_eight_do_not_turn_the_update_and_the_rule_says_who_they_are(rule: Any) -> None:
    replies, starts = federation(2)
    found, weighed = aggregated(RobustSettings(rule=rule), [together(replies)], replies, starts)
    for key in (A, B):
        for reply in found.values():
            assert torch.equal(reply.tensors[key], found["c0"].tensors[key])  # any mean of them is the rule's result
        assert (found["c0"].tensors[key] - starts["c0"][key] - 1).abs().max() < 0.8
    assert [c for c in weighed if weighed[c].outlying] == ["c0", "c1"]
    assert weighed["c0"].norm == pytest.approx(50, rel=0.2)
    assert "times the median norm, cosine -0.9" in str(weighed["c0"])
    assert found["c0"].num_examples == 9


def test_the_clip_alone_shortens_what_is_long_and_leaves_the_mean_to_the_method() -> None:
    replies, starts = federation(1)
    settings = RobustSettings(clip=0.5)
    found, weighed = aggregated(settings, [together(replies)], replies, starts)
    sizes = [float(sum((r.tensors[k] - starts[c][k]).square().sum() for k in (A, B))) ** 0.5 for c, r in found.items()]
    assert max(sizes) == pytest.approx(min(sizes), rel=0.2)
    assert weighed["c0"].clipped == pytest.approx(0.02, rel=0.2)
    assert "shortened to 2%" in str(weighed["c0"])
    torch.testing.assert_close(found["c7"].tensors[A], replies["c7"].tensors[A], rtol=0.1, atol=0.1)


def test_a_rule_reads_all_tensors_of_a_client_as_one_vector() -> None:
    """Krum takes one client's A with the same client's B, though another one's B alone is nearer to the others."""
    replies, starts = federation(0, clients=5)
    replies["c3"] = replace(replies["c3"], tensors={**replies["c3"].tensors, A: replies["c3"].tensors[A] + 100})
    found, _ = aggregated(RobustSettings(rule="krum"), [together(replies)], replies, starts)
    chosen = [c for c in replies if torch.allclose(replies[c].tensors[A], found["c0"].tensors[A])]
    assert len(chosen) == 1
    assert chosen != ["c3"]
    torch.testing.assert_close(found["c0"].tensors[B], replies[chosen[0]].tensors[B])


def test_two_clients_move_what_both_agree_on_and_one_only_what_it_keeps() -> None:
    replies, starts = federation(1, clients=2)
    settings = RobustSettings(rule="median")
    found, weighed = aggregated(settings, [together(replies)], replies, starts)
    assert weighed == {}
    assert torch.equal(found["c1"].tensors[A], starts["c1"][A])  # they agree on nothing
    alike, starts = federation(0, clients=2)
    found, _ = aggregated(settings, [together(alike)], alike, starts)
    assert bool((found["c0"].tensors[A] - 5 <= torch.minimum(alike["c0"].tensors[A], alike["c1"].tensors[A]) - 5).all())
    one = {"c0": alike["c0"]}
    assert torch.equal(aggregated(settings, [together(one)], one, starts)[0]["c0"].tensors[A], starts["c0"][A])
    own, _ = aggregated(settings, [together(one, private=True)], one, starts)
    torch.testing.assert_close(own["c0"].tensors[A], one["c0"].tensors[A])


def test_who_points_away_in_a_large_group_takes_no_part_in_a_small_one() -> None:
    replies, starts = federation(1, clients=5)
    small = Group(("c0", "c1"), frozenset({B}), private=True)
    large = Group(tuple(replies), frozenset({A}))
    found, _ = aggregated(RobustSettings(rule="median"), [small, large], replies, starts)
    for client in ("c0", "c1"):
        torch.testing.assert_close(found[client].tensors[B], replies["c1"].tensors[B])


@pytest.mark.parametrize(("members", "share", "number"), [(8, 2, 2), (4, 1, 1), (3, 1, 1), (2, 0, 0), (1, 0, 0)])
def test_attackers_are_a_minority_of_every_group(members: int, share: int, number: int) -> None:
    assert RobustSettings().attackers_of(members) == share
    assert RobustSettings(attackers=2).attackers_of(members) == (2 if members == 8 else number)
    assert RobustSettings(attackers=0).attackers_of(members) == 0


def test_heads_are_in_the_vector_of_a_cluster_with_one_label_space_and_else_apart() -> None:
    replies = {c: Reply({A: torch.zeros(1), HEAD: torch.zeros(1)}, 1) for c in "abcd"}
    one = grouped(replies, dict.fromkeys(replies, "x"), dict.fromkeys(replies, "s"))
    assert one == [Group(tuple("abcd"), frozenset({A, HEAD}))]
    two = grouped(replies, dict.fromkeys(replies, "x"), {"a": "s", "b": "t", "c": "s", "d": "t"}, private=True)
    heads = frozenset({HEAD})
    assert two == [
        Group(tuple("abcd"), frozenset({A}), True),
        Group(("a", "c"), heads, True),
        Group(("b", "d"), heads, True),
    ]


@pytest.mark.parametrize("head", ["personal", "shared"])
@pytest.mark.parametrize("name", sorted({n for n, kind in methods().items() if not kind.no_rules} - ELSEWHERE))
def test_every_tensor_of_every_reply_belongs_to_one_group(name: str, head: Any) -> None:
    kind = methods()[name]
    play = Play(kind(kind.Settings(), Plan(rank=2, alpha=4, head=head)))
    spaces = {c.id: label_space(c) for c in CLIENTS}
    for _ in range(2):
        before = play.state
        replies = play.round()
        belongs = [(c, k) for g in play.method.groups(before, replies, spaces) for c in g.members for k in g.keys]
        assert sorted(belongs) == sorted((c, key) for c, reply in replies.items() for key in reply.tensors)


def test_fedamoles_groups_are_all_clients_and_the_holders_of_each_expert() -> None:
    base = BaseSpec((Target("q", 6, 5), Target("v", 6, 5)))
    clients = [ClientInfo(f"c{i}", 40) for i in range(6)]
    method = FedAMoLE(FedAMoLESettings(experts=9, first_holders=2), Plan(rank=2))
    state = method.init(base, clients)
    tensors = {c.id: {k: torch.zeros(s) for k, s in method.expects(state, c, 1).items()} for c in clients}
    replies = {c: Reply(of, 40) for c, of in tensors.items()}
    whole, *held = method.groups(state, replies, dict.fromkeys(replies, ""))
    assert len(whole.members) == 6
    assert {key.part for key in whole.keys} == {Part.A, Part.B, Part.ROUTER}
    assert [len(group.members) for group in held] == [2] * 18
    covered = {(c, key) for group in (whole, *held) for c in group.members for key in group.keys}
    assert covered == {(c, key) for c in tensors for key in tensors[c] if key.part is not Part.EMBEDDING}


@pytest.mark.parametrize("name", sorted(name for name, kind in methods().items() if kind.no_rules))
def test_a_method_that_no_rule_fits_refuses_it_and_says_what_to_do(name: str, tmp_path: Any) -> None:
    config = check_config({"data": {"datasets": ["demo"]}, "method": {"name": name}, "robust": {"rule": "median"}})
    with pytest.raises(CoterieError, match=rf"\[robust\] does not work with {name}: .*leave \[robust\] out"):
        config.make_method(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("attackers", 1.5), ("rule", "krumm"), ("clip", 1.0), ("min_group", 0)])
def test_a_setting_that_cannot_be_is_an_error(key: str, value: Any) -> None:
    with pytest.raises(CoterieError, match=rf"robust.*{key}"):
        check_config({"data": {"datasets": ["demo"]}, "robust": {key: value}})


# FedLEASE's warm-up ---------------------------------------------------------------------------------------------------

LEASE = BaseSpec((Target("q", 8, 6),))
SITES = [ClientInfo(f"{g}{i}", 10) for g in "ab" for i in range(4)]


def warm(turned: tuple[str, ...] = ()) -> dict[str, Reply]:
    """Warm-up LoRAs of two groups of four, near their group's direction; some of them ``turned`` round."""
    start = FedLEASE(FedLEASESettings(), Plan(rank=2)).begin(LEASE, SITES[0]).tensors
    found = {}
    for number, site in enumerate(SITES):
        moved = {}
        for key, value in start.items():
            draw = torch.Generator().manual_seed(ord(site.id[0]))
            common = torch.randn(value.shape, generator=draw)
            own = torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
            moved[key] = value + (common + 0.3 * own) * (-9 if site.id in turned else 1)
        found[site.id] = Reply(moved, 10)
    return found


def clustered(replies: dict[str, Reply], **robust: Any) -> tuple[FedLEASE, FedLEASEState]:
    method = FedLEASE(
        FedLEASESettings(warmup_rounds=1, max_experts=4, distance="B"), Plan(rank=2, robust=RobustSettings(**robust))
    )
    return method, method.aggregate(method.init(LEASE, SITES), replies, 1)


def test_who_resembles_nobody_is_not_clustered_and_is_reported() -> None:
    turned = ("a0", "b3")
    method, state = clustered(warm(turned), rule="median")
    assert state.allocation is not None
    assert state.outlying == turned
    assert set(state.allocation.clusters) == {c.id for c in SITES} - {*turned}
    assert state.allocation.num_experts == 2
    values = find(method.describe(state), Values)
    assert values is not None
    assert values.values["outlying_warm_up"] == [*turned]
    plain, taken = clustered(warm(turned))
    assert taken.allocation is not None
    assert {*turned} <= taken.allocation.clusters.keys()  # and their expert goes to everyone
    assert "outlying_warm_up" not in find(plain.describe(taken), Values).values  # type: ignore[union-attr]
    assert alone(RobustSettings(), warm(), {client: {} for client in warm()}) == set()


def test_the_expert_of_a_small_cluster_goes_to_no_other() -> None:
    method, state = clustered(warm(), rule="median", min_group=5)
    assert state.allocation is not None
    sent = method.configure(state, SITES, 2)
    own = state.allocation.clusters["a0"]
    other = state.allocation.clusters["b0"]
    assert own != other
    assert not sent["a0"].tensors[Key("q", other, Part.B)].any()
    assert sent["a0"].tensors[Key("q", own, Part.B)].any()
    assert find(method.describe(state), Values).values["withheld_experts"] == [0, 1]  # type: ignore[union-attr]
    method, state = clustered(warm(), rule="median")
    assert method.configure(state, SITES, 2)["a0"].tensors[Key("q", other, Part.B)].any()


@pytest.mark.parametrize(("robust", "least"), [({}, 1), ({"rule": "median"}, 3), ({"clip": 0.5, "min_group": 4}, 4)])
def test_loras_part_no_group_below_min_group(
    monkeypatch: pytest.MonkeyPatch, robust: dict[str, Any], least: int
) -> None:
    real, seen = allocation.allocate, []

    def allocate(*given: Any) -> Any:
        seen.append(given[-1])
        return real(*given)

    monkeypatch.setattr(allocation, "allocate", allocate)
    clustered(warm(), **robust)
    assert seen == [least]


def test_an_expert_starts_as_what_its_cluster_agrees_on() -> None:
    """A liar of a cluster's own direction that is ten times as strong."""
    replies = warm()
    start = FedLEASE(FedLEASESettings(), Plan(rank=2)).begin(LEASE, SITES[0]).tensors
    strong = {key: start[key] + 9 * (value - start[key]) for key, value in replies["a0"].tensors.items()}
    replies["a0"] = replace(replies["a0"], tensors=strong)
    _, state = clustered(replies, rule="median")
    assert state.allocation is not None
    own = state.allocation.clusters["a1"]
    assert state.experts[Key("q", own, Part.B)].norm() < 1.5 * replies["a1"].tensors[B].norm()
