"""The reference engine: one client at a time over one base that is loaded once. The truth for the other engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coterie import codec
from coterie.config import Config
from coterie.data.rows import ClientData, Federation
from coterie.data.tasks import make_task
from coterie.engine import Delivery, Evaluation
from coterie.engines.compute import LocalCompute, Workplace, resolve_precision
from coterie.engines.store import RoundStore
from coterie.evaluate import check_rouge
from coterie.method import Compute, Method, drive
from coterie.nn.base import Base, load_base, resolve
from coterie.types import Bank, BaseSpec, ClientId, ClientInfo, CoterieError, Instruction, Observe, Personal, Score


def make(config: Config, federation: Federation, folder: Path, root: Path, cache: dict[str, Any]) -> LocalEngine:
    """The engine for a run in ``folder``; the base stays in ``cache`` for further runs with the same model."""
    if config.task.generate:
        check_rouge()
    key = str(("base", config.model, config.lora.targets, config.task.kind, config.engine, root))
    if key not in cache:
        cache[key] = _load(config, root)
    base: Base = cache[key]
    task = make_task(
        config.task.kind, base.tokenizer, config.model.max_length, config.task.max_new_tokens, config.task.generate
    )
    place = Workplace(base, task, config.run.seed, config.run.eval_batch_size)
    place.precision = resolve_precision(config.engine.precision, place.device)
    trained = RoundStore(folder / "trained", Bank) if config.evaluated == "trained" else None
    return LocalEngine(place, federation, RoundStore(folder / "personal", Personal), trained)


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
    if place.type == "cpu" and precision == "bfloat16" and config.model.max_length <= 256:
        base.use_attention("eager")  # torch's fused attention takes 1.5x as long there: docs/decisions/0008
    return base


@dataclass(frozen=True)
class LocalEngine:
    """Runs every client of a simulated federation in this process, one after another.

    Instructions and replies go through the codec both ways, as over a network: the bytes are counted as encoded, and
    no tensor is shared between server and client by accident. With a store for ``trained`` banks, clients evaluate
    and export what they trained last, else what the server sends.
    """

    place: Workplace
    federation: Federation
    store: RoundStore[Personal]
    trained: RoundStore[Bank] | None = None
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
        for client in self._ordered(instructions):
            yield client.info.id, self._train_one(method, client, instructions[client.info.id], rnd)

    def evaluate(
        self,
        method: Method[Any],
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        splits: tuple[str, ...],
        usage: bool = False,
    ) -> Iterator[tuple[ClientId, Evaluation]]:
        """Every client's scores with the bank that it would start round ``rnd + 1`` with, or that it trained last."""
        for client in self._ordered(instructions):
            compute = LocalCompute(self.place, client, rnd)
            bank = self._bank(method, client, instructions[client.info.id], rnd)
            scores = {}
            for split in splits:
                if client.splits.get(split):
                    (scored,) = compute.score(Score([bank], split))
                    scores[split] = {**scored.metrics, "loss": scored.loss}
            seen = next((split for split in ("test", "validation", "train") if client.splits.get(split)), "train")
            yield client.info.id, Evaluation(scores, compute.observe(Observe(bank, seen)) if usage else None)

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

    def _train_one(self, method: Method[Any], client: ClientData, ins: Instruction, rnd: int) -> Delivery:
        started = time.perf_counter()
        down = codec.encode(ins)
        personal = self._personal(method, client, rnd - 1)
        program = method.client(codec.decode(Instruction, down), client.info, personal)
        compute = LocalCompute(self.place, client, rnd)
        try:
            result = drive(program, self.guard(compute))
        except (CoterieError, torch.OutOfMemoryError) as fault:
            memory = isinstance(fault, torch.OutOfMemoryError)
            error = f"client {client.info.id}: out of memory; lower [train] batch_size" if memory else str(fault)
            return Delivery(None, error, len(down), 0, time.perf_counter() - started)
        up = codec.encode(result.reply)
        self.store.save(client.info.id, rnd, result.personal)
        if self.trained and compute.trained:
            self.trained.save(client.info.id, rnd, compute.trained)
        reply = codec.decode(type(result.reply), up)
        return Delivery(reply, None, len(down), len(up), time.perf_counter() - started)

    def _bank(self, method: Method[Any], client: ClientData, ins: Instruction, rnd: int) -> Bank:
        """What the client evaluates with after round ``rnd``."""
        trained = self.trained.load(client.info.id, rnd) if self.trained else None
        return trained or method.bank(ins, client.info, self._personal(method, client, rnd))

    def _personal(self, method: Method[Any], client: ClientData, until: int) -> Personal:
        return self.store.load(client.info.id, until) or method.begin(self.spec, client.info)

    def _ordered(self, instructions: Mapping[ClientId, Instruction]) -> Iterator[ClientData]:
        return (client for client in self.federation.clients if client.info.id in instructions)
