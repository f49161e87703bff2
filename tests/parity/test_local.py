"""The reference engine against programs driven by hand: no codec, no disk, no engine between server and client."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import pools
import sites
import tiny
from coterie import codec
from coterie.compute import loading
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.data.clients import load_data
from coterie.data.rows import ClientData, FederatedData
from coterie.data.tasks import Classification
from coterie.engines import local
from coterie.engines.base import Delivery
from coterie.engines.local import LocalEngine
from coterie.engines.store import ClientStates, PersonalStore, RoundStore
from coterie.methods.base import drive
from coterie.methods.plan import Plan
from coterie.methods.registry import method_named, methods
from coterie.nn.base import Base, load_base
from coterie.requests import ClientProgram, Observe, Score
from coterie.types import (
    NO_EXPERT,
    Bank,
    ClientId,
    ClientInfo,
    ClientResult,
    CoterieError,
    Instruction,
    Key,
    Part,
    Personal,
    Reply,
)
from few_rounds import OPTIM, ROUNDS, SETTINGS, ranks_of
from thinned import PUBLISHED, thinned


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def loaded() -> tuple[Base, FederatedData]:
    """A tiny BERT and four clients, three of them with the same labels: a sum of three depends on its order."""
    with tempfile.TemporaryDirectory() as folder:
        sites.federation(Path(folder) / "clients", clients=7, rows=8)
        config = check_config({"data": {"folder": "clients"}})
        federation = load_data(config.data, "classification", 0, Path(folder))
        chosen = tuple(c for c in federation.clients if c.info.id in ("mood-0", "mood-1", "mood-2", "size-0"))
        base = load_base(str(tiny.folder(Path(folder) / "model", "bert")), "classification")
        return base, FederatedData(chosen, federation.manifest)


def make_workplace(**settings: Any) -> Workplace:
    base, federation = loaded()
    everyone = {client.info.id: client for client in federation.clients}
    return Workplace(base, Classification(base.tokenizer, 32), 0, all_clients=everyone, **settings)


def engine_in(folder: Path, clients: Sequence[ClientData] | None = None) -> LocalEngine:
    federation = loaded()[1] if clients is None else FederatedData(tuple(clients), {})
    return LocalEngine(make_workplace(), federation, ClientStates(PersonalStore(folder)))


def method_of(name: str, head: Any = "personal") -> Any:
    kind = method_named(name)
    pool = {"pool": pools.for_tiny()} if name == "smartfed" else {}
    plan = Plan(rank=2, ranks=ranks_of(name), alpha=4, dropout=0.1, optim=OPTIM, head=head, rounds=ROUNDS)
    return kind(kind.Settings(**SETTINGS.get(name, {}), **pool), plan)


def same_bits(one: Any, other: Any) -> bool:
    return codec.encode(one) == codec.encode(other)


def train(engine: LocalEngine, method: Any, state: Any, rnd: int) -> dict[ClientId, Delivery]:
    return dict(engine.train(method, method.configure(state, engine.clients, rnd), rnd))


def replies_of(deliveries: Mapping[ClientId, Delivery]) -> dict[ClientId, Reply]:
    assert [d.error for d in deliveries.values() if d.error] == []
    return {c: d.reply for c, d in deliveries.items() if d.reply is not None}


# every method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head"),
    thinned(
        product(sorted(methods()), ["personal", "shared"]), lambda name, head: head == "personal" or name in PUBLISHED
    ),
)
def test_the_engine_gives_the_bits_of_programs_driven_by_hand(name: str, head: str, tmp_path: Path) -> None:
    assert len(methods()) >= 3
    method, engine, workplace = method_of(name, head), engine_in(tmp_path), make_workplace()
    clients = loaded()[1].clients
    state = by_hand = method.init(engine.spec, engine.clients)
    personal = {c.info.id: method.begin(engine.spec, c.info) for c in clients}
    for rnd in range(1, ROUNDS + 1):
        state = method.aggregate(state, replies_of(train(engine, method, state, rnd)), rnd)
        instructions = method.configure(by_hand, engine.clients, rnd)
        results = {
            c.info.id: drive(
                method.client(instructions[c.info.id], c.info, personal[c.info.id]), LocalCompute(workplace, c, rnd)
            )
            for c in reversed(clients)
        }
        personal |= {c: result.personal for c, result in results.items()}
        by_hand = method.aggregate(by_hand, {c: result.reply for c, result in results.items()}, rnd)
        assert same_bits(state, by_hand)
        assert all(same_bits(engine.states.personal.load(c, rnd), personal[c]) for c in personal)

    instructions = method.configure(by_hand, engine.clients, ROUNDS + 1)
    banks = {
        c.info.id: drive(
            method.choose(instructions[c.info.id], c.info, personal[c.info.id]), LocalCompute(workplace, c, ROUNDS)
        )
        for c in clients
    }
    assert [(c, codec.encode(bank)) for c, bank in engine.banks(method, instructions, ROUNDS)] == [
        (c, codec.encode(bank)) for c, bank in banks.items()
    ]
    for client, (name_of, evaluation) in zip(
        clients, engine.evaluate(method, instructions, ROUNDS, ("validation", "test"), usage=True), strict=True
    ):
        assert name_of == client.info.id
        worker, bank = LocalCompute(workplace, client, ROUNDS), banks[client.info.id]
        for split in ("validation", "test"):
            (scored,) = worker.score(Score([bank], split))
            assert evaluation.scores[split] == {**scored.metrics, "loss": scored.loss}
        assert evaluation.observed == worker.observe(Observe(bank, "test"))
        assert bool(evaluation.observed.usage) == (bank.gate.name != "constant")


@pytest.mark.parametrize("name", sorted(methods()))
def test_results_do_not_depend_on_the_order_of_the_clients_nor_on_who_else_takes_part(
    name: str, tmp_path: Path
) -> None:
    method, clients = method_of(name, "shared"), loaded()[1].clients
    one, other = engine_in(tmp_path / "one"), engine_in(tmp_path / "other", clients[::-1])
    state, turned = method.init(one.spec, one.clients), method.init(other.spec, other.clients)
    assert list(train(other, method, turned, 1)) == [c.info.id for c in clients[::-1]]
    for rnd in range(1, ROUNDS + 1):
        ahead = train(one, method, state, rnd)
        state = method.aggregate(state, replies_of(ahead), rnd)
        turned = method.aggregate(turned, replies_of(train(other, method, turned, rnd)), rnd)
        assert all(same_bits(one.states.personal.load(c, rnd), other.states.personal.load(c, rnd)) for c in ahead)
        for expert, tensors in method.experts(state).items():
            assert same_bits(dict(method.experts(turned)[expert]), dict(tensors))
    instructions = method.configure(state, one.clients, ROUNDS + 1)
    assert all(same_bits(ins, method.configure(turned, other.clients, 4)[c]) for c, ins in instructions.items())
    chosen = clients[2].info.id
    alone = dict(one.train(method, {chosen: instructions[chosen]}, ROUNDS + 1))
    together = dict(one.train(method, instructions, ROUNDS + 1))
    assert list(alone) == [chosen]
    assert same_bits(alone[chosen].reply, together[chosen].reply)


# what crosses between server and client ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(methods()))
def test_bytes_are_counted_as_encoded(name: str, tmp_path: Path) -> None:
    method, engine = method_of(name, "shared"), engine_in(tmp_path)
    state = method.init(engine.spec, engine.clients)
    for rnd in (1, 2):
        instructions = method.configure(state, engine.clients, rnd)
        deliveries = dict(engine.train(method, instructions, rnd))
        assert len(deliveries) == 4
        for client, delivery in deliveries.items():
            assert delivery.bytes_down == len(codec.encode(instructions[client]))
            assert delivery.bytes_up == len(codec.encode(delivery.reply))
            sent = sum(value.nbytes for value in delivery.reply.tensors.values()) if delivery.reply else 0
            tensors = len(delivery.reply.tensors) if delivery.reply else 0
            assert 0 <= delivery.bytes_up - sent < 2000 + 260 * tensors
            assert delivery.seconds > 0
        state = method.aggregate(state, replies_of(deliveries), rnd)


KEY, STAYS = Key("q", 0, Part.A), Key("h", NO_EXPERT, Part.HEAD)


@dataclass(frozen=True)
class Careless:
    """A method whose clients write into everything that they are given, and fail on request."""

    fails: Mapping[ClientId, Exception] = field(default_factory=dict)
    sent: list[Any] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)

    def begin(self, base: Any, me: ClientInfo) -> Personal:
        return Personal({STAYS: torch.zeros(2)})

    def client(self, ins: Instruction, me: ClientInfo, personal: Personal) -> ClientProgram:
        if me.id in self.fails:
            raise self.fails[me.id]
        ins.tensors[KEY].add_(1)
        personal.tensors[STAYS].add_(1)
        self.sent.append(ins.tensors)
        return ClientResult(Reply(ins.tensors, 1), personal)
        yield  # what makes a generator of it


def test_what_the_server_does_to_a_reply_the_client_does_not_feel_nor_the_other_way(tmp_path: Path) -> None:
    engine, careless = engine_in(tmp_path), Careless()
    instructions = {c.id: Instruction({KEY: torch.zeros(3)}) for c in engine.clients}
    replies = replies_of(dict(engine.train(careless, instructions, 1)))  # type: ignore[arg-type]
    assert len(replies) == len(careless.sent) == 4
    for reply, sent in zip(replies.values(), careless.sent, strict=True):
        assert torch.equal(reply.tensors[KEY], sent[KEY])
        sent[KEY].fill_(7)
        assert torch.equal(reply.tensors[KEY], torch.ones(3))
        reply.tensors[KEY].fill_(9)
        assert torch.equal(sent[KEY], torch.full((3,), 7.0))


def test_what_a_client_does_to_an_instruction_nobody_else_feels(tmp_path: Path) -> None:
    engine, shared = engine_in(tmp_path), torch.zeros(3)
    instructions = {c.id: Instruction({KEY: shared}) for c in engine.clients}
    for rnd in (1, 2):
        deliveries = dict(engine.train(Careless(), instructions, rnd))  # type: ignore[arg-type]
        assert all(torch.equal(d.reply.tensors[KEY], torch.ones(3)) for d in deliveries.values() if d.reply)
        assert torch.equal(shared, torch.zeros(3))
    again = dict(engine.train(Careless(), instructions, 2))  # type: ignore[arg-type]
    assert len(again) == 4
    kept = engine.states.personal.load(engine.clients[0].id, 2)
    assert kept is not None
    assert torch.equal(kept.tensors[STAYS], torch.full((2,), 2.0)), "the state of round 1 and one more, however often"


def test_a_client_that_fails_is_an_error_and_keeps_its_state(tmp_path: Path) -> None:
    engine = engine_in(tmp_path)
    instructions = {c.id: Instruction({KEY: torch.zeros(3)}) for c in engine.clients}
    first, second, third, _ = (c.id for c in engine.clients)
    list(engine.train(Careless(), instructions, 1))  # type: ignore[arg-type]
    failing = Careless({first: CoterieError("no power"), second: torch.OutOfMemoryError("CUDA out of memory")})
    deliveries = dict(engine.train(failing, instructions, 2))  # type: ignore[arg-type]
    for client, reason in ((first, "no power"), (second, f"client {second}: out of memory; lower [train] batch_size")):
        assert (deliveries[client].reply, deliveries[client].error, deliveries[client].bytes_up) == (None, reason, 0)
        assert deliveries[client].bytes_down == deliveries[third].bytes_down > 0
    assert deliveries[third].error is None
    states = [engine.states.personal.load(c, 2) for c in (first, second, third)]
    assert [float(state.tensors[STAYS][0]) for state in states if state] == [1.0, 1.0, 2.0]
    with pytest.raises(ZeroDivisionError):  # a fault of ours is not a client's
        dict(engine.train(Careless({first: ZeroDivisionError()}), instructions, 2))  # type: ignore[arg-type]


# personal states by round --------------------------------------------------------------------------------------------


def test_a_round_starts_from_the_state_before_it_and_can_be_done_again(tmp_path: Path) -> None:
    method, engine = method_of("local"), engine_in(tmp_path)
    state = method.init(engine.spec, engine.clients)
    for rnd in (1, 2, 3):
        train(engine, method, state, rnd)
    versions = {rnd: codec.encode(engine.states.personal.load("mood-0", rnd)) for rnd in (1, 2, 3)}
    assert len(set(versions.values())) == 3
    train(engine, method, state, 2)  # as after a crash in round 2
    assert codec.encode(engine.states.personal.load("mood-0", 2)) == versions[2]
    engine.restore(1)
    assert codec.encode(engine.states.personal.load("mood-0", 99)) == versions[1]
    for rnd in (2, 3):
        train(engine, method, state, rnd)
    assert codec.encode(engine.states.personal.load("mood-0", 3)) == versions[3]
    engine.prune(3)
    assert engine.states.personal.load("mood-0", 2) is None
    assert codec.encode(engine.states.personal.load("mood-0", 3)) == versions[3]
    engine.restore(0)
    assert engine.states.personal.load("mood-0", 99) is None


def test_trained_banks_go_back_and_are_given_up_with_the_personal_states(tmp_path: Path) -> None:
    method, kept = method_of("fedit"), RoundStore(tmp_path / "trained", Bank)
    engine = replace(engine_in(tmp_path), states=ClientStates(PersonalStore(tmp_path), kept))
    state = method.init(engine.spec, engine.clients)
    for rnd in (1, 2, 3):
        train(engine, method, state, rnd)
    banks = {rnd: codec.encode(kept.load("mood-0", rnd)) for rnd in (1, 2, 3)}
    assert len(set(banks.values())) == 3
    engine.restore(2)
    assert codec.encode(kept.load("mood-0", 99)) == banks[2]
    engine.prune(2)
    assert kept.load("mood-0", 1) is None
    instructions = method.configure(state, engine.clients, 3)
    (used, *_) = (bank for client, bank in engine.banks(method, instructions, 2) if client == "mood-0")
    assert codec.encode(used) == banks[2]


def test_evaluation_is_of_the_state_after_its_round(tmp_path: Path) -> None:
    method, engine = method_of("local"), engine_in(tmp_path)
    state = method.init(engine.spec, engine.clients)
    found = []
    for rnd in (1, 2):
        train(engine, method, state, rnd)
        instructions = method.configure(state, engine.clients, rnd + 1)
        found.append(dict(engine.evaluate(method, instructions, rnd, ("test",))))
    earlier = dict(engine.evaluate(method, method.configure(state, engine.clients, 2), 1, ("test",)))
    assert earlier == found[0]
    assert earlier != found[1]


def test_a_split_without_rows_has_no_scores_and_usage_takes_the_next(tmp_path: Path) -> None:
    whole = loaded()[1].clients[0]
    client = ClientData(whole.info, {**whole.splits, "test": ()})
    method, engine = method_of("local"), engine_in(tmp_path, [client])
    state = method.init(engine.spec, engine.clients)
    instructions = method.configure(state, engine.clients, 1)
    ((_, evaluation),) = engine.evaluate(method, instructions, 0, ("validation", "test"), usage=True)
    assert list(evaluation.scores) == ["validation"]
    assert evaluation.observed is not None
    rows = engine.workplace.examples(client, "validation")
    assert evaluation.observed.tokens == sum(len(row.ids) for row in rows)
    ((_, evaluation),) = engine.evaluate(method, instructions, 0, ("validation",))
    assert evaluation.observed is None


# the base ------------------------------------------------------------------------------------------------------------


def test_the_base_is_loaded_once_for_all_runs_with_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    monkeypatch.setattr(loading, "load_base", lambda path, *_, **__: (loads.append(path), copy.copy(loaded()[0]))[1])
    cache_of_all: dict[str, Any] = {}

    def made(**changes: dict[str, Any]) -> LocalEngine:
        raw = {"model": {"path": "model"}, "data": {"folder": "clients"}, "engine": {"device": "cpu"}}
        config: Config = check_config({**raw, **{k: {**raw.get(k, {}), **v} for k, v in changes.items()}})
        return local.make(config, loaded()[1], tmp_path / "run", tmp_path, cache_of_all)

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    first = made()
    second = made(run={"seed": 3, "eval_batch_size": 7}, train={"epochs": 1}, method={"name": "local"})
    assert first.workplace.base is second.workplace.base
    assert loads == [str(tmp_path / "model")]
    assert (second.workplace.seed, second.workplace.eval_batch_size) == (3, 7)
    assert (first.workplace.seed, first.workplace.precision) == (0, "float32")
    made(lora={"targets": ["query"]})
    made(model={"dtype": "bfloat16"})
    made(task={"kind": "generation"})
    assert len(loads) == 4
    with pytest.raises(CoterieError, match=r"the model has positions for 160 tokens; \[model\] max_length .* need 161"):
        made(model={"max_length": 161})
