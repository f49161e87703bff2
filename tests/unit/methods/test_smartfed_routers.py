"""SmartFed's kinds of router: where they start, what travels, their gates and learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import pools
import tiny
from coterie import codec
from coterie.adapters.pool import cut, read_pool
from coterie.compute.join import join_with
from coterie.engines.bounds import large_updates
from coterie.engines.checks import fault_of
from coterie.methods.base import drive
from coterie.methods.fedit import FedIT
from coterie.methods.findings import Quotas, find
from coterie.methods.plan import Plan
from coterie.methods.robust import RobustSettings, aggregated
from coterie.methods.smartfed.budgets import budgets_of
from coterie.methods.smartfed.method import SmartFed, SmartFedState
from coterie.methods.smartfed.pools import check_ranks
from coterie.methods.smartfed.routers import comparable, start_routers
from coterie.methods.smartfed.settings import SmartFedSettings
from coterie.nn.attach import attached
from coterie.nn.spec import describe
from coterie.requests import Optim, Train, Trained
from coterie.types import NO_EXPERT, SHARED, Bank, ClientInfo, CoterieError, Instruction, Key, Part, Personal, Reply

torch.set_num_threads(1)
BASE = describe(tiny.model("bert"))
ME = ClientInfo("a", 10, labels=("x", "y"))
WEAK = ClientInfo("weak", 10, labels=("x", "y"))
N = 5  # experts of a matrix: adapters of rank 3 and 2
TABLES = {"signed": 1, "mixing": 1 + N, "response": 2}


def made(
    fresh: int = 0, clients: Sequence[ClientInfo] = (), **settings: Any
) -> tuple[SmartFed, SmartFedState, Instruction]:
    chosen = SmartFedSettings(pool=str(pools.for_tiny()), fresh_rank=fresh, **{"router": "paper", **settings})
    method = SmartFed(chosen, Plan(rank=4, alpha=8, dropout=0.0, head="personal"))
    state = method.init(BASE, clients or [ME])
    return method, state, method.configure(state, [ME], 2)[ME.id]


def bank_of(**settings: Any) -> Bank:
    method, _, ins = made(**settings)
    return method.bank(ins, ME, Personal())


def effect(bank: Bank) -> Tensor:
    model = tiny.model("bert").double().eval()
    double = Bank({k: v.double() for k, v in bank.tensors.items()}, bank.gate, bank.scaling)
    with torch.no_grad(), attached(model, double):
        return model(torch.tensor([[5, 9, 12, 7]])).logits


@pytest.mark.parametrize("router", TABLES)
def test_a_table_travels_instead_of_rows_as_wide_as_the_input(router: str) -> None:
    method, state, ins = made(router=router)
    routers = {key: value for key, value in ins.tensors.items() if key.part is Part.ROUTER}
    assert {tuple(value.shape) for value in routers.values()} == {(N, TABLES[router])}
    assert {key: method.expects(state, ME, 2)[key] for key in routers} == {
        k: tuple(v.shape) for k, v in routers.items()
    }
    assert len(routers) == len(BASE.targets)
    assert made(router="response", router_rank=2)[1].routers.popitem()[1].shape == (N, 6)


@pytest.mark.parametrize("router", ["signed", "mixing"])
def test_signed_weights_start_as_the_whole_pool_at_the_budgets_share(router: str) -> None:
    """With K = N they are the plain sum of the pool's adapters, and nothing is mixed."""
    bank = bank_of(router=router, active=N)
    assert bank.gate.name == router
    plain = {k: v for k, v in bank.tensors.items() if k.part is not Part.ROUTER}
    torch.testing.assert_close(effect(bank), effect(Bank(plain)), rtol=0, atol=1e-9)
    at_two = [v for k, v in bank_of(router=router, active=2).tensors.items() if k.part is Part.ROUTER]
    assert torch.stack([v[:, 0] for v in at_two]).unique().tolist() == pytest.approx([0.4])
    assert not any(v[:, 1:].any() for v in at_two)


def test_no_adapter_comes_first_where_a_few_are_active() -> None:
    """The weights are alike but for a little chance: which are the largest differs from matrix to matrix."""
    started = tables(bank_of(router="signed", active=2, sparse=True))
    torch.testing.assert_close(started, torch.ones_like(started), rtol=0, atol=1e-3)
    largest = {tuple(weights.topk(2).indices.sort().values.tolist()) for weights in started.view(-1, N)}
    assert len(largest) > 1


def tables(bank: Bank) -> Tensor:
    return torch.cat([v.flatten() for k, v in bank.tensors.items() if k.part is Part.ROUTER])


@pytest.mark.parametrize(
    ("unfit", "named"), [({"granularity": "adapter"}, "granularity"), ({"sparse": True}, "sparse")]
)
def test_mixing_needs_all_experts_of_rank_1(unfit: dict[str, Any], named: str) -> None:
    with pytest.raises(CoterieError, match=f'router = "mixing" needs all experts, of rank 1 each; remove {named} = '):
        made(router="mixing", **unfit)


def test_response_starts_with_the_experts_whose_a_responds() -> None:
    settings = SmartFedSettings(router="response", router_rank=2, active=2)
    table = start_routers(settings, 0, {"m": (N, 7)})[Key("m", NO_EXPERT, Part.ROUTER)]
    assert table[:, :2].tolist() == [[pytest.approx(0.2)] * 2] * N
    assert not table[:, 2:4].any()
    assert table[:, 4:].any()


@pytest.mark.parametrize("router", ["mixing", "response"])
def test_what_each_a_finds_has_one_scale(router: str) -> None:
    a = [value for key, value in bank_of(router=router).tensors.items() if key.part is Part.A]
    assert len(a) == N * len(BASE.targets)
    torch.testing.assert_close(torch.stack([v.norm() for v in a]), torch.ones(len(a)))


def test_response_over_whole_adapters_of_several_ranks_is_refused() -> None:
    """Its |A x| would have another length for each expert."""
    with pytest.raises(CoterieError, match=r"adapters of one rank, and the pool has 2, 3 in .*; set granularity"):
        made(router="response", granularity="adapter")
    made(router="signed", granularity="adapter")
    settings, pool = SmartFedSettings(router="response", granularity="adapter"), read_pool(Path(pools.for_tiny()))
    check_ranks(settings, pool, {adapter.name for adapter in pool.adapters if adapter.rank != 2})


def test_comparable_experts_compute_the_same_and_trained_ones_stay() -> None:
    pieces = cut(read_pool(Path(pools.for_tiny())).tensors)
    some = sorted(pieces)[0]
    scaled = comparable(pieces, {some})
    assert scaled[some] is pieces[some]
    for key, a in pieces.items():
        if key.part is Part.A:
            b = key._replace(part=Part.B)
            torch.testing.assert_close(scaled[b] @ scaled[key], pieces[b] @ a)


@pytest.mark.parametrize("router", ["signed", "response"])
def test_only_sparse_tables_have_quotas(router: str) -> None:
    _, dense, _ = made(router=router, active=2)
    assert set(dense.quotas.values()) == {N}
    assert not bank_of(router=router, active=2).gate.per_module
    _, sparse, _ = made(router=router, active=2, sparse=True)
    assert set(sparse.quotas.values()) == {2}
    gate = bank_of(router=router, active=2, sparse=True).gate
    assert {gate.options_for(t.name)["k"] for t in BASE.targets} == {2}


def test_a_fixed_total_does_not_change_with_the_quota() -> None:
    gate = bank_of(gate_scale="budget", active=3).gate
    assert gate.options == {"k": 3, "scale": 3.0}
    assert bank_of(active=3).gate.options == {"k": 3, "scale": "active"}


def test_routers_head_and_fresh_expert_have_learning_rates_of_their_own() -> None:
    rates = rates_in(1, fresh=2, router_rate=5.0, head_rate=0.5, fresh_rate=2.0)
    wanted = {Part.ROUTER: 5.0, Part.HEAD: 0.5, Part.A: 2.0, Part.B: 2.0}
    assert {key.part for key in rates} == set(wanted)
    assert all(rate == wanted[key.part] for key, rate in rates.items())
    assert all(key.expert == SHARED for key in rates if key.part in (Part.A, Part.B))


def test_the_routers_rate_alone_decays_from_round_to_round() -> None:
    for rnd, left in ((1, 1.0), (2, 0.5), (4, 0.125)):
        rates = rates_in(rnd, fresh=2, router_rate=8.0, router_decay=0.5)
        assert {key.part: rate for key, rate in rates.items()} == {
            Part.ROUTER: 8.0 * left, Part.HEAD: 1.0, Part.A: 1.0, Part.B: 1.0
        }  # fmt: skip


@pytest.mark.parametrize(("router", "rate"), [("paper", 0.004), ("signed", 0.2), ("mixing", 0.1), ("response", 0.1)])
def test_a_router_has_a_rate_and_a_decay_of_its_own_where_none_are_set(router: str, rate: float) -> None:
    """Whatever the learning rate of the rest, unless it is the paper's router."""
    decay = 1.0 if router == "paper" else 0.9
    for rnd in (1, 3):
        for key, factor in rates_in(rnd, 0.004, fresh=2, router=router).items():
            wanted = rate * decay ** (rnd - 1) if key.part is Part.ROUTER else 0.004
            assert 0.004 * factor == pytest.approx(wanted)
    for steady in (
        rates_in(3, router=router, router_rate=7.0),
        rates_in(3, router=router, router_rate=7.0, router_decay=1.0),
    ):
        assert {factor for key, factor in steady.items() if key.part is Part.ROUTER} == {7.0}


def test_an_honest_router_that_moves_while_others_rest_is_not_left_out() -> None:
    """At a rate of .2 six steps move a weight by .2 sqrt 6 and more; at that of [train] they could not."""
    moved = {"a": 0.001, "b": 0.002, "rest": 0.001, "c": 0.15, "d": 5.0}
    sizes = {client: {Part.ROUTER: far} for client, far in moved.items()}
    steps = dict.fromkeys(sizes, 6)
    method = made(router="signed")[0]
    assert method.fastest(1)[Part.ROUTER] == pytest.approx(0.2 / method.plan.optim.learning_rate)
    for smart, left_out in ((method, ["d"]), (made(router="paper")[0], ["c", "d"])):
        rate = smart.plan.optim.learning_rate
        assert [*large_updates(sizes, steps, 10, rate, smart.fastest(1))] == left_out


def test_a_rule_sees_a_fresh_expert_apart_from_weights_that_move_a_hundred_times_as_far() -> None:
    """A bad fresh expert is shorter than what the routers of honest clients differ by, and yet has no weight."""
    method, state, _ = made(router="signed", fresh=2)
    rule = replace(method, plan=replace(method.plan, robust=RobustSettings(rule="krum")))
    draw, replies = torch.Generator().manual_seed(0), {}
    for client in "abcd":
        steps = {Part.ROUTER: 1.0, Part.A: 0.01, Part.B: 0.01}
        moved = {k: v + steps[k.part] * torch.ones_like(v) for k, v in {**state.routers, **state.fresh}.items()}
        moved |= {k: v + 0.5 * torch.randn(v.shape, generator=draw) for k, v in moved.items() if k.part is Part.ROUTER}
        bad = {k: state.fresh[k] - 0.05 for k in state.fresh} if client == "d" else {}
        replies[client] = Reply({**moved, **bad}, 10)
    spaces = dict.fromkeys(replies, "")
    groups = rule.groups(state, replies, spaces)
    assert [{key.part for key in group.keys} for group in groups] == [{Part.A, Part.B}, {Part.ROUTER}]
    assert len(method.groups(state, replies, spaces)) == 1
    starts = {client: {**state.routers, **state.fresh} for client in replies}
    after, _ = aggregated(rule.plan.robust, groups, replies, starts)
    for key, value in state.fresh.items():
        torch.testing.assert_close(after["a"].tensors[key], value + 0.01)


def test_the_default_router_is_signed_and_the_papers_is_a_setting() -> None:
    state = SmartFed(SmartFedSettings(pool=str(pools.for_tiny())), Plan()).init(BASE, [ME])
    assert {tuple(value.shape) for value in state.routers.values()} == {(N, 1)}
    assert {tuple(value.shape) for value in made(router="paper")[1].routers.values()} == {(N, 32)}


def rates_in(rnd: int, learning_rate: float = 0.002, **settings: Any) -> Mapping[Key, float]:
    """The factors on the learning rates in the request to train of round ``rnd``."""
    method, _, _ = made(**settings)
    method = replace(method, plan=replace(method.plan, optim=Optim(learning_rate=learning_rate)))
    ins = method.configure(method.init(BASE, [ME]), [ME], rnd)[ME.id]
    seen: list[Train] = []

    class Hand:
        def train(self, request: Train) -> Trained:
            seen.append(request)
            return Trained({key: request.bank.tensors[key] for key in request.trainable}, 0.5, 10, 100, 5)

    ins = Instruction(ins.tensors, {**ins.info, "measure": False})
    drive(method.client(ins, ME, method.begin(BASE, ME)), Hand())  # type: ignore[arg-type]
    assert seen[0].rates.keys() == seen[0].trainable
    return seen[0].rates


@pytest.mark.parametrize("router", ["mixing", "response"])
def test_dropped_adapters_take_their_rows_of_the_table_with_them(router: str) -> None:
    """What the table mixes into them goes too: the columns that are left are those of the rows that are."""
    method, state, _ = made(router=router, drop_below=0.5)
    routers = {key: torch.arange(float(v.numel())).view_as(v) for key, v in state.routers.items()}
    info = {"importance": dict.fromkeys({k.module for k in routers}, 1.0), "use": {"one": 0.0, "two": 1.0}}
    after = method.aggregate(state, {"a": Reply(routers, 10, info)}, 1)
    assert after.dropped == ("one",)
    columns = {"mixing": [0, 4, 5], "response": [0, 1]}[router]
    assert all(torch.equal(v, routers[key][3:][:, columns]) for key, v in after.routers.items())
    assert set(after.quotas.values()) == {2}


@pytest.mark.parametrize("router", [{}, {"router": "signed", "sparse": True}])
def test_a_weak_client_activates_fewer_experts_and_the_federation_still_averages(router: dict[str, Any]) -> None:
    method, state, _ = made(active=4, budgets={"weak": 1}, clients=[ME, WEAK], **router)
    sent = method.configure(state, [ME, WEAK], 1)
    ks = [
        {method.bank(ins, ME, Personal()).gate.options_for(t.name)["k"] for t in BASE.targets} for ins in sent.values()
    ]
    assert ks == [{4}, {1}]
    moved = {c: {key: value + i for key, value in state.routers.items()} for i, c in enumerate(sent)}
    assert sent["weak"].info["active"] == 1
    after = method.aggregate(state, {c: Reply(tensors, 10) for c, tensors in moved.items()}, 1)
    assert all(torch.allclose(after.routers[key], value + 0.5) for key, value in state.routers.items())


def test_importance_of_fewer_active_experts_counts_as_that_of_all() -> None:
    method, state, _ = made(active=4, budgets={"weak": 2}, clients=[ME, WEAK])
    modules = sorted(state.quotas)
    use = {"one": 0.5, "two": 0.5}
    of = {"a": 4.0, "weak": 2.0}  # every active expert matters alike: the sum grows with their number
    own = {"weak": {"active": 2}}
    replies = {
        c: Reply(state.routers, 10, {"importance": dict.fromkeys(modules, v), "use": use, **own.get(c, {})})
        for c, v in of.items()
    }
    after = method.aggregate(state, replies, 1)
    assert set(after.importance.values()) == {1.0}
    assert sum(method.configure(after, [WEAK], 2)["weak"].info["quotas"].values()) == 2 * len(modules)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": {"nobody": 2}}, "'nobody', which is not a client"),
        ({"budgets": {"a": 2}, "router": "signed"}, "sparse = true"),
        ({"budgets": {"a": 2}, "router": "mixing"}, 'router = "paper", or leave it out'),
    ],
)
def test_budgets_that_cannot_work_say_so(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CoterieError, match=message):
        made(**settings)


def test_the_smaller_of_a_sites_own_limit_and_the_servers_counts() -> None:
    settings = SmartFedSettings(active=4, budgets={"both": 3, "more": 9})
    clients = [ClientInfo(c, 10, active=active) for c, active in (("a", None), ("b", 2), ("both", 2), ("more", 6))]
    assert budgets_of(settings, clients) == {"b": 2, "both": 2, "more": 6}
    assert budgets_of(settings, [ClientInfo("a", 10, active=4), ClientInfo("both", 10, active=8)]) == {"both": 3}


def test_a_site_that_joins_late_or_changes_its_limit_is_followed() -> None:
    method, state, _ = made(active=4, clients=[ME, WEAK])
    assert state.budgets == {}
    for active, quota, budgets in ((1, 1, {"weak": 1}), (3, 3, {"weak": 3}), (None, 4, {})):
        weak = replace(WEAK, active=active)
        ins = method.configure(state, [ME, weak], 1)["weak"]
        assert {*ins.info["quotas"].values()} == {quota}
        own = {name: ins.info[name] for name in ("active",) if name in ins.info}
        assert method.expects_info(state, weak, 1).keys() == {"importance", "use", *own}
        state = method.aggregate(state, {"weak": Reply(state.routers, 10, own)}, 1)
        assert state.budgets == budgets
        found = find(method.describe(state), Quotas)
        assert found is not None
        assert found.budgets == budgets


def test_the_budget_of_a_client_that_misses_a_round_stays_on_record() -> None:
    method, state, _ = made(active=4, budgets={"weak": 1}, clients=[ME, WEAK])
    assert method.aggregate(state, {ME.id: Reply(state.routers, 10)}, 1).budgets == {"weak": 1}


def test_the_budget_of_a_client_that_left_is_forgotten() -> None:
    method, state, _ = made(active=4, budgets={"weak": 1}, clients=[ME, WEAK])
    assert method.admit(state, [ME, WEAK]) is state
    assert method.admit(state, [ME]).budgets == {}
    assert method.admit(state, [WEAK]).budgets == {"weak": 1}


def test_a_client_must_answer_for_the_budget_that_it_was_sent() -> None:
    method, state, _ = made(active=4, budgets={"weak": 1}, clients=[ME, WEAK])
    for info, fault in (({"active": 1}, None), ({}, "lacks active"), ({"active": 4}, "active is 4, not an integer")):
        found = fault_of(
            Reply(state.routers, 10, info),
            {k: tuple(v.shape) for k, v in state.routers.items()},
            1e9,
            10,
            method.expects_info(state, WEAK, 1),
        )
        assert (found is None) if fault is None else (found is not None and fault in found)


def test_budgets_that_all_equal_the_runs_change_nothing() -> None:
    """Every instruction has the same bytes, and so has all that follows from it."""
    plain, state, _ = made(active=3, clients=[ME, WEAK])
    alike, other, _ = made(active=3, budgets={"a": 3, "weak": 3}, clients=[ME, replace(WEAK, active=3)])
    assert codec.encode(state) == codec.encode(other)
    for rnd in (1, 2):
        assert codec.encode(plain.configure(state, [ME, WEAK], rnd)) == codec.encode(
            alike.configure(other, [ME, replace(WEAK, active=3)], rnd)
        )


def test_methods_without_quotas_say_so() -> None:
    assert made()[0].active_fault() == ""
    assert "sparse = true" in made(router="signed")[0].active_fault()
    assert FedIT(FedIT.Settings(), Plan()).active_fault() == (
        "fedit activates the same experts at every client; leave it out"
    )


@pytest.mark.parametrize("bound", [0.01, 0.99, -1.0, float("nan")])
def test_no_bound_of_the_pool_is_below_what_is_usual(bound: float) -> None:
    with pytest.raises(ValidationError, match="pool_bound"):
        SmartFedSettings(pool_bound=bound)
    assert [SmartFedSettings(pool_bound=fine).pool_bound for fine in (0.0, 1.0, 1e9)] == [0.0, 1.0, 1e9]


@pytest.mark.parametrize(("settings", "rate"), [({"router_rate": 30.0, "router_decay": 0.5}, 30.0), ({}, 100.0)])
def test_a_newcomer_trains_with_the_methods_learning_rates(settings: dict[str, float], rate: float) -> None:
    """Those of a first round; 100 times .002 is the routers' own."""
    method, state, _ = made(router="signed", head_rate=3.0, **settings)
    requests: list[Train] = []

    class Local:
        workplace = SimpleNamespace(base=SimpleNamespace(spec=BASE))
        client = SimpleNamespace(info=WEAK, splits={"test": []})

        def train(self, request: Train) -> Trained:
            requests.append(request)
            return Trained({key: request.bank.tensors[key] for key in request.trainable}, 0.5, 10, 100, 5)

    join_with(method, method.welcome(state, WEAK), Local(), epochs=1)
    (request,) = requests
    assert request.rates.keys() == request.trainable
    assert {(key.part, factor) for key, factor in request.rates.items()} == {(Part.ROUTER, rate), (Part.HEAD, 3.0)}
