"""Rounds of a method over a tiny BERT and a handful of rows, for tests that hold one method against another."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import sites
import tiny
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.config.load import check_config
from coterie.data.clients import load_data
from coterie.data.rows import ClientData, FederatedData
from coterie.data.tasks import make_task
from coterie.engines.local import LocalEngine
from coterie.engines.store import ClientStates, PersonalStore
from coterie.methods.base import Method
from coterie.methods.plan import Plan
from coterie.methods.registry import method_named
from coterie.nn.base import Base, load_base
from coterie.requests import Optim, Score, Scored
from coterie.types import Bank, ClientId, Reply, Tensors

OPTIM = Optim(learning_rate=0.01, batch_size=4, epochs=1)
ROUNDS = 2
ARCHITECTURES = {"classification": "bert", "generation": "llama", "multiple_choice": "gpt2"}


@cache
def loaded(kind: str) -> tuple[Base, tuple[ClientData, ...]]:
    """A tiny model and the clients ``mood-0``, ``size-0``, ``place-0``, ``mood-1``, ...: two or three labels each."""
    with tempfile.TemporaryDirectory() as folder:
        sites.federation(Path(folder) / "clients", kind, clients=7, rows=10)
        config = check_config({"data": {"folder": "clients"}, "task": {"kind": kind}})
        federation = load_data(config.data, kind, 0, Path(folder))  # type: ignore[arg-type]
        base = load_base(str(tiny.folder(Path(folder) / "model", ARCHITECTURES[kind])), kind)  # type: ignore[arg-type]
    return base, federation.clients


def clients(*names: str, kind: str = "classification") -> tuple[ClientData, ...]:
    """These clients, in this order."""
    known = {client.info.id: client for client in loaded(kind)[1]}
    return tuple(known[name] for name in names)


def twin(client: ClientData, name: str) -> ClientData:
    """Another client with the same rows."""
    return replace(client, info=replace(client.info, id=name))


def shortened(client: ClientData, rows: int) -> ClientData:
    """The client with only its first ``rows`` training rows."""
    splits = {**client.splits, "train": client.splits["train"][:rows]}
    return replace(client, info=replace(client.info, num_train=rows), splits=splits)


def make(
    name: str,
    *,
    head: Any = "personal",
    dropout: float = 0.1,
    rounds: int = ROUNDS,
    optim: Optim = OPTIM,
    **settings: Any,
) -> Any:
    """A method with these settings of its own, rank 2."""
    kind = method_named(name)
    plan = Plan(rank=2, alpha=4, dropout=dropout, optim=optim, head=head, rounds=rounds)
    return kind(kind.Settings(**settings), plan)


@dataclass(frozen=True)
class Ended:
    """What rounds left: the server's state, what every client's last reply held, the bank that it would use next."""

    method: Method
    engine: LocalEngine
    state: Any
    replies: Mapping[ClientId, Reply]
    banks: Mapping[ClientId, Bank]

    def tensors(self, client: ClientId) -> Tensors:
        return self.banks[client].tensors


def engine_of(over: Sequence[ClientData], folder: Path, kind: str = "") -> LocalEngine:
    """The reference engine over these clients."""
    base, task_kind = loaded(kind or "classification")[0], kind or "classification"
    workplace = Workplace(base, make_task(task_kind, base.tokenizer, 32), 0)  # type: ignore[arg-type]
    workplace.all_clients = {client.info.id: client for client in over}
    return LocalEngine(workplace, FederatedData(tuple(over), {}), ClientStates(PersonalStore(folder)))


def run(method: Any, over: Sequence[ClientData], folder: Path, *, rounds: int = ROUNDS, kind: str = "") -> Ended:
    """``rounds`` rounds of all clients on the reference engine; every client replies, or it is an error."""
    engine = engine_of(over, folder, kind)
    state, replies = method.init(engine.spec, engine.clients), {}
    for rnd in range(1, rounds + 1):
        deliveries = dict(engine.train(method, method.configure(state, engine.clients, rnd), rnd))
        assert [d.error for d in deliveries.values() if d.error] == []
        replies = {c: d.reply for c, d in deliveries.items() if d.reply is not None}
        assert set(replies) == {c.id for c in engine.clients}
        state = method.aggregate(state, replies, rnd)
    after = method.configure(state, engine.clients, rounds + 1)
    return Ended(method, engine, state, replies, dict(engine.banks(method, after, rounds)))


def score(ended: Ended, client: ClientData, request: Score) -> list[Scored]:
    """The answer to a request of that client."""
    return LocalCompute(ended.engine.workplace, client, ROUNDS).score(request)
