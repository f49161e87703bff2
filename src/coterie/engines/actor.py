"""Answers any client's message in an actor of Flower's simulation, over a base that the process loads once.

An actor keeps nothing of a client between messages. The clients' states are in the run folder, so any actor that is
free may answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from coterie import codec
from coterie.compute.loading import simulated_workplaces
from coterie.config.load import check_config
from coterie.data.clients import load_data
from coterie.engines.client import LocalClient, client_bank, evaluate_client, train_client
from coterie.engines.store import ClientStates
from coterie.flower.message import Message
from coterie.machine import default_threads
from coterie.methods.base import Method
from coterie.types import ClientId, CoterieError, Json

_RUN = ("config", "folder", "root", "data")  # the keys of a head that say which run it belongs to


@dataclass(frozen=True)
class _Run:
    """A run in an actor: all of its clients, over one base."""

    head: Mapping[str, Json]
    method: Method
    clients: Mapping[ClientId, LocalClient]


_RUNS: list[_Run] = []  # only the last one
_BASES: dict[str, object] = {}


def answer(message: Message, *_: object) -> Message:
    """The reply to one message; a fault that the user can fix is the ``fault`` in its head."""
    try:
        return _ANSWERS[message.head["kind"]](_opened(message.head), message)
    except (CoterieError, codec.CodecError) as fault:
        return Message({"fault": str(fault)})


def digest(manifest: object) -> str:
    """SHA-256 of a federation's manifest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hello(run: _Run, message: Message) -> Message:
    client = run.clients[message.head["client"]]
    return Message({}, codec.encode(client.workplace.base.spec))


def _train(run: _Run, message: Message) -> Message:
    head = message.head
    outcome = train_client(run.clients[head["client"]], run.method, message.body, head["round"])
    energy = outcome.energy and asdict(outcome.energy)  # an estimate: counters would count other actors too
    told = {"error": outcome.error, "seconds": outcome.seconds, "note": outcome.note, "energy": energy}
    return Message(told, outcome.blob)


def _evaluate(run: _Run, message: Message) -> Message:
    head = message.head
    client = run.clients[head["client"]]
    outcome = evaluate_client(client, run.method, message.body, head["round"], head["splits"], head["usage"], True)
    return Message({"note": outcome.note}, outcome.blob)


def _bank(run: _Run, message: Message) -> Message:
    head = message.head
    return Message({}, codec.encode(client_bank(run.clients[head["client"]], run.method, message.body, head["round"])))


_ANSWERS: dict[str, Callable[[_Run, Message], Message]] = {
    "query.hello": _hello,
    "train": _train,
    "evaluate": _evaluate,
    "query.bank": _bank,
}


def _opened(head: Mapping[str, Json]) -> _Run:
    about = {name: head[name] for name in _RUN}
    if not (_RUNS and _RUNS[0].head == about):
        _RUNS[:] = [_load(about)]
    return _RUNS[0]


def _load(about: Mapping[str, Json]) -> _Run:
    """Load rows and base. Raises :class:`CoterieError` if the rows here are not those of the run."""
    config, root = check_config(about["config"]), Path(about["root"])
    torch.set_num_threads(config.engine.threads or default_threads())
    federation = load_data(config.data, config.task.kind, config.run.seed, root)
    if (here := digest(federation.manifest)) != about["data"]:
        raise CoterieError(f"an actor read different rows than the run ({here[:12]}); give all machines the same files")
    workplace = simulated_workplaces(config, federation, root, _BASES)[0]
    states = ClientStates.of(config, Path(about["folder"]))
    method = config.make_method(root)
    return _Run(about, method, {data.info.id: LocalClient(workplace, data, states) for data in federation.clients})
