"""What runs in an actor of Flower's simulation: the base loaded once in the process, any client's message answered.

An actor keeps nothing of a client from one message to the next: personal state is in the run folder, so that whichever
actor is free may answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coterie import codec
from coterie.config.load import check_config
from coterie.data.clients import load_data
from coterie.engines import local
from coterie.engines.local import LocalEngine
from coterie.flower.message import Message
from coterie.machine import default_threads
from coterie.methods.base import Method
from coterie.types import CoterieError, Instruction, Json

_RUN = ("config", "folder", "root", "data")  # of a head: the keys that say which run it is of


@dataclass(frozen=True)
class _Run:
    """A run as an actor holds it: all of its clients' rows, over one base."""

    head: Mapping[str, Json]
    method: Method[Any]
    engine: LocalEngine


_RUNS: list[_Run] = []  # the last one
_BASES: dict[str, Any] = {}


def answer(message: Message, *_: object) -> Message:
    """The reply to one message; a fault that the user can mend is the ``fault`` in its head."""
    try:
        run = _opened(message.head)
        ins = codec.decode(Instruction, message.body)
        return _ANSWERS[message.head["kind"]](run, message.head, ins)
    except (CoterieError, codec.CodecError) as fault:
        return Message({"fault": str(fault)})


def digest(manifest: Json) -> str:
    """SHA-256 of a federation's manifest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hello(run: _Run, head: Mapping[str, Json], ins: Instruction) -> Message:
    return Message({}, codec.encode(run.engine.spec))


def _train(run: _Run, head: Mapping[str, Json], ins: Instruction) -> Message:
    ((_, delivery),) = run.engine.train(run.method, {head["client"]: ins}, head["round"])
    told = {"error": delivery.error, "note": delivery.note, "seconds": delivery.seconds}
    return Message(told, codec.encode(delivery.reply) if delivery.reply is not None else b"")


def _evaluate(run: _Run, head: Mapping[str, Json], ins: Instruction) -> Message:
    ((_, found),) = run.engine.evaluate(
        run.method, {head["client"]: ins}, head["round"], tuple(head["splits"]), head["usage"]
    )
    return Message({}, codec.encode(found))


def _bank(run: _Run, head: Mapping[str, Json], ins: Instruction) -> Message:
    ((_, bank),) = run.engine.banks(run.method, {head["client"]: ins}, head["round"])
    return Message({}, codec.encode(bank))


_ANSWERS: dict[str, Callable[[_Run, Mapping[str, Json], Instruction], Message]] = {
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
    """Load rows and base. Raises :class:`CoterieError` where the rows here are not those of the run."""
    config, root = check_config(about["config"]), Path(about["root"])
    torch.set_num_threads(config.engine.threads or default_threads())
    federation = load_data(config.data, config.task.kind, config.run.seed, root)
    if (here := digest(federation.manifest)) != about["data"]:
        raise CoterieError(f"an actor read other rows than the run did ({here[:12]}); give all machines the same files")
    method = config.make_method(root)
    return _Run(about, method, local.make(config, federation, Path(about["folder"]), root, _BASES))
