"""One client's part of a round, from the bytes that arrive to the bytes that go back.

Whoever runs a client calls these functions: the local engine for each client in turn, an actor of Flower's simulation
for the client of a message, the worker at a site for its own. Everything is decoded once and encoded once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch

from coterie import codec
from coterie.compute.batched import FAULTS, ClientRequest, Note, answer_all
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.rows import ClientData
from coterie.energy import Energy, Meter, energy_of
from coterie.engines.base import SAMPLES, Delivery, Evaluation
from coterie.engines.privacy import hidden, row_privacy
from coterie.engines.store import ClientStates
from coterie.methods.base import Compute, Method, drive
from coterie.requests import Answer, BankProgram, Observe, Observed, Sample, Score, Scored
from coterie.types import Bank, ClientId, ClientInfo, ClientResult, CoterieError, Instruction, Personal, Reply

NO_METER = Meter()


@dataclass(frozen=True)
class Guard:
    """A client's own rules: those of a site's policy; a simulated client has none.

    ``admit`` raises :class:`CoterieError` for an instruction that the client refuses. ``compute`` wraps the compute for
    training. ``release`` returns what may be sent of a reply, or raises. ``wording`` gives the text that may be sent
    about a fault.
    """

    admit: Callable[[Instruction], None] = lambda ins: None
    compute: Callable[[LocalCompute], Compute] = lambda compute: compute
    release: Callable[[Reply], Reply] = lambda reply: reply
    wording: Callable[[Exception], str] = str


@dataclass(frozen=True)
class LocalClient:
    """A client on this machine: the workplace that answers its requests, its rows, its states, its guard."""

    workplace: Workplace
    data: ClientData
    states: ClientStates
    guard: Guard = Guard()

    @property
    def info(self) -> ClientInfo:
        return self.data.info

    @property
    def id(self) -> ClientId:
        return self.data.info.id

    def personal(self, method: Method, until: int) -> Personal:
        """The newest personal state of a round up to ``until``, or the initial one."""
        return self.states.personal.load(self.id, until) or method.begin(self.workplace.base.spec, self.info)


@dataclass(frozen=True)
class Outcome:
    """What a client sends back: an encoded reply or evaluation, or the reason why there is none; and its seconds.

    ``note``: what the user should know. ``energy``: what training took, if that is known.
    """

    blob: bytes
    error: str | None = None
    seconds: float = 0.0
    note: str | None = None
    energy: Energy | None = None

    def delivery(self, bytes_down: int) -> Delivery:
        """The outcome of a round of training, its reply decoded."""
        reply = codec.decode(Reply, self.blob) if self.error is None else None
        return Delivery(reply, self.error, bytes_down, len(self.blob), self.seconds, self.note, self.energy)

    def evaluation(self) -> Evaluation:
        """The evaluation, decoded."""
        return replace(codec.decode(Evaluation, self.blob), note=self.note)


def train_client(client: LocalClient, method: Method, blob: bytes, rnd: int, meter: Meter = NO_METER) -> Outcome:
    """Round ``rnd`` of a client: decode the instruction, load its personal state, run the method's program, encode the
    reply, save the personal state. ``meter`` measures what the program takes.

    The client's own faults are the outcome's ``error``. Raises :class:`CoterieError` for an instruction that is refused
    or a state that cannot be read, :class:`codec.CodecError` for bytes that are not an instruction.
    """
    start = begin(client, method, blob, rnd)
    started, before = time.perf_counter(), meter.read()
    compute = LocalCompute(client.workplace, client.data, rnd, private=row_privacy(method, client.info, rnd))
    try:
        result = drive(method.client(start.ins, client.info, start.personal), client.guard.compute(compute))
        energy = energy_of(meter.since(before), gflop_in(result), client.workplace.joules_per_tflop)
        reply = encoded_reply(start, method, result, rnd)
    except FAULTS as fault:
        return failed(client, fault, time.perf_counter() - started)
    for save in saves_of(client, compute, result):
        save()
    return Outcome(reply, None, time.perf_counter() - started, joined(client.workplace.notes), energy)


def gflop_in(result: ClientResult) -> float:
    """Billions of operations of training, as the client counted them; 0 if it did not."""
    return float(result.reply.info.get("gflop", 0.0))


def evaluate_client(
    client: LocalClient,
    method: Method,
    blob: bytes,
    rnd: int,
    splits: Sequence[str],
    usage: bool = False,
    texts: bool = False,
) -> Outcome:
    """The encoded :class:`Evaluation` of a client with the bank that it has after round ``rnd``.

    ``texts``: with ``usage``, return some rows' generated texts too, which only a simulation may.

    Raises as :func:`train_client`, and :class:`CoterieError` for a client that cannot be evaluated.
    """
    notes: list[str] = []
    bank = client_bank(client, method, blob, rnd)
    compute = LocalCompute(client.workplace, client.data, rnd)
    (evaluation,) = evaluations([compute], [bank], splits, usage, notes.append, texts)
    return Outcome(codec.encode(evaluation), note=joined(notes, client.workplace.notes))


def client_bank(client: LocalClient, method: Method, blob: bytes, rnd: int) -> Bank:
    """What a client evaluates with and exports after round ``rnd``: what it has trained where that is kept, else what
    the instruction for the next round gives it. Raises as :func:`train_client`."""
    compute = client.guard.compute(LocalCompute(client.workplace, client.data, rnd))
    return drive(bank_program(client, method, blob, rnd), compute)


def bank_program(client: LocalClient, method: Method, blob: bytes, rnd: int) -> BankProgram:
    """The program of :func:`client_bank`; the states that it needs are read now."""
    ins = _instruction(client, blob)
    personal = client.personal(method, rnd)
    trained = client.states.trained.load(client.id, rnd) if client.states.trained else None
    if trained:
        return method.after_training(ins, client.info, personal, trained)
    return method.choose(ins, client.info, personal)


# The parts of the above, for clients that train or are evaluated together. -------------------------------------------


@dataclass(frozen=True)
class Start:
    """What a client starts a round with."""

    client: LocalClient
    ins: Instruction
    personal: Personal


def begin(client: LocalClient, method: Method, blob: bytes, rnd: int) -> Start:
    """Decode the instruction and load the personal state. Raises as :func:`train_client`."""
    return Start(client, _instruction(client, blob), client.personal(method, rnd - 1))


def encoded_reply(start: Start, method: Method, result: ClientResult, rnd: int) -> bytes:
    """The reply as it is sent. Raises :class:`CoterieError` where the client keeps it to itself."""
    client = start.client
    reply = hidden(method, client.workplace.base.spec, client.info, start.ins, result.reply, rnd)
    return codec.encode(client.guard.release(reply))


def saves_of(client: LocalClient, compute: LocalCompute, result: ClientResult) -> list[Callable[[], None]]:
    """Functions that write the states that the client keeps after the round of ``compute``."""
    saves: list[Callable[[], None]] = [partial(client.states.personal.save, client.id, compute.rnd, result.personal)]
    if client.states.trained and compute.trained:
        saves.append(partial(client.states.trained.save, client.id, compute.rnd, compute.trained))
    return saves


def failed(client: LocalClient, fault: Exception, seconds: float) -> Outcome:
    """The outcome of a client whose round ended with ``fault``."""
    if isinstance(fault, torch.OutOfMemoryError):
        return Outcome(b"", f"client {client.id}: out of memory; lower [train] batch_size", seconds)
    return Outcome(b"", client.guard.wording(fault), seconds)


def evaluations(
    computes: Sequence[LocalCompute],
    banks: Sequence[Bank],
    splits: Sequence[str],
    usage: bool,
    note: Note,
    texts: bool = False,
) -> list[Evaluation]:
    """The evaluation of each client with its bank. Raises the first client's fault."""
    scores: list[dict[str, Mapping[str, float]]] = [{} for _ in computes]
    observed: dict[int, Observed] = {}
    samples: dict[int, Sequence[Sample]] = {}
    wanted = SAMPLES if usage and texts else 0
    observe_on = [_observed_split(compute.client) if usage else None for compute in computes]
    for split in splits:
        having = [i for i, compute in enumerate(computes) if compute.client.splits.get(split)]
        requests = [
            (computes[i], Score([banks[i]], split, usage=split == observe_on[i], samples=wanted)) for i in having
        ]
        for i, answer in zip(having, _answers(requests, note), strict=True):
            (scored,) = cast(list[Scored], answer)
            scores[i][split] = {**scored.metrics, "loss": scored.loss}
            observed |= {i: scored.observed} if scored.observed else {}
            samples |= {i: scored.samples} if scored.samples else {}
    left = [(i, split) for i, split in enumerate(observe_on) if split and i not in observed]
    answers = _answers([(computes[i], Observe(banks[i], split)) for i, split in left], note)
    observed |= {i: cast(Observed, answer) for (i, _), answer in zip(left, answers, strict=True)}
    return [Evaluation(metrics, observed.get(i), samples=samples.get(i, ())) for i, metrics in enumerate(scores)]


def joined(*lists: list[str]) -> str | None:
    """The notes as one text, without repeats; empties the lists."""
    taken = [notes.pop(0) for notes in lists for _ in range(len(notes))]  # another thread may add a note meanwhile
    return "; ".join(dict.fromkeys(taken)) or None


def _instruction(client: LocalClient, blob: bytes) -> Instruction:
    ins = codec.decode(Instruction, blob)
    client.guard.admit(ins)
    return ins


def _answers(requests: Sequence[ClientRequest], note: Note) -> list[Answer]:
    """The answer to each client's request. Raises the first fault."""
    answers = answer_all(requests, note)
    for (compute, _), answer in zip(requests, answers, strict=True):
        if isinstance(answer, torch.OutOfMemoryError):
            raise CoterieError(
                f"client {compute.client.info.id}: out of memory in evaluation; lower [run] eval_batch_size or [model] "
                "max_length"
            ) from answer
        if isinstance(answer, Exception):
            raise answer
    return [answer for answer in answers if not isinstance(answer, Exception)]


def _observed_split(client: ClientData) -> str:
    """The split on which the use of experts is observed."""
    return next((split for split in ("test", "validation", "train") if client.splits.get(split)), "train")
