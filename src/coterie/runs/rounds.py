"""The rounds of a run: sample, send, train, check, aggregate, evaluate, checkpoint, and go on after a crash.

Knows the Method and Engine protocols, and no method, model or network. Every event is a line of ``metrics.jsonl``;
a checkpoint holds the state after a round and the length of that file, so a run that was killed at any moment goes on
from its last checkpoint and ends with the same bits.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coterie.engines.base import Delivery, Engine, Evaluation
from coterie.engines.checks import fault_of
from coterie.machine import peak_memory
from coterie.methods.base import Method
from coterie.methods.findings import Notes, find, to_json
from coterie.ops.metrics import mean_metrics
from coterie.ops.streams import stream
from coterie.runs import checkpoint as checkpoints
from coterie.runs.checkpoint import Checkpoint
from coterie.types import ClientId, ClientInfo, CoterieError, Json, Reply

Listener = Callable[[dict[str, Json]], None]


@dataclass(frozen=True)
class Rounds:
    """How the rounds go; see the config section ``[run]``."""

    rounds: int
    seed: int
    cohort: float = 1.0
    quorum: float = 0.5
    norm_bound: float = 1e4
    evaluate_every: int = 1
    keep_checkpoints: int = 2


@dataclass
class Runner:
    """One run in one folder. ``listen`` hears every event as it happens, those of single clients included."""

    method: Method
    engine: Engine
    rounds: Rounds
    folder: Path
    listen: Listener = lambda event: None

    def run(self) -> Any:
        """All rounds that are still to do; returns the final state.

        Raises :class:`CoterieError` when fewer than the quorum reply, :class:`OSError` when a file cannot be written;
        the last checkpoint stands.
        """
        start = self._restore()
        state = start.state
        for rnd in range(start.rnd + 1, self.rounds.rounds + 1):
            state = self._round(state, rnd)
        return state

    def _restore(self) -> Checkpoint:
        """The newest whole checkpoint, with the metrics and the personal states as they were; or the start."""
        notes: list[str] = []
        saved = checkpoints.load_newest(self.folder / "checkpoints", self.method.State, notes.append, self._lacks)
        if saved is None:
            self._check_new()
            state = self.method.init(self.engine.spec, self.engine.clients)
            self.metrics.write_bytes(b"")
            self.engine.restore(0)
            found = self.method.describe(state)
            said = find(found, Notes)
            self._note([*notes, *(said.texts if said else ())], 0)
            self._log({"event": "start_state", "round": 0, "describe": to_json(found)})
            return self._commit(state, 0)
        os.truncate(self.metrics, saved.info["metrics_bytes"])
        self.engine.restore(saved.rnd)
        self._prune(saved.rnd)  # the run may have been killed between a commit and this
        self._note(notes, saved.rnd)
        self.listen({"event": "resumed", "round": saved.rnd})
        return saved

    def _check_new(self) -> None:
        """Raises :class:`CoterieError` where rounds were run whose checkpoints are gone."""
        if self.metrics.exists() and '"event": "round"' in self.metrics.read_text(encoding="utf-8", errors="replace"):
            raise CoterieError(
                f"{self.metrics} tells of rounds, but {self.folder / 'checkpoints'} holds no checkpoint; restore one, "
                "or start a new run with --out"
            )

    def _lacks(self, found: Checkpoint) -> str | None:
        """What of the run's folder a whole checkpoint needs and does not find there."""
        if not self.metrics.exists() or self.metrics.stat().st_size < found.info["metrics_bytes"]:
            return f"{self.metrics.name} is shorter than it was"
        here = self.engine.held(found.rnd)
        for kind, then in found.info.get("held", {}).items():
            lost = sorted(client for client, rnd in then.items() if here.get(kind, {}).get(client) != rnd)
            if lost:
                return f"of {len(lost)} client(s), {lost[0]} among them, the {kind} state of that round is gone"
        return None

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _round(self, state: Any, rnd: int) -> Any:
        started = time.perf_counter()
        cohort = self._cohort(rnd)
        self.listen({"event": "start", "round": rnd, "clients": [c.id for c in cohort]})
        instructions = self.method.configure(state, cohort, rnd)
        replies: dict[ClientId, Reply] = {}
        record: dict[str, Json] = {"event": "round", "round": rnd, "clients": {}, "failed": {}}
        infos = {c.id: c for c in cohort}
        with closing(self.engine.train(self.method, instructions, rnd)) as deliveries:
            for client, delivery in deliveries:
                self._note([delivery.note] if delivery.note else [], rnd)
                fault = delivery.error or self._fault(state, delivery.reply, infos[client], rnd)
                entry = record["clients"][client] = _entry(delivery, fault)
                if fault is None and delivery.reply is not None:
                    replies[client] = delivery.reply
                else:
                    record["failed"][client] = fault
                self.listen({**entry, "event": "client", "round": rnd, "client": client, "failed": fault})
        self._check_quorum(replies, cohort, record["failed"], rnd)
        before = to_json(self.method.describe(state))
        state = self.method.aggregate(state, replies, rnd)
        after = to_json(self.method.describe(state))
        changed = {name: value for name, value in after.items() if before.get(name) != value}
        record |= {"seconds": time.perf_counter() - started, "describe": changed}
        record |= {"peak_memory_bytes": peak_memory()}
        self._log(record)
        self._evaluate(state, rnd)
        self._commit(state, rnd)
        return state

    def _cohort(self, rnd: int) -> list[ClientInfo]:
        """The clients of a round: a seeded sample that does not depend on their order, sorted by id."""
        clients = sorted(self.engine.clients, key=lambda client: client.id)
        size = max(1, round(self.rounds.cohort * len(clients)))
        chosen = torch.randperm(len(clients), generator=stream(self.rounds.seed, rnd, "cohort"))[:size]
        return [clients[i] for i in sorted(chosen.tolist())]

    def _fault(self, state: Any, reply: Reply | None, client: ClientInfo, rnd: int) -> str | None:
        if reply is None:
            return "no reply"
        expected = self.method.expects(state, client, rnd)
        return fault_of(reply, expected, self.rounds.norm_bound, client.num_train)

    def _check_quorum(
        self, replies: Mapping[ClientId, Reply], cohort: list[ClientInfo], failed: Mapping[str, Json], rnd: int
    ) -> None:
        needed = max(1, math.ceil(self.rounds.quorum * len(cohort)))
        if len(replies) < needed:
            reasons = "; ".join(named(client, reason) for client, reason in list(failed.items())[:3])
            raise CoterieError(
                f"round {rnd}: {len(replies)} of {len(cohort)} clients replied, the quorum is {needed} ([run] quorum). "
                f"{reasons}"
            )

    def _evaluate(self, state: Any, rnd: int) -> None:
        if rnd % self.rounds.evaluate_every and rnd != self.rounds.rounds:
            return
        started = time.perf_counter()
        instructions = self.method.configure(state, self.engine.clients, rnd + 1)
        last = rnd == self.rounds.rounds
        scores: dict[ClientId, Evaluation] = {}
        asked = self.engine.evaluate(self.method, instructions, rnd, ("validation", "test"), usage=last)
        with closing(asked) as evaluations:
            for client, evaluation in evaluations:
                self._note([evaluation.note] if evaluation.note else [], rnd)
                scores[client] = evaluation
                self.listen({"event": "evaluated", "round": rnd, "client": client, "of": len(instructions)})
        splits = sorted({split for e in scores.values() for split in e.scores})
        mean = {s: mean_metrics({c: e.scores[s] for c, e in scores.items() if s in e.scores}) for s in splits}
        clients = {c: dict(e.scores) for c, e in scores.items()}
        record = {"event": "evaluation", "round": rnd, "clients": clients, "mean": mean}
        if last:
            record["usage"] = {c: dict(e.observed.usage) for c, e in scores.items() if e.observed}
        self._log(record | {"seconds": time.perf_counter() - started})

    def _commit(self, state: Any, rnd: int) -> Checkpoint:
        """Everything of round ``rnd`` is on the disk once this returns."""
        with self.metrics.open("rb") as file:
            os.fsync(file.fileno())
        info = {"metrics_bytes": self.metrics.stat().st_size, "held": self.engine.held(rnd)}
        made = Checkpoint(rnd, state, info)
        checkpoints.save(self.folder / "checkpoints", made, self.rounds.keep_checkpoints)
        self._prune(rnd)
        self.listen({"event": "checkpoint", "round": rnd})
        return made

    def _prune(self, rnd: int) -> None:
        self.engine.prune(rnd - self.rounds.keep_checkpoints + 1)

    def _note(self, notes: list[str], rnd: int) -> None:
        for text in notes:
            self._log({"event": "note", "round": rnd, "text": text})

    def _log(self, record: dict[str, Json]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self.listen(record)


def named(client: ClientId, fault: str) -> str:
    """``fault`` with the name of its client before it, once."""
    return fault if fault.startswith(f"client {client}") else f"{client}: {fault}"


def finite(value: Json) -> Json:
    """``value`` with None for every number that JSON has not: infinities, not-a-number."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _entry(delivery: Delivery, fault: str | None) -> dict[str, Json]:
    """What the record says of a client: of a reply that does not count, nothing that it said itself."""
    info = dict(delivery.reply.info) if delivery.reply and fault is None else {}
    sizes = {"bytes_down": delivery.bytes_down, "bytes_up": delivery.bytes_up}
    return {**info, **sizes, "seconds": delivery.seconds}
