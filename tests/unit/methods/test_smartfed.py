"""SmartFed: the pool travels once, only routers train, quotas follow what clients measure, and the extras."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pools
import tiny
from coterie import codec
from coterie.adapters.pool import Pool, cut, name_of, read_pool, write_pool
from coterie.engines.checks import fault_of
from coterie.methods.base import drive
from coterie.methods.fedit import FedIT
from coterie.methods.findings import AggregationError, Notes, Quotas, find
from coterie.methods.parts import start_head
from coterie.methods.plan import MethodSettings, Plan
from coterie.methods.robust import RobustSettings
from coterie.methods.smartfed.method import SmartFed, SmartFedState
from coterie.methods.smartfed.settings import SmartFedSettings
from coterie.nn.attach import attached
from coterie.nn.spec import describe
from coterie.requests import ExpertUse, Observe, Observed, Score, Scored, Train, Trained
from coterie.types import (
    SHARED,
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    CoterieError,
    Instruction,
    Key,
    Part,
    Personal,
    Reply,
)

torch.set_num_threads(1)
BASE = describe(tiny.model("bert"))
CLIENTS = [ClientInfo(c, n, labels=("x", "y")) for c, n in (("a", 10), ("b", 30))]
RANKS = {"one": 3, "two": 2}
M = len(BASE.targets)


def smartfed(folder: Path | str | None = None, head: Any = "personal", **settings: Any) -> SmartFed:
    plan = Plan(rank=4, alpha=8, dropout=0.0, head=head)
    return SmartFed(SmartFedSettings(pool=str(folder or pools.for_tiny()), **{"router": "paper", **settings}), plan)


class Hand:
    """Compute by hand: training adds ``step`` to every trainable tensor; statistics are as given."""

    def __init__(self, step: float = 1.0, importance: Mapping[str, float] | None = None, use: int = 0) -> None:
        self.step, self.values, self.use = step, importance or {}, use
        self.banks: list[Bank] = []

    def train(self, request: Train) -> Trained:
        self.banks.append(request.bank)
        tensors = {key: request.bank.tensors[key] + self.step for key in request.trainable}
        return Trained(tensors, 0.5, 10, 100, 5)

    def score(self, request: Score) -> list[Scored]:
        return [Scored(1.0 + 0.1 * (i % 3), {}, 1) for i, _ in enumerate(request.banks)]

    def observe(self, request: Observe) -> Observed:
        usage = {}
        for module in sorted({key.module for key in request.bank.tensors if key.part is Part.ROUTER}):
            numbers = sorted(k.expert for k in request.bank.tensors if k.module == module and k.part is Part.A)
            routed = [n for n in numbers if n >= 0]
            weights = [1.0 if n == SHARED or n == routed[self.use] else 0.0 for n in numbers]
            usage[module] = ExpertUse(weights, weights, numbers)
        found = {m: self.values.get(m, 0.0) for m in usage}
        return Observed(usage, 100, importance={w: found for w in request.what if w != "usage"})


def play(
    method: SmartFed, state: SmartFedState, rnd: int, personal: dict[ClientId, Personal], hand: Hand, *who: ClientId
) -> tuple[SmartFedState, dict[ClientId, Instruction], dict[ClientId, Reply]]:
    infos = [c for c in CLIENTS if not who or c.id in who]
    sent = dict(method.configure(state, infos, rnd))
    replies = {}
    for me in infos:
        ins = codec.decode(Instruction, codec.encode(sent[me.id]))
        result = drive(method.client(ins, me, personal[me.id]), hand)
        shapes = {key: tuple(value.shape) for key, value in result.reply.tensors.items()}
        assert shapes == method.expects(state, me, rnd)
        replies[me.id], personal[me.id] = result.reply, result.personal
    state = method.aggregate(state, replies, rnd)
    return codec.decode(SmartFedState, codec.encode(state)), sent, replies


def begun(method: SmartFed) -> tuple[SmartFedState, dict[ClientId, Personal]]:
    return method.init(BASE, CLIENTS), {c.id: method.begin(BASE, c) for c in CLIENTS}


def parts(tensors: Mapping[Key, Tensor]) -> set[Part]:
    return {key.part for key in tensors}


# what travels and what trains ----------------------------------------------------------------------------------------


def test_the_pool_travels_once_and_only_routers_after_it() -> None:
    method, hand = smartfed(), Hand()
    state, personal = begun(method)
    state, first, replies = play(method, state, 1, personal, hand)
    pool = read_pool(Path(pools.for_tiny()))
    sent = {k: v for k, v in first["a"].tensors.items() if k.part in (Part.A, Part.B)}
    assert sum(v.nbytes for v in sent.values()) == sum(v.nbytes for v in pool.tensors.values())
    assert first["a"].info["pool"] == pool.name
    assert parts(replies["a"].tensors) == {Part.ROUTER}
    bank = hand.banks[0]
    assert len([k for k in bank.tensors if k.part is Part.A]) == 5 * M
    state, second, _ = play(method, state, 2, personal, hand)
    assert parts(second["a"].tensors) == {Part.ROUTER}
    for key, value in cut(pool.tensors).items():
        kept = hand.banks[-1].tensors[key._replace(module=f"bert.{key.module}")]
        assert torch.equal(kept, value)


def test_a_client_that_comes_later_is_sent_the_pool_then() -> None:
    method, hand = smartfed(), Hand()
    state, personal = begun(method)
    state, _, _ = play(method, state, 1, personal, hand, "a")
    assert state.holders == ("a",)
    ins = method.configure(state, CLIENTS, 2)
    assert [ins[c].info["sent"] for c in ("a", "b")] == [False, True]
    assert method.bank(ins["b"], CLIENTS[1], personal["b"]).tensors.keys() == {
        *method.bank(ins["a"], CLIENTS[0], personal["a"]).tensors
    }
    lost = method.begin(BASE, CLIENTS[0])
    with pytest.raises(CoterieError, match="has lost the pool"):
        method.bank(ins["a"], CLIENTS[0], lost)


def test_a_client_that_lost_the_pool_says_so_and_is_sent_it_again() -> None:
    method, hand = smartfed(), Hand()
    state, personal = begun(method)
    state, _, _ = play(method, state, 1, personal, hand)
    before, banks = state, len(hand.banks)
    personal["a"] = method.begin(BASE, CLIENTS[0])
    state, sent, replies = play(method, state, 2, personal, hand)
    assert not sent["a"].info["sent"]
    assert replies["a"].info == {"lacks_pool": True}
    assert len(hand.banks) == banks + 1  # only b trained, and only b counts
    for key, value in state.routers.items():
        assert torch.equal(value, replies["b"].tensors[key])
    assert state.holders == ("b",)
    state, sent, replies = play(method, state, 3, personal, hand)
    assert [sent[c].info["sent"] for c in ("a", "b")] == [True, False]
    assert replies["a"].info["loss"] == 0.5
    assert state.holders == ("a", "b")
    personal["b"] = replace(personal["b"], kept=None)  # the file is gone, the state is not
    state, sent, replies = play(method, state, 4, personal, hand)
    assert (sent["b"].info["sent"], replies["b"].info) == (False, {"lacks_pool": True})
    alone = {"a": Reply(replies["a"].tensors, 10, {"lacks_pool": True})}
    assert codec.encode(method.aggregate(before, alone, 2)) == codec.encode(replace(before, holders=("b",)))


def test_with_the_pool_everywhere_nothing_of_it_travels() -> None:
    method, other, hand = smartfed(pool_at="everywhere"), smartfed(), Hand()
    state, personal = begun(method)
    theirs, kept = begun(other)
    state, sent, _ = play(method, state, 1, personal, hand)
    theirs, _, _ = play(other, theirs, 1, kept, Hand())
    assert parts(sent["a"].tensors) == {Part.ROUTER}
    assert parts(personal["a"].tensors) == {Part.HEAD}
    assert codec.encode(state.routers) == codec.encode(theirs.routers)


def test_routers_are_averaged_by_examples() -> None:
    method = smartfed()
    state, personal = begun(method)
    start = dict(state.routers)
    ins = method.configure(state, CLIENTS, 2)
    replies = {}
    for me, step in zip(CLIENTS, (1.0, 5.0), strict=True):
        replies[me.id] = drive(method.client(ins[me.id], me, personal[me.id]), Hand(step)).reply
    state = method.aggregate(state, replies, 2)
    for key, value in state.routers.items():
        assert torch.allclose(value, start[key] + (10 * 1 + 30 * 5) / 40)


def test_a_shared_head_travels_and_a_personal_one_stays() -> None:
    for head in ("shared", "personal"):
        method = smartfed(head=head)
        state, personal = begun(method)
        _, _, replies = play(method, state, 1, personal, Hand())
        assert (Part.HEAD in parts(replies["a"].tensors)) == (head == "shared")
        assert (Part.HEAD in parts(personal["a"].tensors)) == (head == "personal")


# the layer -----------------------------------------------------------------------------------------------------------


def effect(model: Any, bank: Bank) -> Tensor:
    with attached(model, bank), torch.no_grad():
        found: Tensor = model(**tiny.batch()).logits
    return found


def test_equal_weights_over_one_modules_ranks_give_that_module_back(tmp_path: Path) -> None:
    pool = pools.made(BASE.targets, {"one": 4})
    write_pool(tmp_path / "pool", pool)
    model = tiny.model("bert").double()
    plain = {k._replace(module=f"bert.{k.module}"): v.double() for k, v in pool.tensors.items()}
    for settings in ({}, {"fresh_rank": 2}):
        method = smartfed(tmp_path / "pool", active=4, **settings)
        state, personal = begun(method)
        state = replace(state, routers={k: torch.zeros_like(v) for k, v in state.routers.items()})
        bank = method.bank(method.configure(state, CLIENTS, 1)["a"], CLIENTS[0], personal["a"])
        wide = replace(bank, tensors={k: v.double() for k, v in bank.tensors.items() if k.part is not Part.HEAD})
        expected = effect(model, Bank(plain))
        assert (effect(model, wide) - expected).abs().max() < 1e-6
        one = replace(wide, gate=replace(wide.gate, options={**wide.gate.options, "scale": "one"}))
        quarter = Bank({k: v / 4 if k.part is Part.B else v for k, v in plain.items()})
        assert (effect(model, one) - effect(model, quarter)).abs().max() < 1e-6


def test_the_quotas_are_the_gates_k() -> None:
    method = smartfed(active=3)
    state, personal = begun(method)
    quotas = {key.module: 2 + i % 3 for i, key in enumerate(sorted(state.routers))}
    state = replace(state, quotas=quotas)
    bank = method.bank(method.configure(state, CLIENTS, 1)["a"], CLIENTS[0], personal["a"])
    assert bank.gate.name == "top_k"
    for module, k in quotas.items():
        assert bank.gate.options_for(module) == {"k": k, "scale": "active"}


# EEQA ----------------------------------------------------------------------------------------------------------------


def test_quotas_follow_the_importance_that_clients_measure() -> None:
    method = smartfed(active=3, quota_interval=2)
    state, personal = begun(method)
    modules = sorted(key.module for key in state.routers)
    assert state.quotas == dict.fromkeys(modules, 3)
    chosen = {modules[0]: 1.0}
    state, _, replies = play(method, state, 1, personal, Hand(importance=chosen))
    assert replies["a"].info["importance"] == {m: chosen.get(m, 0.0) for m in modules}
    # floors of 2; the first matrix has 5 experts and takes 3 more; what is left is shared alike
    assert sum(state.quotas.values()) == 3 * M
    assert state.quotas[modules[0]] == 5
    assert all(state.quotas[m] >= 2 for m in modules)
    before = state.quotas
    state, _, replies = play(method, state, 2, personal, Hand(importance={modules[1]: 1.0}))
    assert "importance" not in replies["a"].info
    assert state.quotas == before
    state, _, _ = play(method, state, 3, personal, Hand(importance={modules[1]: 1.0}))
    assert state.quotas[modules[1]] == 5
    assert state.measured_by == ("a", "b")


def test_a_matrix_does_not_get_more_for_having_more() -> None:
    """Weights that add up to K_m make every sum over a matrix's experts grow with K_m."""
    quotas = {}
    for per_active in (True, False):
        method = smartfed(active=3, quota_interval=1, per_active=per_active)
        state, personal = begun(method)
        modules = sorted(key.module for key in state.routers)
        state = replace(state, quotas=dict(zip(modules, [5, *[3] * (M - 2), 1], strict=True)))
        each = {m: float(k) for m, k in state.quotas.items()}  # every active expert matters alike
        state, _, _ = play(method, state, 1, personal, Hand(importance=each))
        quotas[per_active] = [state.quotas[m] for m in modules]
        assert state.importance == (dict.fromkeys(modules, 1.0) if per_active else each)
    assert quotas[True] == [3] * M
    assert quotas[False][0] > quotas[False][-1]


def test_without_eeqa_the_quotas_stay() -> None:
    method = smartfed(active=3, quota="uniform")
    state, personal = begun(method)
    state, _, _ = play(method, state, 1, personal, Hand(importance={BASE.targets[0].name: 1.0}))
    assert set(state.quotas.values()) == {3}


def test_ablation_measures_the_loss_without_each_matrix() -> None:
    method = smartfed(importance="ablation")
    state, personal = begun(method)
    _, _, replies = play(method, state, 1, personal, Hand())
    values = list(replies["a"].info["importance"].values())
    assert values == pytest.approx([0.1 * (i % 3) for i in range(1, M + 1)])


@pytest.mark.parametrize(
    "lie",
    [{"importance": {"x": 1.0}}, {"importance": None}, {"use": {}}, {"importance": math.nan}, {"importance": 10**400}],
    ids=["others", "none", "no use", "nan", "beyond floats"],
)
def test_a_senseless_measurement_is_refused_and_a_missing_one_does_not_count(lie: dict[str, Any]) -> None:
    method = smartfed(active=3)
    state, personal = begun(method)
    ins = method.configure(state, CLIENTS, 1)
    replies = {c.id: drive(method.client(ins[c.id], c, personal[c.id]), Hand()).reply for c in CLIENTS}
    if isinstance(number := lie.get("importance"), (int, float)):
        lie = {"importance": dict.fromkeys(replies["a"].info["importance"], number)}
    wanted, info = method.expects(state, CLIENTS[0], 1), method.expects_info(state, CLIENTS[0], 1)
    num_train = CLIENTS[0].num_train
    assert fault_of(replies["a"], wanted, 1e4, num_train, info) is None
    wrong = replace(replies["a"], info={**replies["a"].info, **lie})
    reason = fault_of(wrong, wanted, 1e4, num_train, info) or ""
    assert reason.startswith((f"the reply's {next(iter(lie))}", "the reply's JSON"))
    silent = {name: value for name, value in replies["a"].info.items() if name not in lie}
    replies["a"] = replace(replies["a"], info=silent)
    assert fault_of(replies["a"], wanted, 1e4, num_train, info) is None
    assert method.aggregate(state, replies, 1).measured_by == ("b",)


# extras --------------------------------------------------------------------------------------------------------------


def test_a_starved_adapter_is_dropped_and_reported_and_its_rows_with_it() -> None:
    method = smartfed(active=3, drop_below=0.5)
    state, personal = begun(method)
    rows = dict(state.routers)
    state, _, _ = play(method, state, 1, personal, Hand(step=0.0))  # all weight on expert 0, of "one"
    quotas = find(method.describe(state), Quotas)
    assert quotas is not None
    assert quotas.dropped == ("two",)
    assert quotas.use == {"one": 1.0, "two": 0.0}
    assert all(torch.equal(value, rows[key][:3]) for key, value in state.routers.items())
    assert sum(state.quotas.values()) == 3 * M
    hand = Hand(step=0.0)
    state, _, _ = play(method, state, 2, personal, hand)
    assert {k.expert for k in hand.banks[0].tensors if k.part is Part.A} == {0, 1, 2}
    state, _, _ = play(method, state, 3, personal, hand)
    assert state.dropped == ("two",)  # the last one stays


@pytest.mark.parametrize("pool_at", ["server", "everywhere"])
def test_an_adapter_that_is_out_of_line_takes_no_part(pool_at: str) -> None:
    folder = pools.for_tiny(poisoned=True)
    method, hand = smartfed(folder, active=3, pool_at=pool_at), Hand(importance={BASE.targets[0].name: 1.0})
    state, personal = begun(method)
    notes, quotas = (find(method.describe(state), kind) for kind in (Notes, Quotas))
    assert quotas.dropped == ("bad",)
    note = notes.texts[-1]
    assert note.startswith("the pool's adapter 'bad' is left out: its norm (of B A, over its matrices) is ")
    assert "times the others' median, more than 10 ([method] pool_bound)" in note
    assert set(quotas.sizes.values()) == {5}
    for rnd in (1, 2):
        state, sent, _ = play(method, state, rnd, personal, hand)
        assert not any(k.expert == 3 for k in sent["a"].tensors)
        assert {k.expert for k in hand.banks[-1].tensors if k.part is Part.A} == {0, 1, 2, 7, 8}
    assert state.use.keys() == {"one", "two"}
    for key, value in cut(read_pool(Path(folder)).tensors).items():
        bank = hand.banks[-1].tensors
        assert 3 <= key.expert < 7 or torch.equal(bank[key._replace(module=f"bert.{key.module}")], value)


def test_a_matrix_that_only_a_left_out_adapter_has_gets_no_router(tmp_path: Path) -> None:
    pool = pools.stronger(pools.made(BASE.targets, {"one": 3, "bad": 2}), "bad", -50.0)
    lone = pool.modules[0]
    one, bad = pool.adapters
    tensors = {key: value for key, value in pool.tensors.items() if (key.module, key.expert) != (lone, 0)}
    fewer = replace(one, ranks={module: 3 for module in one.ranks if module != lone})
    write_pool(tmp_path, replace(pool, adapters=(fewer, bad), tensors=tensors, name=name_of(tensors)))
    method = smartfed(tmp_path, active=2)
    state, personal = begun(method)
    state, _, _ = play(method, state, 1, personal, Hand())
    assert {key.module for key in state.routers} == {t.name for t in BASE.targets} - {f"bert.{lone}"}


@pytest.mark.parametrize(
    ("times", "bound", "robust", "dropped"),
    [(5, 0, False, ()), (5, 0, True, ("two",)), (5, 20, True, ()), (5, 2, False, ("two",)), (50, 1e9, True, ())],
)
def test_the_bound_of_a_pool(
    times: float, bound: float, robust: bool, dropped: tuple[str, ...], tmp_path: Path
) -> None:
    write_pool(tmp_path, pools.stronger(pools.made(BASE.targets, RANKS), "two", times))
    method = smartfed(tmp_path, pool_bound=bound)
    plan = replace(method.plan, robust=RobustSettings(clip=0.5 if robust else 0.0))
    assert replace(method, plan=plan).init(BASE, CLIENTS).dropped == dropped


def test_an_adapter_that_is_out_of_line_cannot_be_trained() -> None:
    method = smartfed(pools.for_tiny(poisoned=True), train_experts=("bad",))
    with pytest.raises(
        CoterieError, match=r"train_experts: the pool's adapter 'bad' is out of line: its norm .* raise "
    ):
        method.init(BASE, CLIENTS)


def test_a_fresh_expert_over_a_pool_without_effect_is_fedit(tmp_path: Path) -> None:
    silent = pools.made(BASE.targets, {"one": 2}, scale=0.0)
    write_pool(tmp_path / "pool", silent)
    method = smartfed(tmp_path / "pool", fresh_rank=4)
    state, personal = begun(method)
    fedit = FedIT(MethodSettings(), method.plan)
    theirs = fedit.init(BASE, CLIENTS)
    ours = method.experts(state)["fresh"]
    assert codec.encode(dict(sorted(ours.items()))) == codec.encode(dict(sorted(theirs.lora.items())))
    state, _, _ = play(method, state, 1, personal, Hand(step=0.25))
    for key, value in method.experts(state)["fresh"].items():
        assert torch.allclose(value, theirs.lora[key] + 0.25)
    model, me = tiny.model("bert"), CLIENTS[0]
    bank = method.bank(method.configure(state, CLIENTS, 2)["a"], me, personal["a"])
    plain = Bank({**method.experts(state)["fresh"], **start_head(BASE, method.plan, me)}, scaling=2.0)
    shown = replace(bank, tensors={**bank.tensors, **start_head(BASE, method.plan, me)})
    assert (effect(model, shown) - effect(model, plain)).abs().max() < 1e-5


def test_a_fresh_expert_serves_targets_that_the_pool_does_not(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", pools.made(BASE.targets[:1], {"one": 2}))
    method = smartfed(tmp_path / "pool", fresh_rank=2)
    state, personal = begun(method)
    assert len(state.routers) == 1
    bank = method.bank(method.configure(state, CLIENTS, 1)["a"], CLIENTS[0], personal["a"])
    assert torch.isfinite(effect(tiny.model("bert"), bank)).all()


@pytest.mark.parametrize("granularity", ["rank", "adapter"])
@pytest.mark.parametrize("fresh", [0, 2])
def test_chosen_adapters_train_and_travel_and_the_rest_stay_as_they_are(granularity: str, fresh: int) -> None:
    method = smartfed(train_experts=("two",), granularity=granularity, fresh_rank=fresh)
    state, personal = begun(method)
    before, hand = dict(state.trained), Hand(step=0.5)
    assert {key.expert for key in before} == {3}
    state, _, _ = play(method, state, 1, personal, hand)
    scale = method.plan.scaling if fresh else 1.0
    for key, value in state.trained.items():
        assert torch.allclose(value, before[key] + 0.5 * (scale if key.part is Part.B else 1.0), atol=1e-5)
    _, second, _ = play(method, state, 2, personal, hand)
    assert {k.expert for k in second["a"].tensors if k.part is Part.A} == ({3, SHARED} if fresh else {3})
    early, late = hand.banks[0].tensors, hand.banks[-1].tensors
    for key in early:
        if key.part is Part.A and key.expert in (0, 1, 2):
            assert torch.equal(early[key], late[key])


@pytest.mark.parametrize("granularity", ["rank", "adapter"])
@pytest.mark.parametrize("fresh", [0, 2])
@pytest.mark.parametrize("train", [(), ("two",)], ids=str)
def test_the_error_of_averaging_the_loras_that_train(train: tuple[str, ...], fresh: int, granularity: str) -> None:
    """Over the fresh expert and the adapters, as they act on the output; routers alone have none."""
    method = smartfed(granularity=granularity, fresh_rank=fresh, train_experts=train)
    state, personal = begun(method)
    assert find(method.describe(state), AggregationError) == (AggregationError(None) if fresh or train else None)
    replies: dict[str, Reply] = {}
    for me, step in zip(CLIENTS, (0.5, -1.0), strict=True):
        replies |= play(method, state, 1, personal, Hand(step=step), me.id)[2]
    found = find(method.describe(method.aggregate(state, replies, 1)), AggregationError)
    if not fresh and not train:
        assert found is None
        return
    lost = whole = torch.zeros((), dtype=torch.float64)
    share = torch.tensor([0.25, 0.75], dtype=torch.float64)  # by rows
    for key in [key for key in replies["a"].tensors if key.part is Part.A]:
        pair = (key, key._replace(part=Part.B))
        a, b = (torch.stack([r.tensors[k].double() for r in replies.values()]) for k in pair)
        scale = method.plan.scaling if key.expert == SHARED else 1.0
        exact = scale * torch.einsum("c,cor,cri->oi", share, b, a)
        apart = scale * torch.einsum("c,cor->or", share, b) @ torch.einsum("c,cri->ri", share, a)
        lost, whole = lost + (exact - apart).square().sum(), whole + exact.square().sum()
    expected = float((lost / whole).sqrt())
    assert found == AggregationError(pytest.approx(expected, rel=1e-4))
    assert expected > 0.05


def test_whole_adapters_as_experts() -> None:
    method = smartfed(granularity="adapter", active=2)
    state, personal = begun(method)
    assert {len(value) for value in state.routers.values()} == {2}
    bank = method.bank(method.configure(state, CLIENTS, 1)["a"], CLIENTS[0], personal["a"])
    ranks = {key.expert: value.shape[0] for key, value in bank.tensors.items() if key.part is Part.A}
    assert ranks == {0: 3, 3: 2}
    assert torch.isfinite(effect(tiny.model("bert"), bank)).all()


# faults --------------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no pool": ({"pool": ""}, "coterie pool build"),
    "no such adapter": ({"train_experts": ("three",)}, "the pool has no adapter 'three'; it has one, two"),
    "floors above the budget": ({"router": "paper", "floor": 4, "active": 3}, "above active"),
    "quotas where all are active": (
        {"quota": "greedy"},
        'quota does nothing with router = "signed".* router = "paper"',
    ),
    "a floor where all are active": ({"router": "response", "floor": 1}, 'floor does nothing with router = "response"'),
    "a total that is the paper's": ({"sparse": True, "gate_scale": "one"}, "gate_scale does nothing"),
    "a rank that is response's": ({"router_rank": 2}, 'router_rank does nothing .* set router = "response"'),
    "the paper's are sparse": ({"router": "paper", "sparse": True}, 'sparse does nothing .* set router = "signed"'),
}


@pytest.mark.parametrize("case", FAULTS)
def test_settings_that_cannot_work_say_so(case: str) -> None:
    settings, reason = FAULTS[case]
    method = SmartFed(SmartFedSettings(**{"pool": pools.for_tiny(), **settings}), Plan())
    with pytest.raises(CoterieError, match=reason):
        method.init(BASE, CLIENTS)


def test_a_pool_that_does_not_fit_the_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=r'set \[lora\] targets = \["query", "value"\]'):
        smartfed().init(replace(BASE, targets=BASE.targets[:1]), CLIENTS)
    wide = replace(BASE, targets=tuple(replace(t, d_in=64) for t in BASE.targets))
    with pytest.raises(CoterieError, match="another base"):
        smartfed().init(wide, CLIENTS)


def test_a_pool_for_a_base_with_other_weights_is_refused(tmp_path: Path) -> None:
    def told(weights: str) -> BaseSpec:
        return replace(BASE, targets=tuple(replace(t, weights=weights) for t in BASE.targets))

    pool = pools.made(BASE.targets, RANKS)
    write_pool(tmp_path / "pool", replace(pool, weights=dict.fromkeys(pool.modules, "cafe")))
    method = smartfed(tmp_path / "pool")
    assert Notes(()) in method.describe(method.init(told("cafe"), CLIENTS))
    with pytest.raises(CoterieError, match=rf"another base, tiny: .* \({M} of {M} matrices\). .* --base"):
        method.init(told("beef"), CLIENTS)
    notes = find(method.describe(method.init(told(""), CLIENTS)), Notes)
    assert notes is not None
    note = notes.texts[-1]
    assert f"on {M} of {M} matrices it was not checked" in note


def test_a_run_goes_on_with_its_own_pool_only(tmp_path: Path) -> None:
    pool: Pool = pools.made(BASE.targets, RANKS)
    write_pool(tmp_path / "pool", pool)
    method = smartfed(tmp_path / "pool")
    state, _ = begun(method)
    (tmp_path / "pool" / "pool.safetensors").unlink()
    write_pool(tmp_path / "pool", pools.made(BASE.targets, {"other": 3}))
    with pytest.raises(CoterieError, match="restore that pool"):
        method.configure(state, CLIENTS, 2)


def test_a_relative_pool_starts_at_the_configs_folder() -> None:
    assert SmartFedSettings(pool="pools/x").located(Path("/a")).pool == "/a/pools/x"
    assert SmartFedSettings(pool="/b").located(Path("/a")).pool == "/b"
    assert SmartFedSettings().located(Path("/a")).pool == ""


def test_one_client_of_four_cannot_buy_a_quota_with_a_large_importance() -> None:
    method = smartfed()
    state, personal = begun(method)
    modules = [t.name for t in BASE.targets]
    chosen = {module: 1.0 + i for i, module in enumerate(modules)}
    _, _, replies = play(method, state, 1, personal, Hand(importance=chosen))
    honest = dict.fromkeys("abc", replies["a"])
    liar = {m: 1e15 * (m == modules[0]) for m in modules}
    lie = replace(replies["a"], info={**replies["a"].info, "importance": liar})
    found = method.aggregate(state, {**honest, "d": lie}, 1)
    most = 10 * sum(chosen.values())
    assert found.importance[modules[0]] == pytest.approx((3 * chosen[modules[0]] + most) / 4 / state.quotas[modules[0]])
    rule = SmartFed(method.settings, replace(method.plan, robust=RobustSettings(rule="median")))
    bounded = rule.aggregate(state, {**honest, "d": lie}, 1)
    assert bounded.importance[modules[0]] == pytest.approx(
        (3 * chosen[modules[0]] + most / 10) / 4 / state.quotas[modules[0]]
    )
