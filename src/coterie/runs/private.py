"""The rounds of a run with ``[privacy]``: who takes part, what the server adds noise to, and what is left to spend."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from coterie.files import write_atomic
from coterie.methods.base import Method
from coterie.methods.privacy import EMBEDDINGS, PrivacySettings, Released, kinds_of
from coterie.methods.robust import Group
from coterie.methods.row_privacy import measured_of, measures_in, row_multiplier, step_of
from coterie.ops.accounting import Noised, Spent
from coterie.ops.noise import KEY_BYTES, SecureNoise, SeededNoise
from coterie.ops.streams import stream
from coterie.runs.cost import cohort_size, multiplier_of, noised
from coterie.runs.guarantee import Guarantee
from coterie.runs.ledger import Entry, Ledger, read_ledger, write_ledger
from coterie.runs.settings import RoundSettings
from coterie.types import BaseSpec, ClientId, ClientInfo, CoterieError, Reply, Tensors

KEY = "privacy.key"
STEPS = "steps of a client"


class BudgetSpentError(CoterieError):
    """A round would spend more than ``epsilon``: the run ends with the one before."""


@dataclass
class Private:
    """The privacy of one run in ``folder``. ``ledger`` grows before anything is released.

    Whoever begins the run has checked that its guarantee protects somebody (:mod:`coterie.runs.cost`).
    """

    method: Method
    clients: Sequence[ClientInfo]
    rounds: RoundSettings
    folder: Path
    ledger: Ledger = field(default_factory=Ledger)
    stopped: str = ""

    def __post_init__(self) -> None:
        self.settings: PrivacySettings = self.method.plan.privacy
        self.noise = self._noise()
        if self.settings.by_row:
            self.multiplier = max(self._row_multiplier(rows) for rows in self._row_counts)
        else:
            self.multiplier = multiplier_of(self.settings, self.method, len(self.clients), self.rounds)
        self.ledger = read_ledger(self.folder)

    @property
    def _row_counts(self) -> list[int]:
        return sorted({client.num_train for client in self.clients})

    def _row_multiplier(self, rows: int) -> float:
        """The multiplier of a client with so many ``rows``."""
        plan = self.method.plan
        return row_multiplier(self.settings, plan.optim, rows, plan.rounds, self.method.releases())

    def _noise(self) -> SecureNoise | SeededNoise:
        if self.settings.noise_source == "seeded":
            return SeededNoise(self.rounds.seed)
        return kept_noise(self.folder / KEY)

    @property
    def size(self) -> float:
        """The clients of a round; with Poisson sampling, as expected."""
        return cohort_size(self.rounds, len(self.clients))

    def drawn(self, rnd: int) -> list[ClientInfo]:
        """The cohort of a round, which only the server knows; the same one if the round is done again."""
        ordered = sorted(self.clients, key=lambda client: client.id)
        return chosen(ordered, self.rounds, self.noise.uniform(len(ordered), "cohort", rnd))

    def kinds(self, state: object, rnd: int) -> frozenset[str]:
        """What round ``rnd`` releases."""
        return kinds_of(key for client in self.clients for key in self.method.expects(state, client, rnd))

    def check_budget(self, state: object, rnd: int) -> None:
        """Raise :class:`BudgetSpentError` where round ``rnd`` may not begin.

        What the server has released of it before costs nothing again, if it turns out to have the same values.
        """
        if self.settings.by_row:
            self._check(self._steps(rnd, ""), rnd)
            return
        before = {entry.kind for entry in self.ledger.entries if entry.round == rnd and self.settings.by_server}
        self._check([Entry(rnd, kind, self._noised(), "") for kind in sorted(self.kinds(state, rnd) - before)], rnd)

    def _check(self, entries: Sequence[Entry], rnd: int) -> None:
        """Raise :class:`BudgetSpentError` where ``entries``, as far as they are new, cost more than is left."""
        if not self.settings.epsilon or not set(entries) - set(self.ledger.entries):
            return
        after = self.ledger.spent(self.settings.delta, entries).epsilon
        if after > self.settings.epsilon * (1 + 1e-9):
            self.stopped = (
                f"stopped before round {rnd}: with it the run would have spent epsilon = {after:.3g}, more than "
                f"[privacy] epsilon = {self.settings.epsilon:g}"
            )
            raise BudgetSpentError(self.stopped)

    def begin(self, state: object, rnd: int) -> None:
        """Count what clients themselves add noise to in round ``rnd``, each time that they are sent instructions."""
        again = "seeded" if self.settings.noise_source == "seeded" else secrets.token_hex(16)
        if self.settings.at_clients and not self.settings.by_row:
            self._count(self.kinds(state, rnd), rnd, f"round {rnd} {again}")
        if self.settings.by_row:
            self._add(self._steps(rnd, f"round {rnd} {again}"), rnd)

    def _steps(self, rnd: int, name: str) -> list[Entry]:
        """The training of a round: every client's, whoever takes part, for who takes part is no secret here.

        And what clients measure on their rows in it.
        """
        optim, made = self.method.plan.optim, []
        measures = measures_in(self.method.releases(), rnd, self.method.plan.rounds)
        for n in self._row_counts:
            multiplier = self._row_multiplier(n)
            made.append(Entry(rnd, STEPS, step_of(multiplier, optim, n), name, n, optim.steps_on(n)))
            if measures:
                made.append(Entry(rnd, EMBEDDINGS, measured_of(multiplier, optim, n), name, n))
        return made

    def released(
        self,
        spec: BaseSpec,
        state: object,
        replies: dict[ClientId, Reply],
        spaces: Mapping[ClientId, str],
        rnd: int,
    ) -> dict[ClientId, Reply]:
        """``replies`` with the noise that the server adds; as they are where clients have added it."""
        if not self.settings.by_server:
            return replies
        everyone, starts = self.everyone(spec, state, replies, rnd)
        return self.release(self.method.groups(state, everyone, spaces), replies, everyone, starts, rnd)

    def release(
        self,
        groups: Sequence[Group],
        replies: Mapping[ClientId, Reply],
        everyone: Mapping[ClientId, Reply],
        starts: Mapping[ClientId, Tensors],
        rnd: int,
    ) -> dict[ClientId, Reply]:
        """``replies`` with noisy sums of their groups; on the ledger, and on the disk, before this returns.

        Raises :class:`CoterieError` where drawing a cohort would hide nobody.
        """
        if self._noised().sampled != "all":
            check_grouped(groups, everyone, rnd)
        made = Released(self.settings, self.multiplier, self.noise, self.size / len(self.clients))(
            groups, replies, everyone, starts, rnd
        )
        self._count(made.kinds, rnd, self.noise.name(made.digest))
        return dict(made.replies)

    def everyone(
        self, spec: BaseSpec, state: object, replies: Mapping[ClientId, Reply], rnd: int
    ) -> tuple[dict[ClientId, Reply], dict[ClientId, Tensors]]:
        """A reply of every client, and what each started from: who sent nothing did not move."""
        method = self.method
        instructions = method.configure(state, self.clients, rnd)
        made, starts = dict(replies), {}
        for me in self.clients:
            expected = method.expects(state, me, rnd)
            still = Reply({key: torch.zeros(shape) for key, shape in expected.items()}, 1)
            start = method.started_from(spec, state, me, instructions[me.id], replies.get(me.id, still))
            tensors = {key: start.get(key, value) for key, value in still.tensors.items()}
            made.setdefault(me.id, replace(still, tensors=tensors))
            starts[me.id] = start
        return made, starts

    def add(self, ledger: Ledger) -> None:
        """Count what a checkpoint's ledger has, too."""
        self.ledger = ledger.with_entries(self.ledger.entries)

    def _noised(self) -> Noised:
        return noised(self.settings, self.rounds, len(self.clients), self.multiplier)

    def _count(self, kinds: frozenset[str], rnd: int, name: str) -> None:
        self._add([Entry(rnd, kind, self._noised(), name) for kind in sorted(kinds)], rnd)

    def _add(self, entries: Sequence[Entry], rnd: int) -> None:
        self._check(entries, rnd)
        self.ledger = self.ledger.with_entries(entries)
        write_ledger(self.folder, self.ledger, self.spent())

    def spent(self) -> Spent:
        """What the run has spent so far."""
        return self.ledger.spent(self.settings.delta)

    def finish(self) -> None:
        """Forget the key of the noise: the run is over."""
        (self.folder / KEY).unlink(missing_ok=True)

    def guarantee(self) -> Guarantee:
        """What the run guarantees."""
        s, spent, entries = self.settings, self.spent(), self.ledger.entries
        exchanged = any(entry.noised.sampled == "fixed" for entry in entries)
        return Guarantee(
            s.unit,
            spent.epsilon,
            spent.delta,
            spent.accountant,
            "one client exchanged for another" if exchanged else f"one {s.unit}'s contribution replaced by none",
            self.multiplier,
            s.clip,
            "client" if s.by_row else s.noise_at,
            s.noise_source,
            f"{self.size:g} of {len(self.clients)}, {self.rounds.sampling}",
            self.ledger.of_rows() if s.by_row else dict(sorted(Counter(entry.kind for entry in entries).items())),
            s.metrics,
            self.stopped,
            s.colluding if s.by_sum else 0.0,
        )


def kept_noise(path: Path) -> SecureNoise:
    """Noise from the key in the file ``path``, which is made anew where there is none.

    Raises :class:`CoterieError` for a file without a whole key: each process would draw other noise.
    """
    if not path.exists():
        write_atomic(path, secrets.token_bytes(KEY_BYTES), mode=0o600)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise CoterieError(
            f"{path} is damaged: it has {len(key)} bytes, and the key of the noise has {KEY_BYTES}; restore it, or "
            "delete it: a round that is done again then has other noise, and is counted again"
        )
    return SecureNoise(key)


def check_grouped(groups: Sequence[Group], everyone: Mapping[ClientId, Reply], rnd: int) -> None:
    """Raise :class:`CoterieError` for tensors in no group: noised one by one, they show who was drawn."""
    shared = {(client, key) for group in groups for client in group.members for key in group.keys}
    for client, reply in sorted(everyone.items()):
        alone = sorted(key for key in reply.tensors if (client, key) not in shared)
        if alone:
            raise CoterieError(
                f"[privacy] round {rnd} would release {alone[0]} of client {client} by itself, which shows who was "
                'drawn; set [run] cohort = 1 and sampling = "fixed"'
            )


def drawn(clients: Sequence[ClientInfo], rounds: RoundSettings, rnd: int) -> list[ClientInfo]:
    """The clients of a round: a seeded sample that does not depend on their order, sorted by id."""
    ordered = sorted(clients, key=lambda client: client.id)
    random = stream(rounds.seed, rnd, "cohort")
    if rounds.sampling == "poisson":
        return chosen(ordered, rounds, torch.rand(len(ordered), generator=random))
    picked = torch.randperm(len(ordered), generator=random)[: int(cohort_size(rounds, len(ordered)))]
    return [ordered[i] for i in sorted(picked.tolist())]


def chosen(ordered: Sequence[ClientInfo], rounds: RoundSettings, values: Tensor) -> list[ClientInfo]:
    """The cohort by a value from 0 to 1 for each client: those with a small one, or a fixed number of the smallest."""
    if rounds.sampling == "poisson":
        return [client for client, value in zip(ordered, values.tolist(), strict=True) if value < rounds.cohort]
    return [ordered[i] for i in sorted(values.argsort(stable=True)[: int(cohort_size(rounds, len(ordered)))].tolist())]
