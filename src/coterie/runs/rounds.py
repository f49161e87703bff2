"""The rounds of a run: sample, send, train, check, aggregate, evaluate, checkpoint, and continue after a crash.

Knows the Method and Engine protocols, and no method, model or network. A checkpoint holds the state after a round and
the length of the run's log (:mod:`coterie.runs.log`), so a run that is killed at any moment continues from its last
checkpoint and ends with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from coterie.engines.base import Engine, Evaluation
from coterie.machine import peak_memory
from coterie.methods.base import Method
from coterie.methods.findings import Notes, find, to_json
from coterie.methods.parts import label_space
from coterie.ops.accounting import Spent
from coterie.ops.metrics import mean_metrics
from coterie.runs import checkpoint as checkpoints
from coterie.runs.agreed import Agreed, by_rule, with_shares
from coterie.runs.checkpoint import Checkpoint
from coterie.runs.collect import Collected, Training
from coterie.runs.cost import warnings
from coterie.runs.events import (
    METRICS,
    CheckpointSaved,
    ClientEvaluated,
    ClientSteps,
    Evaluated,
    Listener,
    Resumed,
    RoundDone,
    RoundStart,
    StartState,
    Truncated,
)
from coterie.runs.health import loss_note, quorum_fault
from coterie.runs.ledger import Ledger
from coterie.runs.log import Log
from coterie.runs.private import BudgetSpentError, Private, drawn
from coterie.runs.secure import Sums, check_start, findings, simulated, summed
from coterie.runs.settings import RoundSettings
from coterie.runs.summary import best_round
from coterie.types import ClientId, ClientInfo, CoterieError

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
    warned: Sequence[str] = ()  # what the user should know whenever the run begins or continues
    private: Private | None = field(init=False, default=None)  # where the method's plan has [privacy]
    log: Log = field(init=False)
    _last: int = 0  # the last round that is done

    def __post_init__(self) -> None:
        self.log = Log(self.folder / METRICS, self.listen)
        if self.method.plan.secure.enabled and self.sums is None:
            self.sums = simulated(self.method)
        if self.method.plan.privacy.active:
            self.private = Private(self.method, self.engine.clients, self.settings, self.folder)
            self.notes = [*self.notes, *warnings(self.private.settings)]

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
                if rnd == 1:
                    raise CoterieError(f"{spent}; start a new run with a higher epsilon or more noise") from spent
                self.log.note([str(spent)], rnd - 1)
                self._evaluate_at_stop(state, rnd - 1)
                break
            self._last = rnd
        return state

    def exported(self, state: S) -> Checkpoint[S]:
        """The round to export after :meth:`run`, which returned ``state``: the one that validation chose, or the last.

        The last one too where the checkpoint of the chosen one, or a client's state of it, is lost; a note says so.
        """
        last = Checkpoint(self._last, state, self.log.size)
        chosen = self._round_to_export(last.rnd)
        if chosen is None or chosen == last.rnd:
            return last
        try:
            saved = checkpoints.load(self.folder / "checkpoints", chosen, self.method.State)
            if lacking := self._lacks(saved):
                raise checkpoints.CorruptCheckpointError(lacking)
        except checkpoints.CorruptCheckpointError as fault:
            self.log.note([f"round {chosen}, the best, cannot be exported ({fault}); the last round is"], last.rnd)
            return last
        return saved

    def _round_to_export(self, rnd: int) -> int | None:
        """The round to export if the run ended after round ``rnd``; None where that is the last whatever comes."""
        evaluated = [event for event in self.log.evaluated if event.round <= rnd]
        return best_round(evaluated, self.settings.primary) if evaluated and self.settings.export == "best" else None

    def _restore(self) -> Checkpoint[S]:
        """The newest whole checkpoint, with the metrics and the personal states as they were; or the start."""
        notes: list[str] = []
        saved = checkpoints.load_newest(self.folder / "checkpoints", self.method.State, notes.append, self._lacks)
        if saved is None:
            checkpoints.check_new(self.folder / "checkpoints", self.log.path)
            state = self.method.init(self.engine.spec, self.engine.clients)
            self.log.begin()
            self.engine.restore(0)
            found = findings(self.method, state)
            said = find(found, Notes)
            self.log.note([*notes, *self.notes, *self.warned, *(said.texts if said else ())], 0)
            self.log.add(StartState(describe=to_json(found)))
            self._say_what_is_cut()
            return self._commit(state, 0)
        if self.private:
            self.private.add(saved.ledger)
        self.log.return_to(saved.metrics_bytes)
        self.engine.restore(saved.rnd)
        self._prune(saved.rnd)  # the run may have been killed between a commit and this
        self.log.note([*notes, *self.warned], saved.rnd)
        self.listen(Resumed(saved.rnd))
        return saved

    def _say_what_is_cut(self) -> None:
        truncation = self.engine.truncation()
        if truncation.rows and not self.private:  # exact counts over everyone's rows
            self.log.add(Truncated(truncation.rows, truncation.cut, truncation.tokens))
            self.log.note([str(truncation)] if truncation.cut else [], 0)

    def _lacks(self, checkpoint: Checkpoint[S]) -> str | None:
        """What a whole checkpoint needs but is missing from the run's folder, or None."""
        if self.log.size < checkpoint.metrics_bytes or not self.log.path.exists():
            return f"{self.log.path.name} is shorter than it was"
        here = self.engine.state_rounds(checkpoint.rnd)
        for kind, then in checkpoint.held.items():
            lost = sorted(client for client, rnd in then.items() if here.get(kind, {}).get(client) != rnd)
            if lost:
                return f"the {kind} state of that round is missing for {len(lost)} client(s), including {lost[0]}"
        return None

    def _round(self, state: S, rnd: int) -> S:
        started = time.perf_counter()
        state = self.method.admit(state, self.engine.clients)
        if self.private:
            self.private.check_budget(state, rnd)
        cohort = self._cohort(rnd)
        self.listen(RoundStart(rnd, [client.id for client in cohort]))
        self.engine.watch(lambda steps: self.listen(ClientSteps(rnd, list(steps.clients), steps.taken, steps.of)))
        if self.private:
            self.private.begin(state, rnd)
        sent = Training(self.method, self.engine, self.settings, self.sums, self.log).collect(state, cohort, rnd)
        done = RoundDone(rnd, sent.entries, sent.failed, time.perf_counter() - started)
        self._check_quorum(done, len(cohort), len(sent.replies))
        before = to_json(findings(self.method, state))
        spaces = {client.id: label_space(client) for client in self.engine.clients}
        if self.private:
            sent.replies = self.private.released(self.engine.spec, state, sent.replies, spaces, rnd)
        agreed = self._agreed(state, sent, spaces, rnd)
        for client, fault in agreed.failed.items():
            sent.leave_out(client, fault)
        self._check_quorum(replace(done, seconds=time.perf_counter() - started), len(cohort), len(agreed.replies))
        state = self.method.aggregate(state, agreed.replies, rnd) if agreed.replies else state
        after = to_json(findings(self.method, state))
        changed = {name: value for name, value in after.items() if before.get(name) != value}
        done = replace(done, seconds=time.perf_counter() - started, describe=changed, peak_memory_bytes=peak_memory())
        self.log.add(replace(done, robust=agreed.weighed, sums=agreed.sums, privacy=self._spent()))
        self._evaluate(state, rnd)
        self._commit(state, rnd)
        return state

    def _cohort(self, rnd: int) -> list[ClientInfo]:
        """The clients of a round, sorted by id; with ``[privacy]``, only the server can know them."""
        return self.private.drawn(rnd) if self.private else drawn(self.engine.clients, self.settings, rnd)

    def _agreed(self, state: S, sent: Collected, spaces: Mapping[ClientId, str], rnd: int) -> Agreed:
        """The replies after secure sums or the rule of ``[robust]``; as they are without either."""
        robust = self.method.plan.robust
        groups = self.method.groups(state, sent.replies, spaces)
        examples = {client: reply.num_examples for client, reply in sent.replies.items()}
        replies, capped = with_shares(groups, sent.replies, self.settings.max_share)
        if self.sums is not None:
            agreed = summed(self.method, self.sums, groups, replies, sent.starts, sent.instructions, examples, rnd)
        else:
            agreed = by_rule(robust, groups, replies, sent.starts) if robust.active else Agreed(replies)
        self.log.note(agreed.notes, rnd)
        said = capped if self.method.weighting == "examples" else {}  # elsewhere all count alike
        self.log.note_once({**said, **agreed.once}, rnd)
        return agreed

    def _check_quorum(self, made: RoundDone, cohort: int, replies: int) -> None:
        """Raises :class:`CoterieError`, and logs the round, where too few of its clients' replies can be used."""
        needed = max(int(cohort > 0), math.ceil(self.settings.quorum * cohort))
        if fault := quorum_fault(made.round, replies, cohort, made.failed, needed):
            self.log.add(replace(made, peak_memory_bytes=peak_memory(), privacy=self._spent()))
            raise CoterieError(fault)

    def _spent(self) -> Spent | None:
        return self.private.spent() if self.private else None

    def _evaluate(self, state: S, rnd: int) -> None:
        last = rnd == self.settings.rounds
        if last or rnd % self.settings.evaluate_every == 0:
            self._evaluate_now(state, rnd, last)

    def _evaluate_at_stop(self, state: S, rnd: int) -> None:
        """Evaluate the round that has turned out to be the last one, unless that is done."""
        if not self.log.evaluated or self.log.evaluated[-1].round != rnd:
            self._evaluate_now(state, rnd, last=True)

    def _evaluate_now(self, state: S, rnd: int, last: bool) -> None:
        if self.private and self.private.settings.metrics == "none":
            self.log.add(Evaluated(rnd))
            return
        started = time.perf_counter()
        there = self.engine.clients  # some may have come during the round
        instructions = self.method.configure(self.method.admit(state, there), there, rnd + 1)
        scores: dict[ClientId, Evaluation] = {}
        asked = self.engine.evaluate(self.method, instructions, rnd, ("validation", "test"), usage=last)
        with closing(asked) as evaluations:
            for client, evaluation in evaluations:
                self.log.note([evaluation.note] if evaluation.note else [], rnd)
                scores[client] = evaluation
                self.listen(ClientEvaluated(rnd, client, len(instructions)))
        splits = sorted({split for e in scores.values() for split in e.scores})
        mean = {s: mean_metrics({c: e.scores[s] for c, e in scores.items() if s in e.scores}) for s in splits}
        usage = {c: e.observed.usage for c, e in scores.items() if e.observed} if last else None
        clients = {client: evaluation.scores for client, evaluation in scores.items()}
        samples = {client: evaluation.samples for client, evaluation in scores.items() if evaluation.samples}
        self.log.add(Evaluated(rnd, clients, mean, usage, time.perf_counter() - started, samples))
        self.log.note([text] if (text := loss_note(self.log.evaluated)) else [], rnd)

    def _commit(self, state: S, rnd: int) -> Checkpoint[S]:
        """Everything of round ``rnd`` is on the disk once this returns."""
        self.log.flush()
        ledger = self.private.ledger if self.private else Ledger()
        made = Checkpoint(rnd, state, self.log.size, self.engine.state_rounds(rnd), ledger)
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
