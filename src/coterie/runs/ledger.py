"""The privacy ledger of a run: every noisy release, and what all of them cost together.

It is written before anything that it counts leaves the server, and again with every checkpoint. A run that continues
takes the union of both: what a killed round released is counted, and what is released again with the same values and
the same noise is counted once, because it has the same name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coterie.files import read_json_as, write_json
from coterie.ops.accounting import Noised, Spent, of_one_draw, spent
from coterie.types import CoterieError

LEDGER = "privacy.json"
RESTORE = "restore it: without it nobody knows what the run has spent"
_NOISIEST = 1e21  # a multiplier: 1e5, the largest setting, times 2**53 rows, over which a measured mean is noisier
_STEPS = 10**9  # of one round's training: a hundred passes over ten million rows, one by one


@dataclass(frozen=True)
class Entry:
    """A release: its round, its kind (updates, embeddings), how it was hidden, and a name that no other release has.

    ``rows``: it concerns only the rows of clients that have so many, and is ``times`` steps of their training, each
    with rows drawn anew, or what they measure; 0: it concerns every client.
    """

    round: int
    kind: str
    noised: Noised
    name: str
    rows: int = 0
    times: int = 1


@dataclass(frozen=True)
class Ledger:
    """The releases so far, in order."""

    entries: tuple[Entry, ...] = ()

    def with_entries(self, entries: Iterable[Entry]) -> Ledger:
        """This ledger and ``entries``; one that it has already counts once."""
        return Ledger(tuple(dict.fromkeys([*self.entries, *entries])))

    def spent(self, delta: float, more: Iterable[Entry] = ()) -> Spent:
        """What all releases cost, and ``more`` beside them.

        Those of one round saw the same cohort, so sampling hides it once: they count as one with less noise. Steps of
        training cost the rows of whoever they cost most.
        """
        entries = self.with_entries(more).entries
        each = {entry.rows for entry in entries if entry.rows} or {0}
        return max((_spent(entries, rows, delta) for rows in sorted(each)), key=lambda of: of.epsilon)

    def of_rows(self) -> dict[str, int]:
        """By kind, the most releases that any client's rows are counted in: steps of training, what it measures."""
        each: Counter[tuple[str, int]] = Counter()
        for entry in self.entries:
            each[entry.kind, entry.rows] += entry.times if entry.rows else 0
        kinds = sorted({kind for kind, _ in each})
        return {kind: max(number for (of, _), number in each.items() if of == kind) for kind in kinds}

    def to_json(self) -> list[Mapping[str, object]]:
        of_rows = ("rows", "times")
        return [{k: v for k, v in asdict(e).items() if e.rows or k not in of_rows} for e in self.entries]


def _spent(entries: Iterable[Entry], rows: int, delta: float) -> Spent:
    """What those of ``entries`` cost that concern a client of so many ``rows``."""
    rounds: dict[int, list[Noised]] = {}
    counts: Counter[Noised] = Counter()  # a round has millions of steps where batches are small
    for entry in entries:
        if not entry.rows:
            rounds.setdefault(entry.round, []).append(entry.noised)
        elif entry.rows == rows:
            counts[entry.noised] += entry.times
    counts.update(noised for of in rounds.values() for noised in of_one_draw(of))
    return spent(counts, delta)


def ledger_from(lines: object, where: str) -> Ledger:
    """The ledger that :meth:`Ledger.to_json` wrote. Raises :class:`CoterieError` for anything else."""
    try:
        entries = _ENTRIES.validate_python(lines)
    except ValidationError as fault:
        raise CoterieError(f"{where} is not a privacy ledger ({fault.errors()[0]['msg']}); {RESTORE}") from fault
    _check(entries, where)
    return Ledger(entries)


def _check(entries: Iterable[Entry], where: str) -> None:
    """Raise :class:`CoterieError` for a release that no run makes, and whose cost nobody can calculate."""
    for number, entry in enumerate(entries, start=1):
        of = entry.noised
        if not 0 <= of.multiplier <= _NOISIEST:
            reason = f"a multiplier of {of.multiplier:g}"
        elif not 0 < of.drawn <= of.members or (of.sampled == "fixed" and of.drawn < 1):
            reason = f"{of.drawn:g} of {of.members} members drawn"
        elif entry.round < 0 or entry.rows < 0 or not 1 <= entry.times <= _STEPS:
            reason = f"round {entry.round}, {entry.rows} rows and {entry.times} times"
        else:
            continue
        raise CoterieError(f"{where} is damaged (entry {number} has {reason}); {RESTORE}")


def read_ledger(folder: Path) -> Ledger:
    """The ledger in a run's ``folder``; empty where there is none."""
    path = folder / LEDGER
    if not path.exists():
        return Ledger()
    entries = read_json_as(path, _FILE, RESTORE).entries
    _check(entries, str(path))
    return Ledger(entries)


def write_ledger(folder: Path, ledger: Ledger, spent_so_far: Spent) -> None:
    """Write the ledger to a run's ``folder``; it is on the disk once this returns."""
    write_json(folder / LEDGER, {"spent": asdict(spent_so_far), "entries": ledger.to_json()})


@dataclass(frozen=True)
class _Written:
    """The part of the file that a run reads."""

    entries: tuple[Entry, ...]


_ENTRIES, _FILE = TypeAdapter(tuple[Entry, ...]), TypeAdapter(_Written)
