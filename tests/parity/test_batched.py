"""Many clients in one forward pass against one at a time: the same answers, whatever shares the batch."""

from __future__ import annotations

import copy
import gc
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pools
import sites
import tiny
from coterie.compute import batched, passes
from coterie.compute.batched import answer_all, drive_together
from coterie.compute.client import LocalCompute
from coterie.compute.train import Training
from coterie.compute.workplace import Workplace
from coterie.config.load import check_config
from coterie.data.clients import load_data
from coterie.data.dpo import Dpo
from coterie.data.examples import Batch
from coterie.data.rows import ClientData, FederatedData
from coterie.data.tasks import make_task
from coterie.engines.local import LocalEngine
from coterie.engines.store import ClientStates, PersonalStore
from coterie.engines.together import Together
from coterie.methods.base import answer, drive
from coterie.methods.plan import Plan
from coterie.methods.registry import method_named, methods
from coterie.nn.base import Base, load_base
from coterie.requests import ClientProgram, Observe, Optim, Request, Score, Train
from coterie.types import FOLDED, Bank, ClientResult, CoterieError, Instruction, Key, Part, Personal, Reply
from few_rounds import OPTIM, ROUNDS, SETTINGS, ranks_of
from thinned import PUBLISHED, thinned

# smartfed's programs also ask for statistics that are not collected in batches; one of centralised's asks for all
ALONE = {"smartfed", "centralised"}
KINDS = {"classification": "bert", "generation": "llama", "multiple_choice": "gpt2", "dpo": "llama"}  # dpo: generation
CHOSEN = {"mood-0": 8, "mood-1": 5, "size-0": 7, "place-0": 3, "size-1": 8}  # rows of training; none divides by 4 twice


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def ignore(text: str) -> None:
    raise AssertionError(f"nothing to note was expected, but: {text}")


@cache
def loaded(kind: str, dtype: torch.dtype, arch: str = "") -> tuple[Base, tuple[ClientData, ...]]:
    """A tiny model and five clients, of two and of three labels, with different numbers of rows."""
    with tempfile.TemporaryDirectory() as folder:
        sites.federation(Path(folder) / "clients", kind, clients=7, rows=8)
        kind, arch = "generation" if kind == "dpo" else kind, arch or KINDS[kind]
        config = check_config({"data": {"folder": "clients"}, "task": {"kind": kind}})
        federation = load_data(config.data, kind, 0, Path(folder))  # type: ignore[arg-type]
        path = tiny.folder(Path(folder) / "model", arch)
        base = load_base(str(path), kind, dtype=dtype, device=tiny.DEVICE)  # type: ignore[arg-type]
    clients = [cut(c, CHOSEN[c.info.id]) for c in federation.clients if c.info.id in CHOSEN]
    assert len(clients) == 5
    return base, tuple(clients)


def cut(client: ClientData, rows: int) -> ClientData:
    splits = {**client.splits, "train": client.splits["train"][:rows]}
    return ClientData(replace(client.info, num_train=rows), splits)


def make_workplace(kind: str = "classification", dtype: torch.dtype = torch.float64, **more: Any) -> Workplace:
    base, clients = loaded(kind, dtype, more.pop("arch", ""))
    dpo = Dpo(0.5, more.pop("reference", "round")) if kind == "dpo" else None
    of = "generation" if dpo else kind
    task = make_task(of, base.tokenizer, 32, 4, more.pop("generates", False), dpo=dpo)  # type: ignore[arg-type]
    return Workplace(base, task, 0, all_clients={client.info.id: client for client in clients}, **more)


def method_of(name: str, kind_of_task: str, head: Any = "personal", optim: Optim = OPTIM) -> Any:
    kind = method_named(name)
    pool = {"pool": pools.for_tiny(KINDS[kind_of_task])} if name == "smartfed" else {}
    plan = Plan(rank=2, ranks=ranks_of(name), alpha=3, dropout=0.2, optim=optim, head=head, rounds=ROUNDS)
    return kind(kind.Settings(**SETTINGS.get(name, {}), **pool), plan)


def double(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    return {key: value.double() for key, value in tensors.items()}


def with_training(program: ClientProgram, change: Callable[[Train], Train]) -> ClientProgram:
    """The program with every request to train as ``change`` makes it."""
    answer: Any = None
    while True:
        try:
            request = program.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = yield change(request) if isinstance(request, Train) else request


def in_double(program: ClientProgram) -> ClientProgram:
    """The program, training in float64 also what it makes itself."""
    return with_training(
        program, lambda train: replace(train, bank=replace(train.bank, tensors=double(train.bank.tensors)))
    )


def furthest(one: Any, other: Any) -> float:
    """The largest difference of tensors, of numbers (relative from 1 on), and within what holds them."""
    if isinstance(one, Tensor):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        return float((one - other).abs().max()) if one.numel() else 0.0
    if isinstance(one, float):
        return abs(one - other) / max(1.0, abs(one))
    if isinstance(one, Mapping):
        assert list(one) == list(other)
        return max((furthest(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        return max((furthest(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if hasattr(one, "__dataclass_fields__"):
        return furthest(vars(one), vars(other))
    assert one == other
    return 0.0


@contextmanager
def in_batches() -> Iterator[None]:
    """Requests of several clients are answered in batches here, or it is an error."""

    def never(asked: Any) -> Any:
        raise AssertionError(f"{asked[0].client.info.id} was answered alone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched, "_alone", never)
        yield


def groups(clients: Sequence[ClientData], size: int) -> list[list[ClientData]]:
    return [list(clients[i : i + size]) for i in range(0, len(clients), size)]


# every method --------------------------------------------------------------------------------------------------------

WAYS = thinned(
    [
        *((name, head, "classification") for name in sorted(methods()) for head in ("personal", "shared")),
        *((name, "personal", kind) for name in sorted(methods()) for kind in ("generation", "multiple_choice", "dpo")),
    ],
    lambda name, _, kind: {
        "multiple_choice": name in {"fedit", *PUBLISHED},
        "dpo": name in {"fedit", "fedlease"},
    }.get(kind, True),
)


@pytest.mark.parametrize(("name", "head", "kind"), WAYS)
def test_every_program_gets_the_answers_that_it_gets_alone(name: str, head: str, kind: str) -> None:
    """In float64, each round from the same state: in groups of 2, of 3 turned around, and all at once."""
    assert len(methods()) >= 3
    method, workplace, clients = method_of(name, kind, head), make_workplace(kind), loaded(kind, torch.float64)[1]
    infos = [c.info for c in clients]
    before = {name: value.clone() for name, value in workplace.base.model.state_dict().items()}
    state = method.init(workplace.base.spec, infos)
    personal = {c.id: method.begin(workplace.base.spec, c) for c in infos}
    for rnd in range(1, ROUNDS + 1):
        instructions = method.configure(state, infos, rnd)

        def program(client: ClientData, instructions: Any = instructions, personal: Any = personal) -> Any:
            ins, mine = instructions[client.info.id], personal[client.info.id]
            program = method.client(
                replace(ins, tensors=double(ins.tensors)), client.info, replace(mine, tensors=double(mine.tensors))
            )
            return in_double(program)

        alone = {c.info.id: drive(program(c), LocalCompute(workplace, c, rnd)) for c in clients}
        for group in (*groups(clients, 2), *groups(clients[::-1], 3), list(clients)):
            computes = [LocalCompute(workplace, c, rnd) for c in group]
            batched_all = len(group) > 1 and name not in ALONE
            with in_batches() if batched_all else nullcontext():
                results = drive_together([program(c) for c in group], computes, ignore)
            for compute, result in zip(computes, results, strict=True):
                assert isinstance(result, ClientResult), result
                assert furthest(result, alone[compute.client.info.id]) < 1e-9
        single = {c: replace(r.reply, tensors=floats(r.reply.tensors)) for c, r in alone.items()}
        personal = {c: replace(r.personal, tensors=floats(r.personal.tensors)) for c, r in alone.items()}
        state = method.aggregate(state, single, rnd)
    after = workplace.base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_hooks for module in workplace.base.model.modules())


def floats(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    return {key: value.float() for key, value in tensors.items()}


# AdamW moves a number by about the learning rate even where its gradient is hardly more than rounding: at five times
# the default rate (tests of float64) single numbers part by 2.6e-4.
OPTIMS = {
    "sgd": Optim(batch_size=4, epochs=1, optimizer="sgd", learning_rate=0.1, momentum=0.9),
    "adamw": Optim(batch_size=4, epochs=1),
}


@pytest.mark.parametrize(
    ("name", "kind", "optim"),
    thinned(
        product(sorted(methods()), ["classification", "generation"], OPTIMS),
        lambda _, kind, optim: (kind, optim) in {("classification", "adamw"), ("generation", "sgd")},
    ),
)
def test_engines_agree_in_float32_after_each_round(name: str, kind: str, optim: str, tmp_path: Path) -> None:
    method = method_of(name, kind, optim=OPTIMS[optim])
    clients = loaded(kind, torch.float32)[1]

    def engine(together: int) -> LocalEngine:
        workplace = make_workplace(kind, torch.float32, eval_batch_size=4)
        states = ClientStates(PersonalStore(tmp_path / str(together)))
        return LocalEngine(workplace, FederatedData(clients, {}), states, Together((workplace,), together))

    one, many = engine(1), engine(3)
    state = method.init(one.spec, one.clients)
    for rnd in range(1, ROUNDS + 1):
        instructions = method.configure(state, one.clients, rnd)
        alone, together = (dict(e.train(method, instructions, rnd)) for e in (one, many))
        assert alone.keys() == together.keys() == {c.info.id for c in clients}
        for client, delivery in alone.items():
            assert delivery.error is together[client].error is None
            assert delivery.bytes_down == together[client].bytes_down
            assert furthest(delivery.reply, together[client].reply) < 1e-4
            assert furthest(one.states.personal.load(client, rnd), many.states.personal.load(client, rnd)) < 1e-4
            kept = one.states.personal.load(client, rnd)
            assert kept is not None
            many.states.personal.save(client, rnd, kept)  # so that differences do not add up
        state = method.aggregate(state, {c: d.reply for c, d in alone.items()}, rnd)
        after = method.configure(state, one.clients, rnd + 1)
        splits = ("validation", "test")
        scores, others = (dict(e.evaluate(method, after, rnd, splits, usage=True)) for e in (one, many))
        assert scores.keys() == others.keys()
        for client, evaluation in scores.items():
            assert furthest(evaluation, others[client]) < 1e-4


@pytest.mark.parametrize(
    ("name", "together"),
    thinned(product(sorted(methods()), [1, 3]), lambda name, together: together == 3 or name in PUBLISHED),
)
def test_several_devices_give_the_bits_of_one(name: str, together: int, tmp_path: Path) -> None:
    """A base on each; AdamW, in float32, with what stays with the clients, evaluation and use of experts."""
    method, clients = method_of(name, "classification"), loaded("classification", torch.float32)[1]
    workplace = make_workplace("classification", torch.float32, eval_batch_size=4)
    first, other = (
        replace(workplace, base=replace(workplace.base, model=copy.deepcopy(workplace.base.model))) for _ in range(2)
    )

    def engine(folder: str, size: int, *workplaces: Workplace) -> LocalEngine:
        states = ClientStates(PersonalStore(tmp_path / folder))
        return LocalEngine(first, FederatedData(clients, {}), states, Together(workplaces, size, optim=OPTIM))

    size = min(together, -(-len(clients) // 2))  # of the groups on two devices: the same groups give the same bits
    one, two = engine("one", size, first), engine("two", together, first, other)
    state = method.init(one.spec, one.clients)
    for rnd in range(1, ROUNDS + 1):
        instructions = method.configure(state, one.clients, rnd)
        alone, spread = (dict(e.train(method, instructions, rnd)) for e in (one, two))
        assert len(alone) == len(clients)
        for client, delivery in alone.items():
            assert delivery.error is None
            assert furthest(delivery.reply, spread[client].reply) == 0
            assert furthest(one.states.personal.load(client, rnd), two.states.personal.load(client, rnd)) == 0
        state = method.aggregate(state, {c: d.reply for c, d in alone.items()}, rnd)
        after = method.configure(state, one.clients, rnd + 1)
        scores, others = (dict(e.evaluate(method, after, rnd, ("validation", "test"), usage=True)) for e in (one, two))
        assert len(scores) == len(clients)
        assert furthest(scores, {client: others[client] for client in scores}) == 0


# single requests -----------------------------------------------------------------------------------------------------


def some_bank(workplace: Workplace, labels: int, number: int, **changes: Any) -> Bank:
    """A bank of its own for every number: other experts, other ranks, another scaling."""
    settings = {"experts": 1 + number % 3, "rank": 2 + number % 2, "scaling": 0.5 + number, **changes}
    made = tiny.bank(workplace.base.spec.targets, seed=number, dtype=torch.float64, **settings)
    return replace(made, tensors={**made.tensors, **double(tiny.head(workplace.base.model, labels))})


def labels_of(client: ClientData) -> int:
    return len(client.info.labels or ())


def same(workplace: Workplace, asked: Mapping[str, Request], within: float = 1e-9, alone: bool = False) -> None:
    """Each answer is the one that the client gets alone."""
    clients = {c.info.id: c for c in loaded(workplace.task.kind, torch.float64)[1]}
    computes = [LocalCompute(workplace, clients[c], 2) for c in asked]
    with nullcontext() if alone else in_batches():
        told = answer_all(list(zip(computes, asked.values(), strict=True)), ignore)
    assert len(told) == len(asked) >= 2
    for one, (client, request) in zip(told, asked.items(), strict=True):
        single = LocalCompute(workplace, clients[client], 2)
        expected = answer(request, single)
        assert furthest(one, expected) < within
        if isinstance(request, Train):
            assert single.trained is not None
            mine = next(compute for compute in computes if compute.client.info.id == client)
            assert furthest(mine.trained, single.trained) < within


def optims() -> list[Optim]:
    """A way of training for each of the five clients; their numbers of steps differ too."""
    return [
        Optim(learning_rate=0.02, batch_size=3, epochs=2),
        Optim(learning_rate=0.05, batch_size=2, epochs=1, optimizer="sgd", momentum=0.9, schedule="constant"),
        Optim(learning_rate=0.01, batch_size=2, accumulate=3, steps=3, clip=0.1),
        Optim(learning_rate=0.01, batch_size=8, epochs=3, schedule="cosine", clip=0),
        Optim(learning_rate=0.03, batch_size=1, steps=5, weight_decay=0.5, round_decay=0.5),
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("gate", ["constant", "softmax", "slot_top_k", "top_k", "signed", "response", "mixing"])
def test_clients_may_differ_in_everything(gate: str, dropout: float) -> None:
    """Other optimisers, steps, experts, ranks, scalings, labels, and what trains, for every client."""
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1]
    asked: dict[str, Request] = {}
    for i, (client, optim) in enumerate(zip(clients, optims(), strict=True)):
        experts = 2 + i % 3
        options = {"slot_top_k": {"own": i % experts}, "top_k": {"k": 1 + i % 2}, "signed": {"k": i % 3}}.get(gate, {})
        bank = some_bank(
            workplace, labels_of(client), i, gate=gate, options=options, experts=experts, dropout=dropout,
            shared=2 if i == 4 else 0,
            rank={"response": 2, "mixing": 1}.get(gate, [1 + (i + e) % 3 for e in range(experts)]),
        )  # fmt: skip
        keys = sorted(bank.tensors)
        trainable = frozenset(keys if i % 2 else [key for key in keys if key.expert == experts - 1 or i == 2])
        asked[client.info.id] = Train(bank, trainable, optim, purpose=f"part {i}")
    same(workplace, asked)


@pytest.mark.parametrize("trained", ["lora", "head"])
def test_clients_with_a_folded_expert_share_a_batch(trained: str) -> None:
    """It sees no dropout, whatever the ranks of what trains beside it."""
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1]
    extra = folded(workplace, 3)
    asked: dict[str, Request] = {}
    for i, client in enumerate(clients):
        bank = some_bank(workplace, labels_of(client), i, experts=1, rank=1 + i, dropout=0.3)
        if trained == "head":
            bank = replace(bank, tensors={key: v for key, v in bank.tensors.items() if key.part is Part.HEAD})
        trainable = frozenset(bank.tensors)
        asked[client.info.id] = Train(replace(bank, tensors={**bank.tensors, **extra}), trainable, OPTIM)
    same(workplace, asked)


def folded(workplace: Workplace, rank: int) -> dict[Key, Tensor]:
    made = tiny.bank(workplace.base.spec.targets, 1, rank, seed=9, dtype=torch.float64)
    return {key._replace(expert=FOLDED): value for key, value in made.tensors.items()}


@pytest.mark.parametrize("arch", ["roberta", "gpt2", "qwen2"])
def test_other_models_and_modules_that_only_some_adapt(arch: str) -> None:
    kind = "classification" if arch == "roberta" else "generation"
    workplace, clients = make_workplace(kind, arch=arch), loaded(kind, torch.float64, arch)[1]
    asked: dict[str, Request] = {}
    for i, client in enumerate(clients):
        bank = some_bank(workplace, labels_of(client) or 2, i, experts=2, gate="softmax", rank=2)
        targets = sorted({key.module for key in bank.tensors if key.part is not Part.HEAD})
        kept = {k: v for k, v in bank.tensors.items() if k.part is Part.HEAD or targets.index(k.module) % (i + 1) == 0}
        bank = replace(bank, tensors=kept, scaling=2.0, dropout=0.1)
        asked[client.info.id] = Train(bank, frozenset(kept), optims()[i])
    clients_of = loaded(kind, torch.float64, arch)
    assert clients_of[0] is workplace.base
    computes = {c.info.id: LocalCompute(workplace, c, 1) for c in clients}
    for one, (client_id, request) in zip(
        answer_all([(computes[c], r) for c, r in asked.items()], ignore), asked.items(), strict=True
    ):
        expected = answer(request, LocalCompute(workplace, computes[client_id].client, 1))
        assert furthest(one, expected) < 1e-9


@pytest.mark.parametrize("generates", [False, True])
@pytest.mark.parametrize("kind", ["classification", "generation", "multiple_choice"])
def test_usage_is_collected_while_scoring(kind: str, generates: bool) -> None:
    """It is what observing the same rows gives; for one client, and for clients of which only some collect."""
    workplace = make_workplace(kind, eval_batch_size=7, generates=generates and kind == "generation")
    clients = loaded(kind, torch.float64)[1]
    banks = [some_bank(workplace, labels_of(c), i, gate="softmax", experts=3) for i, c in enumerate(clients)]
    asked = {c.info.id: Score([b], "test", usage=c is not clients[1]) for c, b in zip(clients, banks, strict=True)}
    same(workplace, dict(asked))
    for client, bank in zip(clients, banks, strict=True):
        compute = LocalCompute(workplace, client, 2)
        (plain,), (scored,) = compute.score(Score([bank], "test")), compute.score(Score([bank], "test", usage=True))
        observed = compute.observe(Observe(bank, "test"))
        assert plain.observed is None
        assert replace(scored, observed=None) == plain
        assert scored.observed is not None
        assert scored.observed.usage.keys() == observed.usage.keys() != set()
        assert furthest(scored.observed, observed) < (1e-9 if kind == "multiple_choice" else 1e-15)


@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
@pytest.mark.parametrize("together", [1, 3])
def test_an_evaluation_with_usage_makes_no_further_pass(together: int, kind: str, tmp_path: Path) -> None:
    method, clients = method_of("fedlease", kind), loaded(kind, torch.float32)[1]
    workplace, states = make_workplace(kind, torch.float32), ClientStates(PersonalStore(tmp_path))
    engine = LocalEngine(workplace, FederatedData(clients, {}), states, Together((workplace,), together))
    instructions = method.configure(method.init(engine.spec, engine.clients), engine.clients, 1)
    counted: list[int] = []
    handle = workplace.base.model.register_forward_pre_hook(lambda *_: counted.append(1))
    numbers = []
    for usage in (False, True):
        evaluations = dict(engine.evaluate(method, instructions, 0, ("validation", "test"), usage=usage))
        assert [e.observed is not None for e in evaluations.values()] == [usage] * len(clients)
        numbers.append(len(counted))
        counted.clear()
    handle.remove()
    assert numbers[0] == numbers[1] >= 2


@pytest.mark.parametrize("generates", [False, True])
@pytest.mark.parametrize("kind", ["classification", "generation", "multiple_choice"])
def test_scores_of_several_banks(kind: str, generates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if generates and kind != "generation":
        pytest.skip("only generation generates")
    texts: list[list[str]] = []

    def keep(references: Sequence[str], made: Sequence[str], scores: object) -> dict[str, float]:
        texts.append(list(made))
        return {"length": float(sum(map(len, made)))}

    monkeypatch.setattr("coterie.compute.score.text_metrics", keep)
    workplace = make_workplace(kind, eval_batch_size=7, generates=generates)
    clients = loaded(kind, torch.float64)[1]
    asked = {
        c.info.id: Score(
            [some_bank(workplace, labels_of(c), 3 * i + k, gate="softmax", rank=2) for k in range(1 + i % 3)],
            "test" if i != 1 else "validation",
        )
        for i, c in enumerate(clients)
    }
    same(workplace, dict(asked))
    if generates:
        number = sum(len(r.banks) for r in asked.values() if r.split == "test")
        assert len(texts) == 2 * number
        assert len({tuple(made) for made in texts}) > 2
        assert sorted(texts[:number]) == sorted(texts[number:])


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("gate", ["constant", "softmax", "scaled_dot_product"])
def test_observations(gate: str, padding: bool) -> None:
    workplace, clients = make_workplace(eval_batch_size=3), loaded("classification", torch.float64)[1]
    options = {"k": 2} if gate == "scaled_dot_product" else {}
    asked: dict[str, Request] = {
        c.info.id: Observe(
            some_bank(
                workplace, labels_of(c), i, gate=gate, options=options, rank=2, experts=2 + i % 2, shared=i % 2 * 2
            ),
            ("train", "test")[i % 2],
            ("usage", "embeddings") if i % 2 else ("embeddings",),
            padding=padding,
        )
        for i, c in enumerate(clients)
    }
    same(workplace, asked)


def test_gradient_checkpointing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1]
    model = copy.deepcopy(workplace.base.model)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()
    asked = {
        c.info.id: Train(bank, frozenset(bank.tensors), OPTIM)
        for i, c in enumerate(clients)
        for bank in [some_bank(workplace, labels_of(c), i, gate="softmax", rank=2, dropout=0.2)]
    }
    plain = answer_all([(LocalCompute(workplace, c, 1), asked[c.info.id]) for c in clients], ignore)
    workplace.base = replace(workplace.base, model=model)
    checked = answer_all([(LocalCompute(workplace, c, 1), asked[c.info.id]) for c in clients], ignore)
    assert furthest(plain, checked) < 1e-9


@pytest.mark.parametrize("gate", ["softmax", "slot_top_k", "similarity", "scaled_dot_product", "response"])
def test_clients_without_a_router_share_batches_with_those_that_have_one(gate: str) -> None:
    """As those that take part for the first time do, in methods that give a router later."""
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1]
    options = {"slot_top_k": {"own": 1}, "scaled_dot_product": {"k": 1}, "similarity": {"scale": 0.5}}.get(gate, {})
    slots = 1 if gate == "similarity" else None
    asked: dict[str, Request] = {}
    for i, client in enumerate(clients):
        routed = {"gate": gate, "options": options, "experts": 2, "slots": slots} if i % 2 else {"experts": 1}
        bank = some_bank(workplace, labels_of(client), i, rank=2, dropout=0.2, **routed)
        asked[client.info.id] = Train(bank, frozenset(k for k in bank.tensors if k.part is not Part.ROUTER), OPTIM)
    same(workplace, asked)


def test_without_dropout_folded_ranks_may_differ() -> None:
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1]
    asked: dict[str, Request] = {}
    for i, client in enumerate(clients):
        bank = some_bank(workplace, labels_of(client), i, experts=1, rank=2)
        bank = replace(bank, tensors={**bank.tensors, **(folded(workplace, i) if i else {})})
        asked[client.info.id] = Train(bank, frozenset(key for key in bank.tensors if key.expert != FOLDED), OPTIM)
    same(workplace, asked)


# what cannot share a batch, and what fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("unlike", ["dropout", "gate", "ranks", "folded ranks"])
def test_what_cannot_share_a_batch_is_answered_alone(unlike: str) -> None:
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1]
    asked: dict[str, Request] = {}
    for i, client in enumerate(clients):
        bank = some_bank(workplace, labels_of(client), i, experts=2, rank=2, dropout=0.1)
        if unlike == "dropout":
            bank = replace(bank, dropout=0.1 * (i % 2))
        if unlike == "gate":
            gate, options = ("scaled_dot_product", {"k": 1}) if i % 2 else ("softmax", {})
            bank = some_bank(workplace, labels_of(client), i, experts=2, rank=2, gate=gate, options=options)
        if unlike == "ranks":
            made = some_bank(workplace, labels_of(client), i, experts=2, rank=[1, 3])
            bank = replace(made, dropout=0.1, own_masks=True)
        trainable = frozenset(bank.tensors)
        if unlike == "folded ranks":
            bank = replace(bank, tensors={**bank.tensors, **folded(workplace, 1 + i)})
        asked[client.info.id] = Train(bank, trainable, OPTIM)
    same(workplace, asked, within=1e-12, alone=True)


def test_statistics_that_the_batched_form_does_not_know_are_asked_of_each_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1][:2]
    asked = [Observe(some_bank(workplace, labels_of(c), 0, gate="softmax", rank=2), "test", ("new",)) for c in clients]
    seen: list[str] = []
    monkeypatch.setattr(LocalCompute, "observe", lambda self, request: seen.append(self.client.info.id))
    answer_all([(LocalCompute(workplace, c, 1), request) for c, request in zip(clients, asked, strict=True)], ignore)
    assert seen == [c.info.id for c in clients]


def test_a_client_that_fails_leaves_the_others_as_they_were() -> None:
    """One diverges, one has no rows, one asks for a bank that does not fit."""
    workplace, clients = make_workplace(), list(loaded("classification", torch.float64)[1])
    asked = {c.info.id: some_bank(workplace, labels_of(c), i, gate="softmax", rank=2) for i, c in enumerate(clients)}
    wild, empty, wrong, *rest = clients
    asked[wild.info.id] = replace(asked[wild.info.id], scaling=1e200)
    emptied = ClientData(wild_info := replace(empty.info, id="nobody"), {**empty.splits, "train": ()})
    assert wild_info.id == emptied.info.id
    tensors = asked[wrong.info.id].tensors
    key = next(key for key in tensors if key.part is Part.B)
    asked[wrong.info.id] = replace(asked[wrong.info.id], tensors={**tensors, key: tensors[key][:-1]})
    order = [wild, emptied, wrong, *rest]
    banks = {"nobody": asked[empty.info.id], **asked}
    requests = {c.info.id: Train(banks[c.info.id], frozenset(banks[c.info.id].tensors), OPTIM) for c in order}
    told = answer_all([(LocalCompute(workplace, c, 1), requests[c.info.id]) for c in order], ignore)
    for one, reason in zip(told, ["not finite", "client nobody has no train rows", "the bank has"], strict=False):
        assert isinstance(one, CoterieError)
        assert reason in str(one)
    assert len(rest) == 2
    for client, one in zip(rest, told[3:], strict=True):
        assert furthest(one, LocalCompute(workplace, client, 1).train(requests[client.info.id])) < 1e-9


def test_nothing_of_a_round_outlives_it_but_what_is_returned() -> None:
    """Whatever waits for the garbage collector is memory that 1,000 clients hold at once."""
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1]
    kept: list[Any] = []
    begin = Training.begin_step

    def begin_step(self: Training) -> list[Batch]:
        kept.extend(map(weakref.ref, [self, self.layers.now, *self.parameters]))
        return begin(self)

    asked = [
        (LocalCompute(workplace, c, 1), Train(bank, frozenset(bank.tensors), OPTIM))
        for i, c in enumerate(clients)
        for bank in [some_bank(workplace, labels_of(c), i, gate="softmax", rank=2)]
    ]
    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "begin_step", begin_step)
            answer_all(asked, ignore)
            answer(asked[0][1], asked[0][0])
    finally:
        gc.enable()
    assert len(kept) > 6 * 10
    assert not [one for one in kept if one() is not None]


def test_a_client_may_fail_in_the_middle_of_its_steps() -> None:
    """The others go on without it, from another position in the stacks."""
    workplace, clients = make_workplace(), list(loaded("classification", torch.float64)[1])
    optim = Optim(learning_rate=0.01, batch_size=2, steps=40)
    wild = Optim(learning_rate=1e160, batch_size=2, steps=40, optimizer="sgd", clip=0)
    banks = [some_bank(workplace, labels_of(c), i, gate="softmax", rank=2) for i, c in enumerate(clients)]
    requests = [Train(b, frozenset(b.tensors), wild if i == 1 else optim) for i, b in enumerate(banks)]
    computes = [LocalCompute(workplace, c, 1) for c in clients]
    told = answer_all(list(zip(computes, requests, strict=True)), ignore)
    assert isinstance(told[1], CoterieError)
    assert "not finite at step" in str(told[1])
    assert computes[1].trained is None
    for i in (0, 2, 3, 4):
        assert furthest(told[i], LocalCompute(workplace, clients[i], 1).train(requests[i])) < 1e-9


@pytest.mark.parametrize("most", [1, 2, 3])
def test_out_of_memory_halves_the_batch_and_says_so(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1]
    train = batched.train_together
    sizes: list[int] = []

    def short_of_memory(asked: Any) -> Any:
        sizes.append(len(asked))
        if len(asked) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(asked)

    monkeypatch.setattr(batched, "train_together", short_of_memory)
    bank = {c.info.id: some_bank(workplace, labels_of(c), i, rank=2) for i, c in enumerate(clients)}
    asked = [
        (LocalCompute(workplace, c, 1), Train(bank[c.info.id], frozenset(bank[c.info.id].tensors), OPTIM))
        for c in clients
    ]
    notes: list[str] = []
    told = answer_all(asked, notes.append)
    assert notes[0] == "out of memory with 5 clients in a batch; continuing with 3"
    assert sizes[0] == 5
    for (compute, request), one in zip(asked, told, strict=True):
        assert furthest(one, LocalCompute(workplace, compute.client, 1).train(request)) < 1e-9


def test_a_client_for_whom_memory_never_suffices_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1]

    def short_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batched, "train_together", short_of_memory)
    real = LocalCompute.train
    hungry = clients[2].info.id
    monkeypatch.setattr(
        LocalCompute, "train", lambda self, r: short_of_memory() if self.client.info.id == hungry else real(self, r)
    )
    asked = []
    for i, client in enumerate(clients):
        bank = some_bank(workplace, labels_of(client), i, rank=2)
        asked.append((LocalCompute(workplace, client, 1), Train(bank, frozenset(bank.tensors), OPTIM)))
    told = answer_all(asked, lambda text: None)
    assert [isinstance(one, torch.OutOfMemoryError) for one in told] == [c.info.id == hungry for c in clients]


@pytest.mark.parametrize("together", [1, 5])
def test_evaluation_that_is_short_of_memory_goes_on_with_fewer_rows(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1]
    workplace = replace(workplace, eval_batch_size=8)
    banks = [some_bank(workplace, labels_of(c), i, rank=2) for i, c in enumerate(clients)][:together]
    asked = [(LocalCompute(workplace, c, 1), Score([b], "test")) for c, b in zip(clients, banks, strict=False)]
    whole = answer_all(asked, ignore)
    real, fits, sizes = passes.logits_of, [5], list[int]()

    def logits(workplace: Workplace, inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > fits[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(workplace, inputs)

    monkeypatch.setattr(passes, "logits_of", logits)
    notes: list[str] = []
    for found, before in zip(answer_all(asked, notes.append), whole, strict=True):
        assert furthest(found, before) < 1e-9
    assert sizes[0] > 5
    assert any("continuing with" in note for note in notes)
    fits[0] = 0
    for fault in answer_all(asked, notes.append):
        assert isinstance(fault, torch.OutOfMemoryError)
        assert fault.__traceback__ is None  # it would hold the tensors of the pass


# programs ------------------------------------------------------------------------------------------------------------


def test_programs_end_on_their_own_and_are_closed() -> None:
    """One asks three times, one once, one never, one fails; a fault of ours closes them all."""
    workplace, clients = make_workplace(), loaded("classification", torch.float64)[1]
    closed: list[int] = []

    def program(number: int, asks: int, fault: Exception | None = None) -> Any:
        bank = some_bank(workplace, labels_of(clients[number]), number, rank=2)
        seen = []
        try:
            for k in range(asks):
                (scored,) = yield Score([bank], ("train", "validation", "test")[k])
                seen.append(scored.loss)
            if fault:
                raise fault
            return ClientResult(Reply({}, 1, {"seen": seen}), Personal())
        finally:
            closed.append(number)

    computes = [LocalCompute(workplace, c, 1) for c in clients]
    ways: list[tuple[int, int, Exception | None]] = [
        (0, 3, None),
        (1, 1, None),
        (2, 0, None),
        (3, 1, CoterieError("no")),
    ]
    results = drive_together([program(*way) for way in ways], computes[:4], ignore)
    assert sorted(closed) == [0, 1, 2, 3]
    assert str(results[3]) == "no"
    for (number, asks, _), result in zip(ways[:3], results, strict=False):
        assert isinstance(result, ClientResult)
        expected = drive(program(number, asks), computes[number])
        assert furthest(result.reply.info["seen"], expected.reply.info["seen"]) < 1e-9
        assert len(result.reply.info["seen"]) == asks
    closed.clear()
    with pytest.raises(ZeroDivisionError):
        drive_together([program(0, 3), program(1, 1, ZeroDivisionError())], computes[:2], ignore)
    assert sorted(closed) == [0, 1]


def test_no_instruction_is_shared_between_clients_of_a_group(tmp_path: Path) -> None:
    class Writer:
        plan = Plan()

        def begin(self, base: Any, me: Any) -> Personal:
            return Personal()

        def client(self, ins: Instruction, me: Any, personal: Personal) -> Any:
            ins.tensors[KEY].add_(1)
            return ClientResult(Reply(ins.tensors, 1), personal)
            yield

    clients = loaded("classification", torch.float64)[1]
    workplace = make_workplace()
    states = ClientStates(PersonalStore(tmp_path))
    engine = LocalEngine(workplace, FederatedData(clients, {}), states, Together((workplace,), 4))
    shared = Instruction({KEY: torch.zeros(2)})
    deliveries = dict(engine.train(Writer(), {c.info.id: shared for c in clients}, 1))  # type: ignore[arg-type]
    assert len(deliveries) == 5
    assert all(torch.equal(d.reply.tensors[KEY], torch.ones(2)) for d in deliveries.values() if d.reply)
    assert torch.equal(shared.tensors[KEY], torch.zeros(2))


KEY = Key("q", 0, Part.A)
