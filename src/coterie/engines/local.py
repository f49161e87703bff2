"""Simulates the clients in this process over one base that is loaded once.

One client at a time it is the reference, the truth for the other engines; with ``[engine] clients_per_batch`` the
programs of several clients run in step and share their forward passes (:mod:`.batched`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from coterie import codec
from coterie.config import Config
from coterie.data.rows import ClientData, Federation
from coterie.data.tasks import make_task
from coterie.engine import Delivery, Evaluation
from coterie.engines.batched import FAULTS, Asked, answer_all, drive_together
from coterie.engines.compute import LocalCompute, resolve_precision
from coterie.engines.place import Workplace
from coterie.engines.sizing import best_size
from coterie.engines.store import RoundStore
from coterie.evaluate import check_rouge
from coterie.method import Compute, Method, drive
from coterie.nn.base import Base, load_base, resolve
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
    Observe,
    Observed,
    Personal,
    Score,
    Scored,
)


def make(config: Config, federation: Federation, folder: Path, root: Path, cache: dict[str, Any]) -> LocalEngine:
    """The engine for a run in ``folder``; the base stays in ``cache`` for further runs with the same model."""
    if config.task.generate:
        check_rouge()
    engine = config.engine.model_copy(update={"clients_per_batch": 1})  # no part of what is loaded
    key = str(("base", config.model, config.lora.targets, config.task.kind, engine, root))
    if key not in cache:
        cache[key] = _load(config, root)
    base: Base = cache[key]
    task = make_task(
        config.task.kind, base.tokenizer, config.model.max_length, config.task.max_new_tokens, config.task.generate
    )
    place = Workplace(base, task, config.run.seed, config.run.eval_batch_size)
    place.precision = resolve_precision(config.engine.precision, place.device)
    trained = RoundStore(folder / "trained", Bank) if config.evaluated == "trained" else None
    together, notes = config.engine.clients_per_batch, []
    if together == "auto":
        size = best_size(place, federation.clients, config.train, config.lora.rank)
        together = size.clients
        notes.append(f"{together} clients share a forward pass: {size.reason}")
    return LocalEngine(place, federation, RoundStore(folder / "personal", Personal), trained, together, notes)


def _load(config: Config, root: Path) -> Base:
    device = config.engine.device
    base = load_base(
        resolve(config.model.path, root),
        config.task.kind,
        targets=config.lora.targets,
        dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype],
        quantize=config.model.quantize,
        device=("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    needed = config.model.max_length + (config.task.max_new_tokens if config.task.generate else 0)
    if base.longest is not None and needed > base.longest:
        raise CoterieError(
            f"the model has positions for {base.longest} tokens; [model] max_length (and [task] max_new_tokens) "
            f"ask for {needed}: lower them"
        )
    place = next(base.model.parameters()).device
    precision = resolve_precision(config.engine.precision, place)
    if precision == "bfloat16":
        base.hold_linears(torch.bfloat16)
    if place.type == "cpu" and precision == "bfloat16" and config.model.max_length <= 256:
        base.use_attention("eager")  # torch's fused attention takes 1.5x as long there: docs/decisions/0008
    return base


@dataclass(frozen=True)
class LocalEngine:
    """Runs every client of a simulated federation in this process, ``together`` at a time.

    Instructions and replies go through the codec both ways, as over a network: the bytes are counted as encoded, and
    no tensor is shared between server and client by accident. With a store for ``trained`` banks, clients evaluate
    and export what they trained last, else what the server sends.
    """

    place: Workplace
    federation: Federation
    store: RoundStore[Personal]
    trained: RoundStore[Bank] | None = None
    together: int = 1
    notes: list[str] = field(default_factory=list)  # what the user should know, until a delivery takes it along
    guard: Callable[[LocalCompute], Compute] = lambda compute: compute  # around training; a site bounds its steps

    @property
    def spec(self) -> BaseSpec:
        return self.place.base.spec

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        return tuple(client.info for client in self.federation.clients)

    def train(
        self, method: Method[Any], instructions: Mapping[ClientId, Instruction], rnd: int
    ) -> Iterator[tuple[ClientId, Delivery]]:
        """Every client's delivery for round ``rnd``, as it comes. A client's failure is its delivery's ``error``."""
        for group in self._groups(instructions):
            yield from self._train(method, group, instructions, rnd)

    def evaluate(
        self,
        method: Method[Any],
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        splits: tuple[str, ...],
        usage: bool = False,
    ) -> Iterator[tuple[ClientId, Evaluation]]:
        """Every client's scores with the bank that it would start round ``rnd + 1`` with, or that it trained last."""
        for group in self._groups(instructions):
            banks = [self._bank(method, client, instructions[client.info.id], rnd) for client in group]
            scores: list[dict[str, Mapping[str, float]]] = [{} for _ in group]
            for split in splits:
                has = [i for i, client in enumerate(group) if client.splits.get(split)]
                asked = [(LocalCompute(self.place, group[i], rnd), Score([banks[i]], split)) for i in has]
                for i, found in zip(has, _told(asked, self.notes), strict=True):
                    (scored,) = cast(list[Scored], found)
                    scores[i][split] = {**scored.metrics, "loss": scored.loss}
            seen = [Observe(bank, _seen(client)) for client, bank in zip(group, banks, strict=True)] if usage else []
            looks = [
                (LocalCompute(self.place, client, rnd), one) for client, one in zip(group, seen, strict=bool(seen))
            ]
            observed = [cast(Observed, found) for found in _told(looks, self.notes)]
            for i, client in enumerate(group):
                yield client.info.id, Evaluation(scores[i], observed[i] if usage else None, _taken(self.notes))

    def banks(
        self, method: Method[Any], instructions: Mapping[ClientId, Instruction], rnd: int
    ) -> Iterator[tuple[ClientId, Bank]]:
        """Every client's bank after round ``rnd``, for export."""
        for client in self._ordered(instructions):
            yield client.info.id, self._bank(method, client, instructions[client.info.id], rnd)

    def restore(self, rnd: int) -> None:
        """Go back to the personal states after round ``rnd``."""
        self.store.forget_after(rnd)
        if self.trained:
            self.trained.forget_after(rnd)

    def prune(self, rnd: int) -> None:
        """Give up the personal states that only rounds before ``rnd`` need."""
        self.store.prune(rnd)
        if self.trained:
            self.trained.prune(rnd)

    def close(self) -> None:
        """Nothing: all is in this process."""

    def _train(
        self, method: Method[Any], group: Sequence[ClientData], instructions: Mapping[ClientId, Instruction], rnd: int
    ) -> Iterator[tuple[ClientId, Delivery]]:
        """The deliveries of clients whose programs run together."""
        started = time.perf_counter()
        downs = [codec.encode(instructions[client.info.id]) for client in group]
        programs = [
            method.client(codec.decode(Instruction, down), client.info, self._personal(method, client, rnd - 1))
            for client, down in zip(group, downs, strict=True)
        ]
        computes = [LocalCompute(self.place, client, rnd) for client in group]
        results = self._run(programs, computes)
        for compute, down, result in zip(computes, downs, results, strict=True):
            delivery = self._deliver(compute, result, len(down), rnd)
            seconds = (time.perf_counter() - started) / len(group)
            yield compute.client.info.id, replace(delivery, seconds=seconds, note=_taken(self.notes))

    def _run(
        self, programs: Sequence[ClientProgram], computes: Sequence[LocalCompute]
    ) -> Sequence[ClientResult | Exception]:
        """What each program returns, or the fault that ended it."""
        if len(programs) > 1:
            return drive_together(programs, computes, self.notes.append)
        try:
            return [drive(programs[0], self.guard(computes[0]))]
        except FAULTS as fault:
            return [fault]

    def _deliver(self, compute: LocalCompute, result: ClientResult | Exception, down: int, rnd: int) -> Delivery:
        """What the server gets of a client's result; what stays with the client is saved."""
        client = compute.client.info.id
        if isinstance(result, Exception):
            memory = isinstance(result, torch.OutOfMemoryError)
            error = f"client {client}: out of memory; lower [train] batch_size" if memory else str(result)
            return Delivery(None, error, down, 0, 0.0)
        up = codec.encode(result.reply)
        self.store.save(client, rnd, result.personal)
        if self.trained and compute.trained:
            self.trained.save(client, rnd, compute.trained)
        return Delivery(codec.decode(type(result.reply), up), None, down, len(up), 0.0)

    def _groups(self, instructions: Mapping[ClientId, Instruction]) -> Iterator[list[ClientData]]:
        """The clients in groups of ``together``; those with much data first, so that a group's are alike."""
        clients = [client for client in self.federation.clients if client.info.id in instructions]
        if self.together > 1:
            clients.sort(key=lambda client: -client.info.num_train)
        for start in range(0, len(clients), self.together):
            yield clients[start : start + self.together]

    def _bank(self, method: Method[Any], client: ClientData, ins: Instruction, rnd: int) -> Bank:
        """What the client evaluates with after round ``rnd``."""
        trained = self.trained.load(client.info.id, rnd) if self.trained else None
        return trained or method.bank(ins, client.info, self._personal(method, client, rnd))

    def _personal(self, method: Method[Any], client: ClientData, until: int) -> Personal:
        return self.store.load(client.info.id, until) or method.begin(self.spec, client.info)

    def _ordered(self, instructions: Mapping[ClientId, Instruction]) -> Iterator[ClientData]:
        return (client for client in self.federation.clients if client.info.id in instructions)


def _told(asked: Sequence[Asked], notes: list[str]) -> list[Answer]:
    """The answer to each client's request. Raises the first fault."""
    told = answer_all(asked, notes.append)
    for one in told:
        if isinstance(one, Exception):
            raise one
    return [one for one in told if not isinstance(one, Exception)]


def _taken(notes: list[str]) -> str | None:
    """The notes as one text; they are told once."""
    text = "; ".join(dict.fromkeys(notes)) or None
    notes.clear()
    return text


def _seen(client: ClientData) -> str:
    """The split on which the use of experts is looked at."""
    return next((split for split in ("test", "validation", "train") if client.splits.get(split)), "train")
