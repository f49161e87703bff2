"""Flower's simulation runtime: every client a SuperNode, their messages answered by Ray's actors (:mod:`.actor`).

For several processes, GPUs or machines. The run folder is the same as the local engine's, bit for bit with the same
number of threads. With several machines the folder has to be on a file system that all of them share.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from coterie import codec
from coterie.compute.loading import truncation_of
from coterie.compute.workplace import Steps
from coterie.config.sections import Config, RaySettings
from coterie.data.rows import FederatedData
from coterie.data.truncation import Truncation
from coterie.energy import Energy
from coterie.engines.actor import answer, digest
from coterie.engines.base import Delivery, Evaluation, Needs
from coterie.engines.client import Outcome
from coterie.engines.encode_once import EncodedOnce
from coterie.engines.store import PersonalStore, RoundStore
from coterie.flower.message import Message, Transport
from coterie.machine import cpu_cores
from coterie.methods.base import Method
from coterie.types import Bank, BaseSpec, ClientId, ClientInfo, CoterieError, ExportedAs, Instruction, Json

NEEDS = Needs(("flwr", "ray"), "pip install 'coterie[flower-sim]'")
_TTL = 30 * 24 * 3600.0  # seconds; a simulation waits for every client
_MIB = 2**20


def make(
    config: Config, federation: FederatedData, folder: Path, root: Path, cache: dict[str, object]
) -> FlowerSimEngine:
    """The engine for a run in ``folder``; nothing is started before it is first used."""
    clients = tuple(client.info for client in federation.clients)
    start = partial(_simulation, len(clients), *_resources(config, len(clients)))
    truncation = partial(truncation_of, config, federation, root)
    return FlowerSimEngine(clients, head_of(config, federation, folder, root), folder, start, truncation)


def _simulation(clients: int, actor: Mapping[str, float], ray: Mapping[str, Any]) -> AbstractContextManager[Transport]:
    """Flower's runtime with a node for each client."""
    from coterie.flower.simulation import simulation  # Flower, which only this needs

    return simulation(answer, clients, actor, ray)


def head_of(config: Config, federation: FederatedData, folder: Path, root: Path) -> dict[str, Json]:
    """The head that tells an actor which run a message is for."""
    paths = {"folder": str(folder.resolve()), "root": str(root.resolve())}
    return {"config": json.loads(config.model_dump_json()), "data": digest(federation.manifest), **paths}


def _resources(config: Config, clients: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The resources of an actor, and the arguments of ``ray.init``.

    Raises :class:`CoterieError` for settings that contradict each other.
    """
    engine, ray = config.engine, config.engine.ray
    if engine.clients_per_batch != 1:
        raise CoterieError("[engine] clients_per_batch is for the local engine only; set [engine.ray] clients_at_once")
    if not isinstance(engine.device, str) or engine.device == "cuda:all":
        raise CoterieError(
            f"[engine] device names several, {engine.device!r}, but Ray distributes the clients itself: name one, "
            "and set [engine.ray] gpus_per_client"
        )
    if engine.device.startswith("cuda") and not ray.gpus_per_client:
        raise CoterieError(
            f"[engine] device = {engine.device!r}, but [engine.ray] gpus_per_client = 0 leaves clients without a GPU; "
            "raise it"
        )
    actor = {"num_cpus": float(ray.cpus_per_client), "num_gpus": ray.gpus_per_client}
    if ray.address:
        if ray.clients_at_once:
            raise CoterieError("[engine.ray] clients_at_once has no effect on a Ray cluster; set cpus_per_client")
        return actor, {"address": ray.address}
    at_once = min(_at_once(ray), clients)
    return actor, {"num_cpus": at_once * ray.cpus_per_client, "object_store_memory": ray.object_store_mib * _MIB}


def _at_once(ray: RaySettings) -> int:
    return ray.clients_at_once or max(1, cpu_cores() // ray.cpus_per_client)


@dataclass
class FlowerSimEngine:
    """Sends every client's message to a node of its own, and waits for all answers.

    Raises :class:`CoterieError` if an actor or the simulation dies; the last checkpoint is kept.
    """

    clients: tuple[ClientInfo, ...]
    head: Mapping[str, Json]
    folder: Path
    start: Callable[[], AbstractContextManager[Transport]]
    truncation: Callable[[], Truncation] = Truncation
    _stack: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def _transport(self) -> Transport:
        try:
            return self._stack.enter_context(self.start())
        except ConnectionError as fault:
            raise CoterieError(f"{fault}; see [engine.ray]") from fault

    @cached_property
    def _nodes(self) -> dict[ClientId, int]:
        return dict(zip(sorted(c.id for c in self.clients), sorted(self._transport.nodes()), strict=True))

    @cached_property
    def spec(self) -> BaseSpec:
        """As an actor reports it: only actors load the base."""
        first = self.clients[0].id
        ((_, _, message),) = self._exchange("query.hello", {first: Instruction()}, 0, {})
        return codec.decode(BaseSpec, message.body)

    def train(
        self,
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        limits: Mapping[ClientId, int] | None = None,
    ) -> Iterator[tuple[ClientId, Delivery]]:
        """Every client's delivery for round ``rnd``, in the clients' order."""
        for client, down, message in self._exchange("train", instructions, rnd, {}):
            energy = message.head.get("energy")
            head = {**message.head, "energy": energy and Energy(**energy)}
            yield client, Outcome(message.body, **head).delivery(down)

    def evaluate(
        self,
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        splits: tuple[str, ...],
        usage: bool = False,
    ) -> Iterator[tuple[ClientId, Evaluation]]:
        """Scores of every client."""
        details: dict[str, Json] = {"splits": list(splits), "usage": usage}
        for client, _, message in self._exchange("evaluate", instructions, rnd, details):
            yield client, Outcome(message.body, **message.head).evaluation()

    def banks(
        self, method: Method, instructions: Mapping[ClientId, Instruction], rnd: int, export: ExportedAs = "last"
    ) -> Iterator[tuple[ClientId, Bank]]:
        """Every client's bank after round ``rnd``, for export."""
        for client, _, message in self._exchange("query.bank", instructions, rnd, {}):
            yield client, codec.decode(Bank, message.body)

    def watch(self, report: Callable[[Steps], None]) -> None:
        """Do nothing: clients train in Ray's processes."""

    def restore(self, rnd: int) -> None:
        """Go back to the personal states after round ``rnd``."""
        for store in self._stores():
            store.forget_after(rnd)

    def state_rounds(self, rnd: int) -> Mapping[str, Mapping[ClientId, int]]:
        """The round that each client's state is of, after round ``rnd``."""
        return {store.folder.name: store.state_rounds(rnd) for store in self._stores()}

    def prune(self, rnd: int, kept_rounds: Collection[int] = ()) -> None:
        """Delete the personal states that only rounds before ``rnd`` need, and none of the rounds ``kept_rounds``."""
        for store in self._stores():
            store.prune(rnd, kept_rounds)

    def close(self) -> None:
        """End Ray and all processes that it started."""
        self._stack.close()

    def _stores(self) -> tuple[PersonalStore, RoundStore[Bank]]:
        """The stores that the actors write to."""
        return PersonalStore(self.folder), RoundStore(self.folder / "trained", Bank)

    def _exchange(
        self, kind: str, instructions: Mapping[ClientId, Instruction], rnd: int, details: Mapping[str, Json]
    ) -> Iterator[tuple[ClientId, int, Message]]:
        """Every client's answer, with the number of bytes that it was sent, in the clients' order."""
        order = [client.id for client in self.clients if client.id in instructions]
        encoded = EncodedOnce(instructions)
        blobs = {client: encoded.take(client) for client in order}
        head = {**self.head, "kind": kind, "round": rnd, **details}
        to = [(self._nodes[c], kind, Message({**head, "client": c}, blobs[c])) for c in order]
        tickets = dict(zip(self._transport.send(to, _TTL, str(rnd)), order, strict=True))
        if None in tickets:
            raise CoterieError(f"Flower did not take the message of {tickets[None]}; continue with --resume")
        answers: dict[ClientId, Message] = {}
        for client in order:
            while client not in answers:
                answers |= self._receive(tickets, kind, rnd)
            yield client, len(blobs[client]), answers.pop(client)

    def _receive(self, tickets: dict[str | None, ClientId], kind: str, rnd: int) -> dict[ClientId, Message]:
        """The answers that have arrived, after a short pause if there are none. Removes their ``tickets``."""
        try:
            arrived = self._transport.receive({ticket: sys.maxsize for ticket in tickets if ticket})
        except ConnectionError as fault:
            raise CoterieError(f"{fault}; continue with --resume") from fault
        answers = {}
        for ticket, message in arrived:
            client = tickets.pop(ticket)
            if isinstance(message, str):
                raise CoterieError(f"client {client}, {kind} of round {rnd}: {message}; continue with --resume")
            if "fault" in message.head:
                raise CoterieError(str(message.head["fault"]))
            answers[client] = message
        if not arrived:
            time.sleep(self._transport.pause)
        return answers
