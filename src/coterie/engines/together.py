"""Many clients at once: several share a forward pass, groups run on several devices, the disk is used meanwhile.

What each client gets is what :mod:`.client` would give it alone, within floating point, and bit for bit where every
group has one client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TypeVar

from coterie.compute.batched import FAULTS, drive_together
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.rows import ClientData
from coterie.energy import divided, meter_of
from coterie.engines.base import Delivery, Evaluation, Stream
from coterie.engines.batch_size import AutoSize, first_request
from coterie.engines.client import (
    LocalClient,
    Outcome,
    Start,
    bank_program,
    begin,
    encoded_reply,
    evaluations,
    failed,
    gflop_in,
    joined,
    saves_of,
)
from coterie.engines.encode_once import EncodedOnce
from coterie.engines.grouping import Load, evaluation_load, grouped, schedule, training_load
from coterie.engines.privacy import row_privacy
from coterie.engines.schedule import disk_thread, run_on
from coterie.machine import releasing_memory
from coterie.methods.base import Method, drive
from coterie.requests import BankProgram, ClientProgram, Optim, Train
from coterie.types import ClientId, ClientResult, CoterieError, Instruction

T = TypeVar("T")
Saves = Sequence[Callable[[], None]]


@dataclass(frozen=True)
class Together:
    """Runs groups of ``size`` clients, or of as many as ``auto`` decides, on all ``workplaces``.

    ``optim`` is how most clients train: their cost is estimated from it. ``notes`` are what the user should know;
    the next delivery carries them.
    """

    workplaces: tuple[Workplace, ...]
    size: int = 1
    auto: AutoSize | None = None
    optim: Optim = field(default_factory=Optim)
    notes: list[str] = field(default_factory=list)

    @property
    def clients_per_batch(self) -> int:
        """The size of a group, as decided last."""
        return self.auto.now.clients if self.auto and self.auto.now else self.size

    def train(
        self,
        clients: Sequence[LocalClient],
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        encoded: EncodedOnce,
        rnd: int,
    ) -> Stream[Delivery]:
        """The delivery of every client for round ``rnd``, as it comes. ``encoded`` holds the instructions.

        Once all have come, the clients' states are on the disk.
        """
        size = self._decide(clients, method, instructions, rnd)
        groups, plan = self._grouped(clients, size, training_load(self.workplaces[0], self.optim))

        def fetch(number: int) -> list[tuple[Start, int]]:
            return [_fetched(client, method, encoded.take(client.id), rnd) for client in groups[number]]

        def work(workplace: Workplace, number: int) -> list[tuple[ClientId, Delivery, Saves]]:
            return self._train(workplace, method, disk.take(number), rnd)

        with disk_thread(plan, fetch) as disk, closing(self._each(plan, work)) as done:
            for client, delivery, saves in chain.from_iterable(done):
                for save in saves:
                    disk.write(save)
                yield client, replace(delivery, note=joined(self.notes, *(each.notes for each in self.workplaces)))

    def evaluate(
        self,
        clients: Sequence[LocalClient],
        method: Method,
        encoded: EncodedOnce,
        rnd: int,
        splits: tuple[str, ...],
        usage: bool = False,
    ) -> Stream[Evaluation]:
        """The evaluation of every client after round ``rnd``, as it comes."""
        size = self.clients_per_batch
        rows = -(-self.workplaces[0].eval_batch_size // size)
        groups, plan = self._grouped(clients, size, evaluation_load(self.workplaces[0], splits, rows))

        def fetch(number: int) -> list[BankProgram]:
            return [bank_program(client, method, encoded.take(client.id), rnd) for client in groups[number]]

        def work(workplace: Workplace, number: int) -> list[tuple[ClientId, Evaluation]]:
            computes = [LocalCompute(workplace, client.data, rnd) for client in groups[number]]
            banks = [drive(program, compute) for program, compute in zip(disk.take(number), computes, strict=True)]
            made = evaluations(computes, banks, splits, usage, self.notes.append, texts=True)
            return [(client.id, of) for client, of in zip(groups[number], made, strict=True)]

        with disk_thread(plan, fetch) as disk, closing(self._each(plan, work)) as done:
            for client, made in chain.from_iterable(done):
                yield client, replace(made, note=joined(self.notes, *(each.notes for each in self.workplaces)))

    def _decide(
        self,
        clients: Sequence[LocalClient],
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
    ) -> int:
        """How many clients share a pass of this round; with ``auto``, by the largest adapter."""
        if self.auto is None or not clients:
            return self.clients_per_batch

        def weight(client: LocalClient) -> int:
            sent = sum(tensor.nbytes for tensor in instructions[client.id].tensors.values())
            return sent + client.states.personal.size(client.id, rnd - 1)

        def request() -> Train | None:
            for client in heaviest:
                ins = instructions[client.id]
                with suppress(CoterieError):  # that client fails on its own
                    personal = client.personal(method, rnd - 1)
                    program = method.client(ins, client.info, personal)
                    return first_request(program, partial(method.bank, ins, client.info, personal), self.optim)
            return None

        heaviest = sorted(clients, key=weight, reverse=True)
        rows = [client.data for client in clients]
        private = row_privacy(method, heaviest[0].info, rnd)
        if size := self.auto.decide(self.workplaces, rows, weight(heaviest[0]), request, private):
            number = f"{size.clients} clients share a" if size.clients > 1 else "each client has its own"
            self.notes.append(f"{number} forward pass: {size.reason}")
        return self.clients_per_batch

    def _grouped(
        self, clients: Sequence[LocalClient], size: int, load: Callable[[int, ClientData], Load]
    ) -> tuple[list[list[LocalClient]], list[list[int]]]:
        """The clients in groups that share passes, and the numbers of the groups for each workplace."""
        devices = len(self.workplaces)
        if size == devices == 1:
            return [[client] for client in clients], [list(range(len(clients)))]
        size = min(size, -(-len(clients) // devices))
        groups = grouped([load(number, client.data) for number, client in enumerate(clients)], max(1, size))
        return [[clients[of.number] for of in group] for group in groups], schedule(groups, devices)

    def _each(self, plan: Sequence[Sequence[int]], work: Callable[[Workplace, int], T]) -> Generator[T, None, None]:
        """The results of ``work`` for every group."""
        with closing(run_on(self.workplaces, plan, work)) as made:
            yield from releasing_memory(made)

    def _train(
        self, workplace: Workplace, method: Method, starts: Sequence[tuple[Start, int]], rnd: int
    ) -> list[tuple[ClientId, Delivery, Saves]]:
        """The outcomes of clients whose programs run together; each takes an equal part of the time."""
        meter = meter_of(workplace.devices, alone=len(self.workplaces) == 1)
        started, before = time.perf_counter(), meter.read()
        computes = [
            LocalCompute(workplace, of.client.data, rnd, private=row_privacy(method, of.client.info, rnd))
            for of, _ in starts
        ]
        programs = [method.client(start.ins, start.client.info, start.personal) for start, _ in starts]
        results = self._results(programs, computes)
        gflops = [0.0 if isinstance(result, Exception) else gflop_in(result) for result in results]
        energies = divided(meter.since(before), gflops, workplace.joules_per_tflop)
        ended: list[tuple[ClientId, Delivery, Saves]] = []
        for (start, bytes_down), compute, result, energy in zip(starts, computes, results, energies, strict=True):
            client = start.client
            if isinstance(result, Exception):
                ended.append((client.id, failed(client, result, 0.0).delivery(bytes_down), ()))
            else:
                delivery = Outcome(encoded_reply(start, method, result, rnd), energy=energy).delivery(bytes_down)
                ended.append((client.id, delivery, saves_of(client, compute, result)))
        seconds = (time.perf_counter() - started) / len(starts)
        return [(client, replace(delivery, seconds=seconds), saves) for client, delivery, saves in ended]

    def _results(
        self, programs: Sequence[ClientProgram], computes: Sequence[LocalCompute]
    ) -> Sequence[ClientResult | Exception]:
        """What each program returns, or the fault that ended it."""
        if len(programs) > 1:
            return drive_together(programs, computes, self.notes.append)
        try:
            return [drive(programs[0], computes[0])]
        except FAULTS as fault:
            return [fault.with_traceback(None)]


def _fetched(client: LocalClient, method: Method, blob: bytes, rnd: int) -> tuple[Start, int]:
    """What the client starts the round with, and the bytes that it was sent; its rows are tokenised, too."""
    with suppress(CoterieError):  # a row that cannot be encoded fails its client when it trains
        client.workplace.prepare(client.data, "train")
    return begin(client, method, blob, rnd), len(blob)
