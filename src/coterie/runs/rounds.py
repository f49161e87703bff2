"""The rounds of a run: sample, send, train, check, aggregate, evaluate, checkpoint, and continue after a crash.

Knows the Method and Engine protocols, and no method, model or network. Every event is a line of ``metrics.jsonl``;
a checkpoint holds the state after a round and the length of that file, so a run that is killed at any moment continues
from its last checkpoint and ends with the same bits.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from coterie.engines.base import Delivery, Engine, Evaluation
from coterie.engines.bounds import Sizes, large_updates, reply_limit, update_sizes
from coterie.engines.checks import fault_of
from coterie.machine import peak_memory
from coterie.methods.base import Method
from coterie.methods.findings import Notes, find, to_json
from coterie.methods.parts import label_space
from coterie.methods.robust import Group
from coterie.ops.metrics import mean_metrics
from coterie.runs import checkpoint as checkpoints
from coterie.runs.agreed import Agreed, by_rule, with_shares
from coterie.runs.checkpoint import Checkpoint
from coterie.runs.events import (
    METRICS,
    CheckpointSaved,
    ClientDone,
    ClientEvaluated,
    ClientRound,
    ClientSteps,
    Evaluated,
    Event,
    Listener,
    Note,
    Resumed,
    RoundDone,
    RoundStart,
    StartState,
    Truncated,
    read_events,
)
from coterie.runs.health import loss_note, quorum_fault
from coterie.runs.ledger import Ledger
from coterie.runs.private import BudgetSpentError, Private, drawn
from coterie.runs.secure import Simulated, Sums, apart, check_start, held, known, received, summed
from coterie.runs.settings import RoundSettings
from coterie.runs.summary import best_round
from coterie.types import ClientId, ClientInfo, CoterieError, Instruction, Reply, Tensors

S = TypeVar("S")  # the method's state


@dataclass
class Runner(Generic[S]):
    """One run in one folder. ``listen`` gets every event as it happens, including those of single clients.

    ``sums`` opens secure sums, if the method's plan has any; by default those of clients in this process.
    """

    method: Method[S]
    engine: Engine
    settings: RoundSettings
    folder: Path
    listen: Listener = lambda event: None
    notes: Sequence[str] = ()  # what the user should know before the first round
    sums: Sums | None = None
    _noted: list[str] = field(default_factory=list)  # so far
    _evaluated: list[Evaluated] = field(default_factory=list)  # so far
    _last: int = 0  # the last round that is done
    private: Private | None = None
    _sent: Mapping[ClientId, Instruction] = field(default_factory=dict)  # in this round

    def __post_init__(self) -> None:
        if self.method.plan.secure.enabled and self.sums is None:
            self.sums = Simulated(self.method.plan.secure)
        if self.method.plan.privacy.active:
            self.private = Private(self.method, self.engine.clients, self.settings, self.folder)

    def run(self) -> S:
        """Do all remaining rounds; returns the final state.

        Raises :class:`CoterieError` when fewer than the quorum reply, :class:`OSError` when a file cannot be written;
        the last checkpoint is kept.
        """
        start = self._restore()
        state, self._last = start.state, start.rnd
        if self.sums is not None:
            check_start(self.method, self.engine.clients, state, start.rnd + 1)
        for rnd in range(start.rnd + 1, self.settings.rounds + 1):
            try:
                state = self._round(state, rnd)
            except BudgetSpentError as spent:
                self._note([str(spent)], rnd - 1)
                break
            self._last = rnd
        return state

    def exported(self, state: S) -> Checkpoint[S]:
        """The round to export after :meth:`run`, which returned ``state``: the one that validation chose, or the last.

        The last one too where the checkpoint of the chosen one, or a client's state of it, is lost; a note says so.
        """
        last = Checkpoint(self._last, state, self.metrics.stat().st_size)
        chosen = self._round_to_export(last.rnd)
        if chosen is None or chosen == last.rnd:
            return last
        try:
            saved = checkpoints.load(self.folder / "checkpoints", chosen, self.method.State)
            if lacking := self._lacks(saved):
                raise checkpoints.CorruptCheckpointError(lacking)
        except checkpoints.CorruptCheckpointError as fault:
            self._note([f"round {chosen}, the best, cannot be exported ({fault}); the last round is"], last.rnd)
            return last
        return saved

    def _round_to_export(self, rnd: int) -> int | None:
        """The round to export if the run ended after round ``rnd``; None where that is the last whatever comes."""
        evaluated = [event for event in self._evaluated if event.round <= rnd]
        return best_round(evaluated, self.settings.primary) if evaluated and self.settings.export == "best" else None

    def _restore(self) -> Checkpoint[S]:
        """The newest whole checkpoint, with the metrics and the personal states as they were; or the start."""
        notes: list[str] = []
        saved = checkpoints.load_newest(self.folder / "checkpoints", self.method.State, notes.append, self._lacks)
        if saved is None:
            checkpoints.check_new(self.folder / "checkpoints", self.metrics)
            state = self.method.init(self.engine.spec, self.engine.clients)
            self.metrics.write_bytes(b"")
            self.engine.restore(0)
            found = known(self.method, state)
            said = find(found, Notes)
            self._note([*notes, *self.notes, *(said.texts if said else ())], 0)
            self._log(StartState(describe=to_json(found)))
            self._say_what_is_cut()
            return self._commit(state, 0)
        if self.private:
            self.private.add(saved.ledger)
        os.truncate(self.metrics, saved.metrics_bytes)
        events = read_events(self.metrics)
        self._evaluated = [event for event in events if isinstance(event, Evaluated)]
        self._noted = [event.text for event in events if isinstance(event, Note)]
        self.engine.restore(saved.rnd)
        self._prune(saved.rnd)  # the run may have been killed between a commit and this
        self._note(notes, saved.rnd)
        self.listen(Resumed(saved.rnd))
        return saved

    def _say_what_is_cut(self) -> None:
        truncation = self.engine.truncation()
        if truncation.rows and not self.private:  # exact counts over everyone's rows
            self._log(Truncated(truncation.rows, truncation.cut, truncation.tokens))
            self._note([str(truncation)] if truncation.cut else [], 0)

    def _lacks(self, checkpoint: Checkpoint[S]) -> str | None:
        """What a whole checkpoint needs but is missing from the run's folder, or None."""
        if not self.metrics.exists() or self.metrics.stat().st_size < checkpoint.metrics_bytes:
            return f"{self.metrics.name} is shorter than it was"
        here = self.engine.state_rounds(checkpoint.rnd)
        for kind, then in checkpoint.held.items():
            lost = sorted(client for client, rnd in then.items() if here.get(kind, {}).get(client) != rnd)
            if lost:
                return f"the {kind} state of that round is missing for {len(lost)} client(s), including {lost[0]}"
        return None

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS

    def _round(self, state: S, rnd: int) -> S:
        started = time.perf_counter()
        if self.private:
            self.private.check_budget(state, rnd)
        cohort = self._cohort(rnd)
        self.listen(RoundStart(rnd, [client.id for client in cohort]))
        self.engine.watch(lambda steps: self.listen(ClientSteps(rnd, list(steps.clients), steps.taken, steps.of)))
        replies, entries, failed, starts = self._train(state, cohort, rnd)
        self._check_quorum(RoundDone(rnd, entries, failed, time.perf_counter() - started), len(cohort), len(replies))
        before = to_json(known(self.method, state))
        spaces = {client.id: label_space(client) for client in self.engine.clients}
        replies = self.private.released(self.engine.spec, state, replies, spaces, rnd) if self.private else replies
        groups = self.method.groups(state, replies, spaces)
        agreed = self._agreed(groups, replies, starts, rnd)
        failed |= agreed.failed
        entries |= {client: replace(entries[client], said={}) for client in agreed.failed}
        late = RoundDone(rnd, entries, failed, time.perf_counter() - started)
        self._check_quorum(late, len(cohort), len(agreed.replies))
        state = self.method.aggregate(state, agreed.replies, rnd) if agreed.replies else state
        after = to_json(known(self.method, state))
        changed = {name: value for name, value in after.items() if before.get(name) != value}
        seconds = time.perf_counter() - started
        spent = self.private.spent() if self.private else None
        made = RoundDone(rnd, entries, failed, seconds, changed, peak_memory(), agreed.weighed, agreed.sums, spent)
        self._log(made)
        self._evaluate(state, rnd)
        self._commit(state, rnd)
        return state

    def _train(
        self, state: S, cohort: Sequence[ClientInfo], rnd: int
    ) -> tuple[dict[ClientId, Reply], dict[ClientId, ClientRound], dict[ClientId, str], dict[ClientId, Tensors]]:
        """The replies that are used, every client's entry in the record, why the other replies are not used.

        The last is what the clients started from, for the rules of ``[robust]`` and for secure sums.
        """
        replies: dict[ClientId, Reply] = {}
        entries: dict[ClientId, ClientRound] = {}
        failed: dict[ClientId, str] = {}
        sizes: dict[ClientId, Sizes] = {}
        starts: dict[ClientId, Tensors] = {}
        instructions, infos = self.method.configure(state, cohort, rnd), {client.id: client for client in cohort}
        self._sent = instructions
        if self.private:
            self.private.begin(state, rnd)
        limits = {client.id: reply_limit(self.method.expects(state, client, rnd)) for client in cohort}
        with closing(self.engine.train(self.method, instructions, rnd, limits)) as deliveries:
            for client, delivery in deliveries:
                self._note([delivery.note] if delivery.note else [], rnd)
                delivery = received(self.sums, self.method, delivery)
                fault = delivery.error or self._fault(state, delivery.reply, infos[client], rnd)
                entries[client] = _entry(delivery, fault)
                if fault is not None:
                    failed[client] = fault
                elif delivery.reply is not None:
                    info = infos[client]
                    reply = held(self.sums, delivery.reply, self.method.expects(state, info, rnd))
                    start = self.method.started_from(self.engine.spec, state, info, instructions[client], reply)
                    replies[client] = reply
                    bounded = self.sums or self.method.plan.privacy.by_server  # by a clip
                    sizes |= {} if bounded else {client: update_sizes(reply, start)}
                    starts |= {client: start} if self.method.plan.robust.active or self.sums else {}
                self.listen(ClientDone(rnd, client, entries[client], fault))
        steps = {client: self.method.plan.optim.steps_on(infos[client].num_train) for client in sizes}
        for client, fault in large_updates(sizes, steps, self.settings.update_bound).items():
            failed[client], entries[client] = fault, replace(entries[client], said={})
            del replies[client]
        return replies, entries, failed, starts

    def _cohort(self, rnd: int) -> list[ClientInfo]:
        """The clients of a round, sorted by id; with ``[privacy]``, only the server can know them."""
        return self.private.drawn(rnd) if self.private else drawn(self.engine.clients, self.settings, rnd)

    def _fault(self, state: S, reply: Reply | None, client: ClientInfo, rnd: int) -> str | None:
        if reply is None:
            return "no reply"
        expected = {} if apart(self.sums) else self.method.expects(state, client, rnd)
        info = self.method.expects_info(state, client, rnd)
        optim, together = self.method.plan.optim, self.engine.clients if self.method.needs_all_rows else [client]
        rows = [each.num_train for each in together]  # of every client that it trains on
        return fault_of(reply, expected, self.settings.norm_bound, client.num_train, info, optim, rows)

    def _agreed(
        self,
        groups: Sequence[Group],
        replies: dict[ClientId, Reply],
        starts: Mapping[ClientId, Tensors],
        rnd: int,
    ) -> Agreed:
        """``replies`` after secure sums or the rule of ``[robust]``; as they are without either."""
        robust = self.method.plan.robust
        examples = {client: reply.num_examples for client, reply in replies.items()}
        replies, capped = with_shares(groups, replies, self.settings.max_share)
        if self.sums is not None:
            agreed = summed(self.method, self.sums, groups, replies, starts, self._sent, examples, rnd)
        else:
            agreed = by_rule(robust, groups, replies, starts) if robust.active else Agreed(replies)
        texts = {**capped, **agreed.once}
        once = [text for subject, text in texts.items() if not any(t.startswith(subject) for t in self._noted)]
        self._note([*agreed.notes, *once], rnd)
        return agreed

    def _check_quorum(self, made: RoundDone, cohort: int, replies: int) -> None:
        """Raises :class:`CoterieError`, and logs the round, where too few of its clients' replies can be used."""
        needed = max(bool(cohort), math.ceil(self.settings.quorum * cohort))
        if fault := quorum_fault(made.round, replies, cohort, made.failed, needed):
            self._log(replace(made, peak_memory_bytes=peak_memory()))
            raise CoterieError(fault)

    def _evaluate(self, state: S, rnd: int) -> None:
        if rnd % self.settings.evaluate_every and rnd != self.settings.rounds:
            return
        if self.private and self.private.settings.metrics == "none":
            self._evaluated.append(Evaluated(rnd))
            self._log(self._evaluated[-1])
            return
        started = time.perf_counter()
        instructions = self.method.configure(state, self.engine.clients, rnd + 1)
        last = rnd == self.settings.rounds
        scores: dict[ClientId, Evaluation] = {}
        asked = self.engine.evaluate(self.method, instructions, rnd, ("validation", "test"), usage=last)
        with closing(asked) as evaluations:
            for client, evaluation in evaluations:
                self._note([evaluation.note] if evaluation.note else [], rnd)
                scores[client] = evaluation
                self.listen(ClientEvaluated(rnd, client, len(instructions)))
        splits = sorted({split for e in scores.values() for split in e.scores})
        mean = {s: mean_metrics({c: e.scores[s] for c, e in scores.items() if s in e.scores}) for s in splits}
        usage = {c: e.observed.usage for c, e in scores.items() if e.observed} if last else None
        clients = {client: evaluation.scores for client, evaluation in scores.items()}
        samples = {client: evaluation.samples for client, evaluation in scores.items() if evaluation.samples}
        self._evaluated.append(Evaluated(rnd, clients, mean, usage, time.perf_counter() - started, samples))
        self._log(self._evaluated[-1])
        self._note([text] if (text := loss_note(self._evaluated)) else [], rnd)

    def _commit(self, state: S, rnd: int) -> Checkpoint[S]:
        """Everything of round ``rnd`` is on the disk once this returns."""
        with self.metrics.open("rb") as file:
            os.fsync(file.fileno())
        ledger = self.private.ledger if self.private else Ledger()
        made = Checkpoint(rnd, state, self.metrics.stat().st_size, self.engine.state_rounds(rnd), ledger)
        checkpoints.save(self.folder / "checkpoints", made, self.settings.keep_checkpoints, self._rounds_to_keep(rnd))
        self._prune(rnd)
        self.listen(CheckpointSaved(rnd))
        return made

    def _prune(self, rnd: int) -> None:
        self.engine.prune(rnd - self.settings.keep_checkpoints + 1, self._rounds_to_keep(rnd))

    def _rounds_to_keep(self, rnd: int) -> set[int]:
        """The rounds to export if the run went on from any of the checkpoints that are kept after round ``rnd``."""
        kept = range(rnd - self.settings.keep_checkpoints + 1, rnd + 1)
        return {chosen for of in kept if (chosen := self._round_to_export(of)) is not None}

    def _note(self, notes: Sequence[str], rnd: int) -> None:
        for text in notes:
            self._noted.append(text)
            self._log(Note(text, rnd))

    def _log(self, event: Event) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event.to_json(), allow_nan=False) + "\n")
        self.listen(event)


def _entry(delivery: Delivery, fault: str | None) -> ClientRound:
    """A client's entry in the record, without the statistics of an unused reply."""
    statistics = dict(delivery.reply.info) if delivery.reply and fault is None else {}
    return ClientRound(delivery.bytes_down, delivery.bytes_up, delivery.seconds, statistics)
