"""FedLEASE's two halves without a model: phases, allocation and its controls, late clients, heads, starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import short_runs
from coterie import codec
from coterie.methods.fedlease.allocation import Allocation
from coterie.methods.fedlease.late import placed
from coterie.methods.fedlease.method import FedLEASE
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.methods.fedlease.state import FedLEASEState
from coterie.methods.findings import Clusters, Values, find
from coterie.methods.plan import Plan
from coterie.ops.streams import stream
from coterie.requests import Train, Trained
from coterie.types import BaseSpec, ClientInfo, CoterieError, HeadParameter, Key, Part, Personal, Reply, Target
from workplaces import equal_bits

BASE = BaseSpec((Target("q", 6, 5), Target("v", 6, 5)), (HeadParameter("score.weight", (-1, 6), "normal"),))
CLIENTS = [ClientInfo(f"{g}{i}", 10 + i, labels=(g, "no"), group=g) for g in "abc" for i in range(3)]
INFO = {c.id: c for c in CLIENTS}


def make(head: str = "personal", clients: Any = CLIENTS, **settings: Any) -> tuple[FedLEASE, FedLEASEState]:
    plan = Plan(rank=2, alpha=4, dropout=0.0, rounds=9, head=head)  # type: ignore[arg-type]
    method = FedLEASE(FedLEASESettings(**{"distance": "B", "warmup_rounds": 2, **settings}), plan)
    return method, method.init(BASE, clients)


def train(request: Train, client: ClientInfo) -> Trained:
    """As if trained: every tensor moves in the direction of the client's group, and a little by itself."""
    moved = {}
    for key in sorted(request.trainable):
        value = request.bank.tensors[key]
        common = torch.randn(value.shape, generator=stream(1, str(client.group), key.module, key.part.value))
        own = torch.randn(value.shape, generator=stream(2, client.id, str(key)))
        moved[key] = value + common + 0.2 * own
    return Trained(moved, 1.0, client.num_train, 100, 5)


def one_round(
    method: FedLEASE, state: FedLEASEState, personal: dict[str, Personal], rnd: int, only: Any = None
) -> FedLEASEState:
    cohort = [c for c in CLIENTS if only is None or c.id in only]
    replies = {}
    for client, ins in method.configure(state, cohort, rnd).items():
        me = INFO[client]
        program = method.client(ins, me, personal.get(client) or method.begin(BASE, me))
        request = next(program)
        assert isinstance(request, Train)
        with pytest.raises(StopIteration) as stop:
            program.send(train(request, me))
        result = stop.value.value
        expected = method.expects(state, me, rnd)
        assert {k: tuple(v.shape) for k, v in result.reply.tensors.items()} == dict(expected)
        replies[client], personal[client] = result.reply, result.personal
    state = method.aggregate(state, replies, rnd)
    return codec.decode(FedLEASEState, codec.encode(state))  # what a crash would leave of it


def run(
    method: FedLEASE, state: FedLEASEState, rounds: int, only: Any = None
) -> tuple[FedLEASEState, dict[str, Personal]]:
    personal: dict[str, Personal] = {}
    for rnd in range(1, rounds + 1):
        state = one_round(method, state, personal, rnd, only)
    return state, personal


def groups_of(state: FedLEASEState) -> set[frozenset[str]]:
    assert state.allocation is not None
    by_cluster: dict[int, set[str]] = {}
    for client, cluster in state.allocation.clusters.items():
        by_cluster.setdefault(cluster, set()).add(client)
    return {frozenset(members) for members in by_cluster.values()}


TRUTH = {frozenset(f"{g}{i}" for i in range(3)) for g in "abc"}


def test_warm_up_sends_nothing_until_its_last_round_and_then_finds_the_groups() -> None:
    method, state = make()
    state, _ = run(method, state, 1)
    assert state.allocation is None
    assert method.describe(state) == [Values({"phase": "warm-up"})]
    assert method.experts(state) == {}
    state, _ = run(method, make()[1], 2)
    assert groups_of(state) == TRUTH
    assert find(method.describe(state), Values) == Values({"phase": "experts"})
    found = find(method.describe(state), Clusters)
    assert found is not None
    assert set(found.silhouettes) == {2, 3, 4}
    assert list(method.experts(state)) == ["expert-0", "expert-1", "expert-2"]
    assert all(key.expert == 0 for tensors in method.experts(state).values() for key in tensors)


def test_experts_start_as_the_mean_of_their_members_a_and_b() -> None:
    method, state = make()
    state, personal = run(method, state, 2)
    assert state.allocation is not None
    for expert in range(3):
        members = state.allocation.members(expert)
        for key in (Key(m, 0, p) for m in "qv" for p in (Part.A, Part.B)):
            mean = torch.stack([personal[c].tensors[key] for c in members]).mean(0)
            torch.testing.assert_close(state.experts[key._replace(expert=expert)], mean)


def test_own_start_keeps_the_clients_lora_as_its_own_expert_and_b_of_the_others_zero() -> None:
    method, state = make(expert_start="own")
    state, personal = run(method, state, 2)
    assert state.allocation is not None
    me = INFO["b1"]
    ins = method.configure(state, [me], 3)["b1"]
    bank, own = method.bank(ins, me, personal["b1"]), state.allocation.clusters["b1"]
    for key in (Key(m, e, Part.B) for m in "qv" for e in range(3)):
        expected = personal["b1"].tensors[key._replace(expert=0)] if key.expert == own else torch.zeros(5, 2)
        torch.testing.assert_close(bank.tensors[key], expected)
    state = one_round(method, state, personal, 3)
    bank = method.bank(method.configure(state, [me], 4)["b1"], me, personal["b1"])
    key = Key("q", own, Part.B)
    torch.testing.assert_close(bank.tensors[key], state.experts[key])  # from here on the cluster's


def test_a_client_trains_own_expert_router_and_head_only() -> None:
    method, state = make()
    state, personal = run(method, state, 2)
    me = INFO["a0"]
    ins = method.configure(state, [me], 3)["a0"]
    request = next(method.client(ins, me, personal["a0"]))
    assert isinstance(request, Train)
    own = ins.info["own"]
    expected = {Key(m, own, p) for m in "qv" for p in (Part.A, Part.B)}
    expected |= {Key(m, -1, Part.ROUTER) for m in "qv"} | {Key("score.weight", -1, Part.HEAD)}
    assert request.trainable == expected
    assert request.bank.tensors[Key("q", -1, Part.ROUTER)].shape == (5, 6)  # 2M - 1 slots
    assert request.bank.gate.options == {"own": own}


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_mean_inside_a_cluster_is_weighted_as_set(weighting: str) -> None:
    method, state = make(weighting=weighting)
    state, _ = run(method, state, 2)
    assert state.allocation is not None
    own = state.allocation.clusters["a0"]
    keys = list(method.expects(state, INFO["a0"], 3))
    sizes = {"a0": 1, "a1": 2, "a2": 5}
    replies = {c: Reply({k: torch.full_like(_like(state, k), float(n)) for k in keys}, n) for c, n in sizes.items()}
    after = method.aggregate(state, replies, 3)
    expected = 8 / 3 if weighting == "uniform" else 30 / 8
    assert after.experts[Key("q", own, Part.A)].unique().tolist() == pytest.approx([expected])
    assert after.routers[own][Key("v", -1, Part.ROUTER)].unique().tolist() == pytest.approx([expected])
    other = (own + 1) % 3
    assert after.experts[Key("q", other, Part.A)].equal(state.experts[Key("q", other, Part.A)])  # nobody replied


def _like(state: FedLEASEState, key: Key) -> torch.Tensor:
    return state.experts[key] if key.part is not Part.ROUTER else state.routers[0][key]


def test_oracle_and_random_allocations_are_controls() -> None:
    state, _ = run(*make(allocation="oracle"), 2)
    assert groups_of(state) == TRUTH
    state, _ = run(*make(allocation="random", experts=3), 2)
    assert groups_of(state) != TRUTH
    assert sorted(len(members) for members in groups_of(state)) == [3, 3, 3]


@pytest.mark.parametrize("distance", ["B", "A", "BA"])
@pytest.mark.parametrize("linkage", ["average", "complete", "single", "kmeans", "spectral"])
def test_every_distance_and_linkage_finds_clear_groups(distance: str, linkage: str) -> None:
    state, _ = run(*make(distance=distance, linkage=linkage, warmup_rounds=1), 1)
    assert groups_of(state) == TRUTH


def test_a_fixed_number_of_experts_and_one() -> None:
    state, _ = run(*make(experts=2), 2)
    assert len(groups_of(state)) == 2
    method, state = make(experts=1)
    state, _ = run(method, state, 3)
    assert len(groups_of(state)) == 1
    assert state.routers[0][Key("q", -1, Part.ROUTER)].shape == (1, 6)


@pytest.mark.parametrize(
    ("routing", "slots", "gate"), [("adaptive", 5, "slot_top_k"), ("top_k", 3, "top_k"), ("dense", 3, "softmax")]
)
def test_routings(routing: str, slots: int, gate: str) -> None:
    method, state = make(routing=routing)
    state, personal = run(method, state, 3)
    ins = method.configure(state, [INFO["c2"]], 4)["c2"]
    bank = method.bank(ins, INFO["c2"], personal["c2"])
    assert bank.gate.name == gate
    assert bank.tensors[Key("q", -1, Part.ROUTER)].shape == (slots, 6)


@pytest.mark.parametrize("router", ["cluster", "personal"])
@pytest.mark.parametrize("start", ["cluster_mean", "own"])
def test_without_a_router_a_client_uses_and_receives_its_clusters_expert_alone(router: str, start: str) -> None:
    method, state = make(routing="own", router=router, expert_start=start)
    state, personal = run(method, state, 4)
    assert groups_of(state) == TRUTH
    assert state.allocation is not None
    own = state.allocation.clusters["c2"]
    lora = {Key(m, own, p) for m in "qv" for p in (Part.A, Part.B)}
    ins = method.configure(state, [INFO["c2"]], 5)["c2"]
    assert set(ins.tensors) == lora
    bank = method.bank(ins, INFO["c2"], personal["c2"])
    assert bank.gate.name == "constant"
    assert {key for key in bank.tensors if key.part is not Part.HEAD} == lora
    assert set(method.expects(state, INFO["c2"], 5)) == lora
    assert {key for key in method._trainable(bank, own) if key.part is not Part.HEAD} == lora


def test_a_late_client_warms_up_and_joins_the_nearest_cluster() -> None:
    method, state = make()
    present = {c.id for c in CLIENTS} - {"b2"}
    state, personal = run(method, state, 2, only=present)
    assert "b2" not in (state.allocation.clusters if state.allocation else {})
    assert method.configure(state, [INFO["b2"]], 3)["b2"].info == {"phase": "warm-up", "send": True}
    state = one_round(method, state, personal, 3)
    assert groups_of(state) == TRUTH
    one_round(method, state, personal, 4)


def test_with_own_start_an_expert_that_others_have_trained_is_used_as_it_is() -> None:
    method, state = make(expert_start="own")
    state, personal = run(method, state, 2)
    state = one_round(method, state, personal, 3, {c.id for c in CLIENTS} - {"b1"})
    assert state.allocation is not None
    bank = method.bank(method.configure(state, [INFO["b1"]], 4)["b1"], INFO["b1"], personal["b1"])
    key = Key("q", state.allocation.clusters["b1"], Part.B)
    assert torch.equal(bank.tensors[key], state.experts[key])
    assert not torch.equal(bank.tensors[key], personal["b1"].tensors[key._replace(expert=0)])


@pytest.mark.parametrize("router", ["cluster", "personal"])
def test_with_own_start_a_lora_is_kept_until_a_reply_counts(router: str) -> None:
    """b1 trains in rounds 3 and 4, but its cluster's replies are lost, and then in a round that counts."""
    method, state = make(expert_start="own", router=router)
    state, personal = run(method, state, 2)
    me, lost = INFO["b1"], {c.id for c in CLIENTS if c.group != "b"}
    own = state.cluster_of("b1")
    assert own is not None
    key, before = Key("q", own, Part.B), [personal["b1"].tensors[Key("q", 0, Part.B)]]
    for rnd in (3, 4):
        one_round(method, state, personal, rnd, {"b0", "b1", "b2"})  # nobody hears of it
        state = one_round(method, state, personal, rnd, lost)
        bank = method.bank(method.configure(state, [me], rnd + 1)["b1"], me, personal["b1"])
        assert bank.tensors[key].any()
        assert not any(bank.tensors[key].equal(b) for b in before)  # each training is kept
        before.append(bank.tensors[key])
    state = one_round(method, state, personal, 5)
    state = one_round(method, state, personal, 6)
    bank = method.bank(method.configure(state, [me], 7)["b1"], me, personal["b1"])
    assert torch.equal(bank.tensors[key], state.experts[key])
    assert {k.part for k in personal["b1"].tensors} <= {Part.HEAD, Part.ROUTER}
    assert personal["b1"].info == {}


def test_with_too_few_warm_up_loras_the_warm_up_goes_on() -> None:
    method, state = make()
    personal: dict[str, Personal] = {}
    for rnd, only in enumerate([{"a0", "b0"}, {"a0", "b0"}], start=1):
        state = one_round(method, state, personal, rnd, only)
    assert state.allocation is None
    assert set(state.warm) == {"a0", "b0"}
    state = one_round(method, state, personal, 3, {"c0", "c1", "a1"})
    assert state.allocation is not None
    assert set(state.allocation.clusters) == {"a0", "b0", "c0", "c1", "a1"}
    assert state.warm == {}


def test_late_clients_of_the_controls_are_placed_by_the_control() -> None:
    present = {c.id for c in CLIENTS if c.group != "c"}
    state, _ = run(*make(allocation="oracle"), 2, only=present)
    assert groups_of(state) == TRUTH
    everyone, _ = run(*make(allocation="random", experts=3), 2)
    some, _ = run(*make(allocation="random", experts=3), 2, only=present)
    assert groups_of(some) == groups_of(everyone)


@pytest.mark.parametrize("allocation", ["oracle", "random", "learned"])
@pytest.mark.parametrize("joins", [1, 2, 3])
def test_a_site_that_joins_in_the_warm_up_or_after_it_is_placed(allocation: str, joins: int) -> None:
    there = [c for c in CLIENTS if c.id != "b2"]
    method, state = make(allocation=allocation, experts=3 if allocation == "random" else 0, clients=there)
    personal: dict[str, Personal] = {}
    for rnd in (1, 2, 3):
        state = method.admit(state, CLIENTS if rnd >= joins else there)
        state = one_round(method, state, personal, rnd, {c.id for c in (CLIENTS if rnd >= joins else there)})
    assert method.admit(state, CLIENTS) is state
    if allocation == "random":
        assert sorted(map(len, groups_of(state))) == [3, 3, 3]
    else:
        assert groups_of(state) == TRUTH


def test_a_late_site_of_a_control_joins_its_group_though_no_sum_has_its_lora() -> None:
    """With secure sums the LoRA of a client by itself stays as it was before training. Group a is the smallest."""
    there = [c for c in CLIENTS if c.id not in ("a1", "a2", "c2")]
    known = [c for c in CLIENTS if c.id not in ("a1", "a2")]
    for settings in ({"allocation": "oracle"}, {"allocation": "oracle", "experts_per_cluster": 2}):
        method, state = make(clients=there, **settings)
        state, _ = run(method, state, 2, {c.id for c in there})
        untrained = Reply(method.begin(BASE, INFO["c2"]).tensors, 5)
        placed = method.aggregate(method.admit(state, known), {"c2": untrained}, 3)
        assert placed.cluster_of("c2") == placed.cluster_of("c0")
        assert placed.allocation is not None
        assert min(len(placed.allocation.members(e)) for e in range(placed.num_experts)) >= 1
    unknown = [replace(c, group=None) if c.id == "c2" else c for c in known]
    placed = method.aggregate(method.admit(state, unknown), {"c2": untrained}, 3)
    assert placed.cluster_of("c2") == placed.cluster_of("a0")  # the smallest


def test_a_late_site_of_random_clusters_joins_the_smallest_whatever_its_group() -> None:
    groups = {"a0": "a", "a1": "a", "b0": "b", "late": "a"}
    made = Allocation({"a0": 0, "a1": 0, "b0": 1}, {}, (), torch.zeros(0, 0))
    for allocation, expert in (("random", 1), ("oracle", 0)):
        settings = FedLEASESettings(allocation=allocation)  # type: ignore[arg-type]
        assert placed(settings, {}, made, groups, {"late": {}}) == {"late": expert}


def test_a_site_without_a_group_joins_the_nearest_cluster_of_an_oracle() -> None:
    there = [c for c in CLIENTS if c.id != "b2"]
    unknown = [replace(c, group=None) if c.id == "b2" else c for c in CLIENTS]
    method, state = make(allocation="oracle", clients=there)
    state, _ = run(method, method.admit(state, unknown), 2)
    assert groups_of(state) == TRUTH


def test_a_late_clients_shared_head_starts_its_group() -> None:
    method, state = make(head="shared", experts=2)
    present = {c.id for c in CLIENTS if c.group != "c"}
    state, personal = run(method, state, 2, only=present)
    state = one_round(method, state, personal, 3)
    key = Key("score.weight", -1, Part.HEAD)
    sent = method.configure(state, CLIENTS, 4)["c0"].tensors[key]
    trained = torch.stack([personal[f"c{i}"].tensors[key] for i in range(3)]).mean(0)
    torch.testing.assert_close(sent, trained)


def test_label_spaces_with_odd_names_do_not_mix() -> None:
    clients = [
        ClientInfo(f"x{i}", 5, labels=labels, group="a")
        for i, labels in enumerate([("a|b", "c"), ("a", "b|c"), ("a|b", "c"), ("a", "b|c")])
    ]
    plan = Plan(rank=2, alpha=4, rounds=9, head="shared")
    method = FedLEASE(FedLEASESettings(distance="B", warmup_rounds=1, experts=1), plan)
    state = method.init(BASE, clients)
    loras = {c.id: method.begin(BASE, c).tensors for c in clients}
    replies = {c: Reply({k: v + 1 for k, v in tensors.items()}, 5) for c, tensors in loras.items()}
    state = method.aggregate(state, replies, 1)
    assert len(state.heads.values) == 2
    assert all(value[Key("score.weight", -1, Part.HEAD)].shape == (2, 6) for value in state.heads.values.values())


def test_personal_routers_stay_with_the_client() -> None:
    method, state = make(router="personal")
    state, personal = run(method, state, 4)
    key = Key("q", -1, Part.ROUTER)
    assert key in personal["a0"].tensors
    me = INFO["a0"]
    ins = method.configure(state, [me], 5)["a0"]
    assert key not in ins.tensors
    assert method.bank(ins, me, personal["a0"]).tensors[key].equal(personal["a0"].tensors[key])


def test_shared_heads_are_averaged_in_a_cluster_with_the_same_labels() -> None:
    method, state = make(head="shared")
    state, _ = run(method, state, 4)
    key = Key("score.weight", -1, Part.HEAD)
    heads = {c.id: method.configure(state, CLIENTS, 5)[c.id].tensors[key] for c in CLIENTS}
    assert heads["a0"].equal(heads["a2"])
    assert not heads["a0"].equal(heads["b0"])


def test_a_frozen_head_is_never_trained_nor_sent() -> None:
    for head in ("personal", "shared"):
        plan = Plan(rank=2, alpha=4, rounds=9, head=head)  # type: ignore[arg-type]
        method = FedLEASE(FedLEASESettings(distance="B", warmup_rounds=1, head="frozen"), plan)
        state, personal = run(method, method.init(BASE, CLIENTS), 3)
        key = Key("score.weight", -1, Part.HEAD)
        start = method.begin(BASE, INFO["a0"]).tensors[key]
        bank = method.bank(method.configure(state, CLIENTS, 4)["a0"], INFO["a0"], personal["a0"])
        assert bank.tensors[key].equal(start)


def test_everyone_starts_from_the_same_a_and_heads_of_the_same_size() -> None:
    method, _ = make()
    starts = [method.begin(BASE, c).tensors for c in CLIENTS]
    assert all(s[key].equal(starts[0][key]) for s in starts for key in starts[0])
    assert all(not starts[0][Key(m, 0, Part.B)].any() for m in "qv")


def test_as_a_control_clients_start_from_different_a() -> None:
    method, _ = make(start="own")
    starts = [method.begin(BASE, c).tensors for c in CLIENTS]
    key, head = Key("q", 0, Part.A), Key("score.weight", -1, Part.HEAD)
    assert not any(starts[i][key].equal(starts[j][key]) for i in range(9) for j in range(i))
    assert starts[0][key].equal(method.begin(BASE, CLIENTS[0]).tensors[key])
    assert starts[0][head].equal(starts[1][head])
    assert not any(s[Key("q", 0, Part.B)].any() for s in starts)


def test_too_few_clients_are_told_a_number_that_works() -> None:
    for few, fix in ((2, "1 or 2"), (1, "1")):
        with pytest.raises(CoterieError, match=rf"3 clients, but there are {few}; set \[method\] experts to {fix}$"):
            make(clients=CLIENTS[:few])
        for experts in map(int, fix.split(" or ")):
            assert make(clients=CLIENTS[:few], experts=experts)


def test_settings_that_cannot_work_are_refused_before_the_run() -> None:
    with pytest.raises(CoterieError, match=r"10 clusters, but there are 9 clients; .* at most 9"):
        make(max_experts=10)
    with pytest.raises(CoterieError, match="at least 3 clients, but there are 2"):
        make(clients=CLIENTS[:2])
    with pytest.raises(CoterieError, match="warmup_rounds = 9 leaves no round"):
        make(warmup_rounds=9)
    assert make(distance="representation", warmup_rounds=9)  # clusters come after round 1
    with pytest.raises(CoterieError, match=r"oracle.*needs a group"):
        make(allocation="oracle", clients=[replace(c, group=None) for c in CLIENTS])
    with pytest.raises(CoterieError, match="no target"):
        make()[0].begin(BaseSpec(()), CLIENTS[0])


# with a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_with_one_cluster_it_is_fedit_bit_for_bit(head: str, tmp_path: Path) -> None:
    """After a warm-up of one round, which starts from FedIT's A and is averaged into the one expert."""
    rows = {"mood-0": 10, "mood-1": 7, "size-0": 4}
    over = [short_runs.shortened(c, rows[c.info.id]) for c in short_runs.clients(*rows)]
    method = short_runs.make("fedlease", head=head, rounds=3, experts=1, warmup_rounds=1, weighting="examples")
    ended = short_runs.run(method, over, tmp_path / "fedlease", rounds=3)
    fedit = short_runs.run(short_runs.make("fedit", head=head, rounds=3), over, tmp_path / "fedit", rounds=3)
    assert equal_bits(method.experts(ended.state)["expert-0"], fedit.state.lora)
    assert ended.state.error == fedit.state.error
    for client in rows:
        tensors = {key: value for key, value in ended.tensors(client).items() if key.part is not Part.ROUTER}
        assert equal_bits(tensors, dict(fedit.tensors(client)))
