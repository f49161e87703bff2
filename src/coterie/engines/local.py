"""Simulates the clients in this process over one base that is loaded once.

One client at a time it is the reference, the truth for the other engines; with ``[engine] clients_per_batch`` the
programs of several clients run in step and share their forward passes (:mod:`.batched`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from coterie import codec
from coterie.compute.batched import FAULTS, Asked, answer_all, drive_together
from coterie.compute.client import LocalCompute
from coterie.compute.loading import workplaces
from coterie.compute.workplace import Workplace
from coterie.config.sections import Config
from coterie.data.rows import ClientData, FederatedData
from coterie.engines.base import Delivery, Evaluation, Stream
from coterie.engines.batch_size import AutoSize, first_request
from coterie.engines.encode_once import Blobs
from coterie.engines.grouping import Load, evaluation, grouped, spread, training
from coterie.engines.schedule import mover, on_places
from coterie.engines.store import PersonalStore, RoundStore
from coterie.machine import release_memory
from coterie.methods.base import Compute, Method, drive
from coterie.ops.metrics import check_rouge
from coterie.types import (
    Answer,
    Bank,
    BaseSpec,
    ClientId,
    ClientInfo,
    ClientProgram,
    ClientResult,
    CoterieError,
    Instruction,
    Json,
    Observe,
    Observed,
    Optim,
    Personal,
    Score,
    Scored,
    Train,
)

T = TypeVar("T")
_TIDY_EVERY = 5.0  # seconds; it takes some 50 ms


def make(config: Config, federation: FederatedData, folder: Path, root: Path, cache: dict[str, Any]) -> LocalEngine:
    """The engine for a run in ``folder``; the base stays in ``cache`` for further runs with the same model."""
    if config.task.generate:
        check_rouge()
    places = workplaces(config, root, cache)
    trained = RoundStore(folder / "trained", Bank) if config.evaluated == "trained" else None
    asked = config.engine.clients_per_batch
    together, auto = (1, AutoSize()) if asked == "auto" else (asked, None)
    store = PersonalStore(folder)
    return LocalEngine(places[0], federation, store, trained, together, auto=auto, more=places[1:], optim=config.train)


@dataclass(frozen=True)
class Start:
    """What a client starts a round with, as it came through the codec."""

    client: ClientData
    ins: Instruction
    bytes_down: int
    personal: Personal


@dataclass(frozen=True)
class Ended:
    """What came of a client's round, and what saves that which stays with it."""

    client: ClientId
    delivery: Delivery
    saves: Sequence[Callable[[], None]]


@dataclass(frozen=True)
class LocalEngine:
    """Runs every client of a simulated federation in this process, ``together`` at a time.

    Instructions and replies go through the codec both ways, as over a network: the bytes are counted as encoded, and
    no tensor is shared between server and client by accident. With a store for ``trained`` banks, clients evaluate
    and export what they trained last, else what the server sends.
    """

    place: Workplace
    federation: FederatedData
    store: PersonalStore
    trained: RoundStore[Bank] | None = None
    together: int = 1
    notes: list[str] = field(default_factory=list)  # what the user should know, until a delivery takes it along
    guard: Callable[[LocalCompute], Compute] = lambda compute: compute  # around training; a site bounds its steps
    auto: AutoSize | None = None  # decides on ``together``
    more: tuple[Workplace, ...] = ()  # on further devices
    optim: Optim = field(default_factory=Optim)  # how clients mostly train: for what their training costs
    said: Callable[[Exception], str] = str  # a fault in a delivery's words; a site keeps what is its own out of them

    @property
    def spec(self) -> BaseSpec:
        return self.place.base.spec

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        return tuple(client.info for client in self.federation.clients)

    @property
    def places(self) -> tuple[Workplace, ...]:
        return self.place, *self.more

    def train(self, method: Method[Any], instructions: Mapping[ClientId, Instruction], rnd: int) -> Stream[Delivery]:
        """Every client's delivery for round ``rnd``, as it comes. A client's failure is its delivery's ``error``.

        Once all have come, what stays with the clients is on the disk.
        """
        clients = self._taking_part(instructions)
        together = self._decide(method, clients, instructions, rnd)
        groups, shares = self._grouped(clients, together, training(self.place, self.optim))
        blobs = Blobs(instructions[client.info.id] for client in clients)

        def fetch(number: int) -> list[Start]:
            return [self._start(method, c, blobs.of(instructions[c.info.id]), rnd) for c in groups[number]]

        def work(place: Workplace, number: int) -> list[Ended]:
            return self._train(method, place, moving.take(number), rnd)

        with mover(shares, fetch) as moving, closing(self._each(shares, work)) as done:
            for ended in chain.from_iterable(done):
                for save in ended.saves:
                    moving.write(save)
                yield ended.client, replace(ended.delivery, note=_taken(self.notes))

    def evaluate(
        self,
        method: Method[Any],
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        splits: tuple[str, ...],
        usage: bool = False,
    ) -> Stream[Evaluation]:
        """Every client's scores with the bank that it would start round ``rnd + 1`` with, or that it trained last."""
        clients, together = self._taking_part(instructions), self._together
        rows = -(-self.place.eval_batch_size // together)
        groups, shares = self._grouped(clients, together, evaluation(self.place, splits, rows))

        def fetch(number: int) -> list[Bank]:
            return [self._bank(method, client, instructions[client.info.id], rnd) for client in groups[number]]

        def work(place: Workplace, number: int) -> list[tuple[ClientId, Evaluation]]:
            return self._evaluate(place, groups[number], moving.take(number), rnd, splits, usage)

        with mover(shares, fetch) as moving, closing(self._each(shares, work)) as done:
            for client, found in chain.from_iterable(done):
                yield client, replace(found, note=_taken(self.notes))

    def banks(self, method: Method[Any], instructions: Mapping[ClientId, Instruction], rnd: int) -> Stream[Bank]:
        """Every client's bank after round ``rnd``, for export."""
        for client in self._taking_part(instructions):
            yield client.info.id, self._bank(method, client, instructions[client.info.id], rnd)

    def restore(self, rnd: int) -> None:
        """Go back to the personal states after round ``rnd``."""
        self.store.forget_after(rnd)
        if self.trained:
            self.trained.forget_after(rnd)

    def held(self, rnd: int) -> dict[str, Json]:
        """From which round each client's state is, after round ``rnd``."""
        trained = {"trained": self.trained.held(rnd)} if self.trained else {}
        return {"personal": self.store.held(rnd), **trained}

    def prune(self, rnd: int) -> None:
        """Give up the personal states that only rounds before ``rnd`` need."""
        self.store.prune(rnd)
        if self.trained:
            self.trained.prune(rnd)

    def close(self) -> None:
        """Nothing: all is in this process."""

    @property
    def _together(self) -> int:
        return self.auto.now.clients if self.auto and self.auto.now else self.together

    def _decide(
        self,
        method: Method[Any],
        clients: Sequence[ClientData],
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
    ) -> int:
        """How many clients share a pass of this round: where that is to be found out, by the largest adapter."""
        if self.auto is None or not clients:
            return self._together

        def weight(client: ClientData) -> int:
            sent = sum(tensor.nbytes for tensor in instructions[client.info.id].tensors.values())
            return sent + self.store.size(client.info.id, rnd - 1)

        def request() -> Train | None:
            for client in heaviest:
                ins, me = instructions[client.info.id], client.info
                with suppress(CoterieError):  # that client fails by itself
                    personal = self._personal(method, client, rnd - 1)
                    program = method.client(ins, me, personal)
                    return first_request(program, partial(method.bank, ins, me, personal), self.optim)
            return None

        heaviest = sorted(clients, key=weight, reverse=True)
        if size := self.auto.decide(self.places, clients, weight(heaviest[0]), request):
            self.notes.append(f"{size.clients} clients share a forward pass: {size.reason}")
        return self._together

    def _grouped(
        self, clients: Sequence[ClientData], together: int, load: Callable[[int, ClientData], Load]
    ) -> tuple[list[list[ClientData]], list[list[int]]]:
        """The clients in groups that share passes, and the numbers of the groups for each place."""
        if together == len(self.places) == 1:
            return [[client] for client in clients], [list(range(len(clients)))]
        size = min(together, -(-len(clients) // len(self.places)))
        groups = grouped([load(number, client) for number, client in enumerate(clients)], max(1, size))
        return [[clients[one.number] for one in group] for group in groups], spread(groups, len(self.places))

    def _each(self, shares: Sequence[Sequence[int]], work: Callable[[Workplace, int], T]) -> Generator[T, None, None]:
        """What ``work`` makes of every group; memory that is free is given back from time to time."""
        tidied = time.monotonic()
        with closing(on_places(self.places, shares, work)) as made:
            for one in made:
                yield one
                if time.monotonic() - tidied > _TIDY_EVERY:
                    release_memory()
                    tidied = time.monotonic()

    def _start(self, method: Method[Any], client: ClientData, down: bytes, rnd: int) -> Start:
        """What the client starts the round with; its rows are tokenised, too."""
        with suppress(CoterieError):  # of a row that cannot be encoded it hears when it trains
            self.place.prepare(client, "train")
        return Start(client, codec.decode(Instruction, down), len(down), self._personal(method, client, rnd - 1))

    def _train(self, method: Method[Any], place: Workplace, starts: Sequence[Start], rnd: int) -> list[Ended]:
        """What came of clients whose programs run together."""
        started = time.perf_counter()
        programs = [method.client(start.ins, start.client.info, start.personal) for start in starts]
        computes = [LocalCompute(place, start.client, rnd) for start in starts]
        results = self._run(programs, computes)
        ended = [self._ended(*of, rnd) for of in zip(starts, computes, results, strict=True)]
        seconds = (time.perf_counter() - started) / len(starts)
        return [replace(one, delivery=replace(one.delivery, seconds=seconds)) for one in ended]

    def _evaluate(
        self,
        place: Workplace,
        group: Sequence[ClientData],
        banks: Sequence[Bank],
        rnd: int,
        splits: tuple[str, ...],
        usage: bool,
    ) -> list[tuple[ClientId, Evaluation]]:
        """The evaluations of clients that are evaluated together."""
        scores: list[dict[str, Mapping[str, float]]] = [{} for _ in group]
        for split in splits:
            has = [i for i, client in enumerate(group) if client.splits.get(split)]
            asked: list[Asked] = [(LocalCompute(place, group[i], rnd), Score([banks[i]], split)) for i in has]
            for i, found in zip(has, _told(asked, self.notes), strict=True):
                (scored,) = cast(list[Scored], found)
                scores[i][split] = {**scored.metrics, "loss": scored.loss}
        looks: list[Asked] = [
            (LocalCompute(place, client, rnd), Observe(bank, _seen(client)))
            for client, bank in zip(group, banks, strict=True)
            if usage
        ]
        observed = [cast(Observed, found) for found in _told(looks, self.notes)]
        return [
            (client.info.id, Evaluation(scores[i], observed[i] if usage else None)) for i, client in enumerate(group)
        ]

    def _run(
        self, programs: Sequence[ClientProgram], computes: Sequence[LocalCompute]
    ) -> Sequence[ClientResult | Exception]:
        """What each program returns, or the fault that ended it."""
        if len(programs) > 1:
            return drive_together(programs, computes, self.notes.append)
        try:
            return [drive(programs[0], self.guard(computes[0]))]
        except FAULTS as fault:
            return [fault.with_traceback(None)]

    def _ended(self, start: Start, compute: LocalCompute, result: ClientResult | Exception, rnd: int) -> Ended:
        """What the server gets of a client's result, and what is to be saved with the client."""
        client = start.client.info.id
        if isinstance(result, Exception):
            memory = isinstance(result, torch.OutOfMemoryError)
            error = f"client {client}: out of memory; lower [train] batch_size" if memory else self.said(result)
            return Ended(client, Delivery(None, error, start.bytes_down, 0, 0.0), [])
        up = codec.encode(result.reply)
        saves = [partial(self.store.save, client, rnd, result.personal)]
        if self.trained and compute.trained:
            saves.append(partial(self.trained.save, client, rnd, compute.trained))
        reply = codec.decode(type(result.reply), up)
        return Ended(client, Delivery(reply, None, start.bytes_down, len(up), 0.0), saves)

    def _bank(self, method: Method[Any], client: ClientData, ins: Instruction, rnd: int) -> Bank:
        """What the client evaluates with after round ``rnd``."""
        trained = self.trained.load(client.info.id, rnd) if self.trained else None
        return trained or method.bank(ins, client.info, self._personal(method, client, rnd))

    def _personal(self, method: Method[Any], client: ClientData, until: int) -> Personal:
        return self.store.load(client.info.id, until) or method.begin(self.spec, client.info)

    def _taking_part(self, instructions: Mapping[ClientId, Instruction]) -> list[ClientData]:
        return [client for client in self.federation.clients if client.info.id in instructions]


def _told(asked: Sequence[Asked], notes: list[str]) -> list[Answer]:
    """The answer to each client's request. Raises the first fault."""
    told = answer_all(asked, notes.append)
    for (compute, _), one in zip(asked, told, strict=True):
        if isinstance(one, torch.OutOfMemoryError):
            raise CoterieError(
                f"client {compute.client.info.id}: out of memory in evaluation; lower [run] eval_batch_size or [model] "
                "max_length"
            ) from one
        if isinstance(one, Exception):
            raise one
    return [one for one in told if not isinstance(one, Exception)]


def _taken(notes: list[str]) -> str | None:
    """The notes as one text; they are told once."""
    taken = [notes.pop(0) for _ in range(len(notes))]  # a place may add one meanwhile
    return "; ".join(dict.fromkeys(taken)) or None


def _seen(client: ClientData) -> str:
    """The split on which the use of experts is looked at."""
    return next((split for split in ("test", "validation", "train") if client.splits.get(split)), "train")
